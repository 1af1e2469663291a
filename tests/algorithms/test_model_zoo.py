"""Models of many kinds, planned, quantized and run, against dequantize-then-float."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.algorithms.explain import explain
from jaxquant.algorithms.ptq import ptq
from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.recipe import Recipe, Rule, WeightScheme
from jaxquant.frontends import quantize

X = jax.random.normal(jax.random.key(1), (2, 6, 16))
RECIPE = Recipe("int3", (Rule(weight=WeightScheme("int3")),))
normal = nn.initializers.normal()


class Mapped(nn.Module):
    """Layers under nn.vmap, stacked along the first and the second axis."""

    @nn.compact
    def __call__(self, x):
        split = {"split_rngs": {"params": True}}
        first = nn.vmap(nn.Dense, variable_axes={"params": 0}, in_axes=None, axis_size=3, **split)
        second = nn.vmap(nn.Dense, variable_axes={"params": 1}, **split)
        return second(8, name="second")(first(16, name="first")(x))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return (
            nn.ConvTranspose(8, (3,), name="transposed")(x),
            nn.Conv(16, (3,), feature_group_count=16, name="depthwise")(x),
            nn.ConvLocal(4, (3,), name="local")(x),
        )


class Spectral(nn.Module):
    """A kernel that a power iteration uses on the side, and one that a norm rescales."""

    @nn.compact
    def __call__(self, x):
        weight_norm = nn.WeightNorm(nn.Dense(8, name="normed"))
        spectral = nn.SpectralNorm(nn.Dense(8, name="dense"))
        return weight_norm(x) + spectral(x, update_stats=False)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.OptimizedLSTMCell(4)))(x)


class Biased(nn.Module):
    """Relative attention biases looked up by distance, and learned positions that are added."""

    @nn.compact
    def __call__(self, x):
        table = self.param("relative", normal, (32, 4))
        distance = jnp.arange(6)[:, None] - jnp.arange(6)[None] + 6
        q = nn.DenseGeneral((4, 4), name="q")(x)
        mixed = jax.nn.dot_product_attention(q, q, q, bias=table[distance].transpose(2, 0, 1)[None])
        positions = self.param("positions", normal, (10, 16))
        return nn.DenseGeneral(16, axis=(-2, -1), name="out")(mixed) + positions[:6]


class Mixture(nn.Module):
    """Experts gathered by token, experts in a batch, and a bias for each."""

    @nn.compact
    def __call__(self, x):
        _, top = jax.lax.top_k(nn.Dense(4, name="router")(x), 2)
        w = self.param("w", normal, (4, 16, 8))
        bias = self.param("bias", normal, (4, 8))
        gathered = jnp.einsum("bti,btkio->btko", x, w[top]) + bias[top]
        dispatched = jnp.einsum("btke,bti->ebti", jax.nn.one_hot(top, 4), x)
        return gathered, jnp.einsum("ebti,eio->ebto", dispatched, w)


class LowRank(nn.Module):
    """W + A B as weights, and as products with the input."""

    @nn.compact
    def __call__(self, x):
        w, a, b = (
            self.param(name, normal, shape)
            for name, shape in (("w", (16, 8)), ("a", (16, 4)), ("b", (4, 8)))
        )
        return x @ (w + a @ b), x @ w + (x @ a) @ b, jax.lax.map(lambda row: row @ w, x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class NnxModel(nnx.Module):
    """Layers under nnx.vmap and nnx.scan, an LSTM, a LoRA layer, an Einsum."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock, in_axes=(0,), out_axes=0))
        self.layers = make(rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(16, 8, rngs=rngs))
        self.lora = nnx.LoRALinear(16, 8, lora_rank=4, rngs=rngs)
        self.einsum = nnx.Einsum("btd,dhk->bthk", (16, 2, 8), (2, 8), rngs=rngs)

    def __call__(self, x):
        step = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = step(self.layers, x)
        return self.rnn(x), self.lora(x), self.einsum(x)


def close(got, expected):
    for value, want in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert float(jnp.max(jnp.abs(value - want))) <= 1e-5 * float(jnp.max(jnp.abs(want)))


def dequantized(tree):
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_qtensor(leaf) else leaf, tree, is_leaf=is_qtensor
    )


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (Mapped(), {"first/kernel": (1, 16, 1), "second/kernel": (16, 1, 1)}),
        (
            Convolutions(),
            {
                "transposed/kernel": (3, 16, 1),
                "depthwise/kernel": (3, 1, 1),
                "local/kernel": (1, 48, 1),
            },
        ),
        (Spectral(), {"dense/kernel": (16, 1)}),
        (Recurrent(), None),
        (Biased(), {"relative": (1, 4), "q/kernel": (16, 1, 1), "out/kernel": (4, 4, 1)}),
        (Mixture(), {"router/kernel": (16, 1), "w": (1, 16, 1)}),
        (LowRank(), {"w": (16, 1), "a": (16, 1), "b": (4, 1)}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_linen(model, blocks):
    variables = jax.jit(model.init)(jax.random.key(0), X)
    decorated = quantize(RECIPE)(model)
    plan = explain(decorated, variables, X)
    found = {r.param: r.block_shape for r in plan.rows if r.qtype is not None}
    assert blocks is None or found == blocks
    quantized = ptq(decorated, variables, X, progress=False)
    leaves = jax.tree.leaves(quantized, is_leaf=is_qtensor)
    assert sum(map(is_qtensor, leaves)) == len(found) > 0
    assert sum(w.nbytes for w in leaves if is_qtensor(w)) == plan.totals["quantized_bytes_after"]
    both = jax.jit(lambda q: (decorated.apply(q, X), model.apply(dequantized(q), X)))
    close(*both(quantized))


def test_nnx():
    model = quantize(RECIPE)(NnxModel(nnx.Rngs(0)))
    found = {r.param: r.block_shape for r in explain(model, X).rows if r.qtype is not None}
    assert found == {
        "layers/linear/kernel": (1, 16, 1),
        "rnn/cell/dense_i/kernel": (16, 1),
        "rnn/cell/dense_h/kernel": (8, 1),
        "lora/kernel": (16, 1),
        "lora/lora/lora_a": (16, 1),
        "lora/lora/lora_b": (4, 1),
        "einsum/kernel": (16, 1, 1),
    }
    quantized = ptq(model, X, progress=False)
    graph, state = nnx.split(quantized)

    @jax.jit
    def both(state):
        floats = nnx.merge(nnx.graphdef(model), dequantized(state))
        return nnx.merge(graph, state)(X), floats(X)

    close(*both(state))
