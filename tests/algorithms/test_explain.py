"""`explain` on real Flax models: which op is found, under which name, with which scales."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.algorithms.explain import explain
from jaxquant.core.recipe import ActScheme, Recipe, Rule, WeightScheme
from jaxquant.frontends import quantize

X = jax.ShapeDtypeStruct((2, 6, 16), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
INT8 = WeightScheme("int8")


def plan_of(model, *args, recipe=None, **kwargs):
    """The plan of a Linen model; nothing is computed."""
    variables = jax.eval_shape(
        lambda key: model.init(key, *_ones(args), **kwargs), jax.random.key(0)
    )
    return explain(model, variables, *args, recipe=recipe, **kwargs)


def _ones(args):
    return [jnp.zeros(a.shape, a.dtype) for a in args]


def table(plan):
    """Parameter, op kind, class and block shape of what is quantized."""
    return [(r.param, r.kind, r.cls, r.block_shape) for r in plan.rows if r.status == "quantized"]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=4, name="mha")(x)


def test_linen_attention_has_several_summed_axes_in_its_output():
    plan = plan_of(Attention(), X)
    assert table(plan) == [
        ("mha/query/kernel", "dense", "DenseGeneral", (16, 1, 1)),
        ("mha/key/kernel", "dense", "DenseGeneral", (16, 1, 1)),
        ("mha/value/kernel", "dense", "DenseGeneral", (16, 1, 1)),
        ("mha/out/kernel", "dense", "DenseGeneral", (4, 4, 1)),
    ]
    products = plan.where(kind="attention")
    assert [(r.path, r.cls, r.status) for r in products] == [
        ("mha", "MultiHeadDotProductAttention", "float")
    ] * 2
    assert "only a rule with op='attention'" in products[0].reason
    biases = plan.where(kind="other", status="float")
    assert {r.param for r in biases} == {f"mha/{n}/bias" for n in ("query", "key", "value", "out")}
    assert all("is used by add" in r.reason for r in biases)


def test_nnx_attention_is_the_same():
    plan = explain(nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0)), X)
    assert [(p, b) for p, _, _, b in table(plan)] == [
        ("query/kernel", (16, 1, 1)),
        ("key/kernel", (16, 1, 1)),
        ("value/kernel", (16, 1, 1)),
        ("out/kernel", (4, 4, 1)),
    ]
    assert [r.cls for r in plan.where(kind="attention")] == ["MultiHeadAttention"] * 2


def test_attention_products_follow_a_rule_that_names_them():
    recipe = Recipe("test", (Rule(op="attention", act=ActScheme()), Rule(weight=INT8)))
    rows = plan_of(Attention(), X, recipe=recipe).where(kind="attention")
    assert [(r.status, r.act) for r in rows] == [("quantized", "int8 per token")] * 2
    alone = Recipe("test", (Rule(op="attention", act=ActScheme()),))
    rows = plan_of(Attention(), X, recipe=alone).where(kind="attention")
    assert [r.status for r in rows] == ["float"] * 2
    assert "nothing in the tree is quantized" in rows[0].reason


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(50, 16, name="embed")
        x = embed(ids) * 4.0
        return embed.attend(nn.LayerNorm(name="norm")(x))


def test_tied_embeddings_share_row_scales():
    plan = plan_of(Tied(), IDS)
    assert table(plan) == [
        ("embed/embedding", "embed", "Embed", (1, 16)),
        ("embed/embedding", "attend", "Embed", (1, 16)),
    ]
    assert [r.counts for r in plan.where(param="embed/embedding")] == [True, False]
    assert plan.totals["quantized_bytes_before"] == 50 * 16 * 4


class Zoo(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((16, 2, 8), "btd,dhk->bthk", name="einsum")(x)
        x = nn.DenseGeneral(16, axis=(-2, -1), name="general")(x)
        x = nn.Conv(12, (3,), name="conv")(x)
        w = self.param("raw", nn.initializers.normal(), (8, 12))
        gain = self.param("gain", nn.initializers.ones, (8,))
        x = jnp.einsum("nd,btd->btn", w.astype(x.dtype), x)
        return jnp.einsum("btd,d->btd", x, gain)


def test_einsum_general_conv_and_raw_products():
    plan = plan_of(Zoo(), X)
    assert table(plan) == [
        ("einsum/kernel", "einsum", "Einsum", (16, 1, 1)),
        ("general/kernel", "dense", "DenseGeneral", (2, 8, 1)),
        ("conv/kernel", "conv", "Conv", (3, 16, 1)),
        ("raw", "dot", "Zoo", (1, 12)),
    ]
    (gain,) = plan.where(param="gain")
    assert "a gain, bias or outer product" in gain.reason


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16, name="fc")(nn.LayerNorm(name="norm")(x)), None


class Scanned(nn.Module):
    axis: int = 0
    remat: bool = True

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize(("axis", "blocks"), [(0, (1, 16, 1)), (1, (16, 1, 1)), (-1, (16, 1, 1))])
def test_scanned_layers_keep_scales_of_their_own(axis, blocks):
    (row,) = plan_of(Scanned(axis), X).where(status="quantized")
    assert (row.param, row.path, row.cls) == ("layers/fc/kernel", "layers/fc", "Dense")
    assert row.block_shape == blocks
    assert row.lowering


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(8), name="rnn")(x)


def test_lstm_under_scan():
    plan = plan_of(Lstm(), X)
    quantized = {r.param: r.block_shape for r in plan.where(status="quantized")}
    gates = "ifgo"
    expected = {f"OptimizedLSTMCell_0/i{g}/kernel": (16, 1) for g in gates}
    expected |= {f"OptimizedLSTMCell_0/h{g}/kernel": (8, 1) for g in gates}
    assert quantized == expected


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (4, 16, 8))
        picked = jnp.argmax(x[:, 0, :4], axis=-1)
        each = jnp.einsum("btd,bdf->btf", x, w[picked])
        return each + sum(x @ w[i] for i in range(4))


def test_experts_one_at_a_time_and_gathered():
    rows = plan_of(Experts(), X).where(param="w")
    assert len(rows) == 5
    assert {(r.status, r.block_shape) for r in rows} == {("quantized", (1, 16, 1))}


class Twice(nn.Module):
    """A jitted body that JAX traces once and calls for two modules."""

    @nn.compact
    def __call__(self, x):
        dense = nn.jit(nn.Dense)
        return dense(16, name="b")(dense(16, name="a")(x))


def test_a_cached_body_is_named_by_its_parameter():
    rows = plan_of(Twice(), X).where(status="quantized")
    assert [(r.param, r.path, r.cls) for r in rows] == [
        ("a/kernel", "a", "Dense"),
        ("b/kernel", "b", "Dense"),
    ]


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("in", "out"))
        return nn.Dense(8, kernel_init=init, name="fc")(x)


def test_boxed_parameters_have_plain_names():
    assert table(plan_of(Boxed(), X)) == [("fc/kernel", "dense", "Dense", (16, 1))]


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8, name="fc")(x)
        return nn.BatchNorm(use_running_average=not train, name="bn")(x)


def test_state_and_keyword_arguments():
    model = Train()
    variables = model.init(jax.random.key(0), jnp.zeros(X.shape), train=False)
    plan = explain(model, variables, X, train=True, mutable=["batch_stats"])
    assert [r.param for r in plan.rows] == ["fc/kernel", "bn/bias", "bn/scale", "fc/bias"]


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.LinearGeneral(16, (2, 4), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.norm(x))


def test_nnx_lists_and_state():
    model = Mlp(nnx.Rngs(0))
    plan = explain(model, X, recipe="w8a16")
    assert table(plan) == [
        ("layers/0/kernel", "dense", "Linear", (16, 1)),
        ("layers/1/kernel", "dense", "Linear", (16, 1)),
        ("head/kernel", "dense", "LinearGeneral", (16, 1, 1)),
    ]
    assert not {"norm/mean", "norm/var"} & {r.param for r in plan.rows}
    assert type(model) is Mlp


def test_functions_and_recipes_by_name():
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    params = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    assert [r.weight for r in explain(fn, params, X).rows] == ["int8 channel"]
    assert [r.weight for r in explain(fn, params, X, recipe="w4a16").rows] == ["int4 channel mse"]
    decorated = quantize("fp8")(fn)
    assert [r.weight for r in explain(decorated, params, X).rows] == ["float8_e4m3 channel"]
    with pytest.raises(ValueError, match="unknown recipe 'w5'"):
        explain(fn, params, X, recipe="w5")


def test_errors_name_the_parameter():
    with pytest.raises(ValueError, match=r"layers/fc/kernel: groups of 128 .* length 16"):
        plan_of(Scanned(), X, recipe="w4a16_g128")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Dense(4), "Dense is a Linen module: give its variables"),
        (lambda params, x: x, "is a function: give its parameters"),
        (nn.Dense, "Dense is a class: give an instance"),
    ],
)
def test_a_call_without_parameters_says_what_is_missing(model, message):
    with pytest.raises(TypeError, match=message):
        explain(model)
