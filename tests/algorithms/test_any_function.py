"""Any JAX function: other libraries' models, loops, opaque calls; plans and values of each.

Every case goes the way of a user: explain, ptq, call. Values are compared with the float function
on dequantized weights, and the plan's rows with what is written here by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxquant as jq
from jaxquant.core.qtensor import is_qtensor
from jaxquant.passes.plan import Plan
from tests.passes.random_programs import primitives_of

KEY = jax.random.key(0)


def random(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


def dequantized(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.dequantize() if is_qtensor(x) else x, tree, is_leaf=is_qtensor)


def close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    def compare(got, want):
        size = np.max(np.abs(want), initial=1e-6)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * size)

    jax.tree.map(compare, got, want)


@dataclasses.dataclass
class Run:
    """A quantized function: its tree, plan and the primitives of its program."""

    fn: Callable[..., Any]
    tree: Any
    plan: Plan
    primitives: list[str]

    @property
    def rows(self) -> dict[str, list[tuple[str, str]]]:
        """Kind and status of every row by parameter; products of activations are under ""."""
        found: dict[str, list[tuple[str, str]]] = {}
        for row in self.plan.rows:
            found.setdefault(row.param or "", []).append((row.kind, row.status))
        return found

    def reason(self, param: str) -> str:
        return "; ".join(row.reason for row in self.plan.where(param=param))


def quantized(fn: Callable[..., Any], params: Any, *args: Any, recipe: Any = "w8a16") -> Run:
    """Quantizes, and compares with the float function on what the weights stand for."""
    decorated = jq.quantize(recipe)(fn)
    plan = jq.explain(decorated, params, *args)
    tree = jq.ptq(decorated, params, *args, progress=False)
    floats = dequantized(tree)
    close(decorated(tree, *args), jax.jit(lambda args: fn(floats, *args))(args))
    names = primitives_of(jax.make_jaxpr(lambda args: decorated(tree, *args))(args))
    assert any(name.startswith("quantized_") for name in names)
    told = [row.param for row in plan.rows if row.status == "dequantized"]
    assert ("dequantize" in names) == bool(told or "embed" in {row.kind for row in plan.rows})
    return Run(decorated, tree, plan, names)


DOT = [("dot", "quantized")]
FLOAT = [("other", "float")]


# --- other libraries -----------------------------------------------------------------------------


class EquinoxModel(eqx.Module):
    conv: eqx.nn.Conv2d
    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    cell: eqx.nn.GRUCell
    head: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.conv = eqx.nn.Conv2d(1, 8, 3, key=keys[0])
        self.embed = eqx.nn.Embedding(10, 8, key=keys[1])
        self.norm = eqx.nn.LayerNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[2])
        self.cell = eqx.nn.GRUCell(8, 8, key=keys[3])
        self.head = eqx.nn.MLP(8, 4, 16, 1, activation=jax.nn.gelu, key=keys[4])

    def __call__(self, image, ids):
        seen = self.conv(image).reshape(8, -1).T
        h = jax.vmap(self.norm)(jax.vmap(self.embed)(ids))
        h = h + self.attention(h, seen, seen)
        state, _ = lax.scan(lambda c, t: (self.cell(t, c), None), jnp.zeros(8), h)
        return self.head(state)


def test_equinox():
    """The module itself is the tree of parameters; its functions and sizes are static leaves."""
    model = EquinoxModel(KEY)
    images, ids = random(1, 2, 1, 5, 5), jnp.array([[1, 2, 3], [4, 5, 6]])
    run = quantized(lambda m, image, ids: jax.vmap(m)(image, ids), model, images, ids)
    assert isinstance(run.tree, EquinoxModel)
    rows = run.rows
    assert rows["conv/weight"] == [("conv", "quantized")]
    assert rows["embed/weight"] == [("embed", "quantized")]
    for name in ("query", "key", "value", "output"):
        assert rows[f"attention/{name}_proj/weight"] == DOT
    for name in ("cell/weight_ih", "cell/weight_hh", "head/layers/0/weight"):
        assert rows[name] == DOT
    assert rows["norm/weight"] == rows["cell/bias"] == rows["conv/bias"] == FLOAT
    assert rows[""] == [("dot", "float")] * 2  # scores and mixing
    assert "dot_general" in run.primitives
    np.testing.assert_array_equal(run.tree.norm.weight, model.norm.weight)


def test_haiku():
    def net(x, ids):
        h = hk.LayerNorm(-1, True, True)(x + hk.Embed(10, 8)(ids))
        h = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(h, h, h)
        core = hk.GRU(8)
        h, _ = hk.dynamic_unroll(core, h, core.initial_state(x.shape[1]))
        return hk.nets.MLP([16, 4])(hk.Conv1D(6, 3)(h))

    model = hk.without_apply_rng(hk.transform(net))
    x, ids = random(1, 3, 2, 8), jnp.array([[1, 2], [3, 4], [5, 6]])
    params = model.init(KEY, x, ids)
    run = quantized(model.apply, params, x, ids)
    rows = run.rows
    assert rows["embed/embeddings"] == [("embed", "quantized")]
    assert rows["multi_head_attention/query/w"] == rows["gru/w_i"] == DOT
    assert rows["mlp/~/linear_0/w"] == rows["mlp/~/linear_1/w"] == DOT
    assert rows["gru/w_h"] == 2 * DOT  # its gates and its candidate, cut out of one kernel
    assert rows["conv1_d/w"] == [("conv", "quantized")]
    assert rows["layer_norm/scale"] == rows["gru/b"] == FLOAT


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + nnx.gelu(self.linear(self.norm(x)))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def layers(x, block):
            return block(x)

        return self.head(layers(x, self.blocks))


def test_nnx_scan():
    """Every layer has scales of its own, and the scan stays one."""
    model, x = Stacked(nnx.Rngs(0)), random(1, 5, 8)
    decorated = jq.quantize("w8a16")(model)
    plan = jq.explain(decorated, x)
    small = jq.ptq(decorated, x, progress=False)
    kernel = small.blocks.linear.kernel.get_value()
    assert (kernel.shape, kernel.scale.shape) == ((3, 8, 8), (3, 1, 8))
    (row,) = plan.where(param="blocks/linear/kernel")
    assert (row.kind, row.status, row.cls) == ("dense", "quantized", "Linear")
    graph, state = nnx.split(model)
    paths = {"linear": kernel, "head": small.head.kernel.get_value()}
    state["blocks"]["linear"]["kernel"].set_value(paths["linear"].dequantize())
    state["head"]["kernel"].set_value(paths["head"].dequantize())
    close(small(x), nnx.merge(graph, state)(x))
    names = primitives_of(jax.make_jaxpr(small)(x))
    assert names.count("scan") == 1
    assert names.count("quantized_dot_general") == 2


# --- hand-written --------------------------------------------------------------------------------


def test_a_function_of_nested_containers():
    def fn(p, ids, *, scale=2.0, name="unused"):
        h = p["table"][ids] * scale
        for w, b in p["layers"]:
            h = jax.nn.relu(h @ w + b)
        return {"logits": h @ p["table"].T, "name": name}

    layers = [(random(i, 8, 8), random(i, 8)) for i in (1, 2)]
    params = {"table": random(0, 12, 8), "layers": layers}
    decorated = jq.quantize("w8a16")(fn)
    ids = jnp.array([3, 1, 4])
    plan = jq.explain(decorated, params, ids, scale=0.5, name="net")
    tree = jq.ptq(decorated, params, ids, scale=0.5, name="net", progress=False)
    out = decorated(tree, ids, scale=0.5, name="net")
    close(out["logits"], fn(dequantized(tree), ids, scale=0.5)["logits"])
    assert out["name"] == "net"
    kinds = [(r.param, r.kind, r.status) for r in plan.rows]
    assert kinds[:2] == [("table", "embed", "quantized"), ("layers/0/0", "dot", "quantized")]
    assert ("table", "attend", "quantized") in kinds


def exported(w_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> Callable[..., Any]:
    """An opaque program: what it does with its weight cannot be seen."""
    args = jax.ShapeDtypeStruct(w_shape, "float32"), jax.ShapeDtypeStruct(x_shape, "float32")
    return jax.export.export(jax.jit(lambda w, x: jnp.tanh(x @ w)))(*args).call


def test_an_exported_program_is_opaque():
    call, x = exported((8, 8), (5, 8)), random(1, 5, 8)
    params = {"inside": random(2, 8, 8), "outside": random(3, 8, 8), "both": random(4, 8, 8)}

    def fn(p, x):
        return call(p["both"], call(p["inside"], x) @ p["outside"]) @ p["both"]

    run = quantized(fn, params, x)
    rows = run.rows
    assert rows["inside"] == FLOAT
    assert "is used by call_exported" in run.reason("inside")
    assert rows["outside"] == DOT
    assert sorted(rows["both"]) == [("dot", "quantized"), ("other", "dequantized")]
    assert "is used by call_exported" in run.reason("both")
    assert run.primitives.count("call_exported") == 2
    with pytest.raises(jq.StrictError, match="both.*call_exported"):
        jq.ptq(run.fn, params, x, strict=True, progress=False)


def test_linear_algebra_of_a_weight():
    params = {"w": random(0, 8, 8), "v": random(1, 8, 8)}

    def fn(p, x):
        x = x @ (p["w"] / jnp.linalg.norm(p["w"]))
        return x @ p["v"] + jnp.linalg.solve(jnp.eye(8) * 9 + p["v"], x.T).T

    run = quantized(fn, params, random(2, 5, 8))
    assert run.rows["w"] == [("other", "dequantized"), ("dot", "quantized")]
    assert ("dot", "quantized") in run.rows["v"]
    assert [s for _, s in run.rows["v"]].count("dequantized") == 1


# --- derivatives ---------------------------------------------------------------------------------


@jax.custom_vjp
def clipped(w, x):
    return jnp.tanh(x @ w)


def _clipped_fwd(w, x):
    y = clipped(w, x)
    return y, (w, y)


def _clipped_bwd(residuals, g):
    w, y = residuals
    g = jnp.clip(g * (1 - y**2), -0.1, 0.1)
    return jnp.zeros_like(w), g @ w.T


clipped.defvjp(_clipped_fwd, _clipped_bwd)


def test_custom_vjp_layers():
    """The user's backward rule clips, so the gradient is not that of the function."""

    def fn(p, x):
        for w in p["layers"]:
            x = x + clipped(w, x)
        return x @ p["head"]

    params = {"layers": [random(i, 8, 8) for i in range(3)], "head": random(9, 8, 2)}
    x = random(4, 5, 8)
    run = quantized(fn, params, x)
    assert all(run.rows[f"layers/{i}"] == DOT for i in range(3))
    loss = lambda fn, tree: jax.grad(lambda x: jnp.sum(fn(tree, x) ** 2))(x)  # noqa: E731
    close(loss(run.fn, run.tree), loss(fn, dequantized(run.tree)))


@pytest.mark.parametrize("recipe", ["w8a16", "w8a8"])
def test_a_gradient_inside_is_the_gradient_from_outside(recipe):
    """An energy model: its force is a gradient. Cotangents are not rounded."""

    def energy(p, x):
        return jnp.sum(jax.nn.silu(jnp.sin(x @ p["a"]) @ p["b"]) @ p["c"])

    def force(p, x):
        return -jax.grad(lambda x: energy(p, x))(x)

    params = {"a": random(0, 8, 16), "b": random(1, 16, 16), "c": random(2, 16, 1)}
    x = random(3, 5, 8)
    plan = jq.explain(force, params, x, recipe=recipe)
    inside = jq.quantize(recipe)(force)
    outside = jq.quantize(recipe)(energy)
    tree = jq.ptq(inside, params, x, progress=False)
    again = jq.ptq(outside, params, x, progress=False)
    jax.tree.map(np.testing.assert_array_equal, tree, again)
    close(inside(tree, x), -jax.grad(lambda x: outside(tree, x))(x), 1e-5)
    backward = [row for row in plan.where(param="b") if row.lowering != plan.rows[0].lowering]
    assert len(plan.where(param="b")) == 2
    assert [row.act for row in backward] == [""] * len(backward)


# --- loops and branches --------------------------------------------------------------------------


def decode(p, cache, first, steps):
    """Greedy decoding with a KV cache of fixed length, in a while loop."""
    heads = lambda h: h.reshape(len(h), 2, 4)  # noqa: E731

    def step(state):
        i, token, keys, values, tokens = state
        h = p["table"][token]
        q, k, v = (heads(h @ p[name]) for name in ("q", "k", "v"))
        keys = lax.dynamic_update_slice(keys, k[:, None], (0, i, 0, 0))
        values = lax.dynamic_update_slice(values, v[:, None], (0, i, 0, 0))
        scores = jnp.einsum("bhd,bthd->bht", q, keys) / 2
        scores = jnp.where(jnp.arange(keys.shape[1]) <= i, scores, -jnp.inf)
        mixed = jnp.einsum("bht,bthd->bhd", jax.nn.softmax(scores), values)
        h = h + mixed.reshape(h.shape) @ p["o"]
        h = h + jax.nn.gelu(h @ p["up"]) @ p["down"]
        logits = h @ p["table"].T
        token = jnp.argmax(logits, -1)
        return i + 1, token, keys, values, tokens.at[:, i].set(logits.max(-1))

    start = (0, first, cache, cache, jnp.zeros((len(first), steps)))
    return lax.while_loop(lambda s: s[0] < steps, step, start)[4]


def test_decoding_with_a_cache_in_a_while_loop():
    shapes = {"table": (12, 8), "q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8),
              "up": (8, 16), "down": (16, 8)}  # fmt: skip
    params = {name: random(i, *shape) / 3 for i, (name, shape) in enumerate(shapes.items())}
    cache, first = jnp.zeros((2, 6, 2, 4)), jnp.array([1, 5])
    run = quantized(functools.partial(decode, steps=5), params, cache, first)
    rows = run.rows
    assert rows["table"] == [("embed", "quantized"), ("attend", "quantized")]
    assert all(rows[name] == DOT for name in ("q", "k", "v", "o", "up", "down"))
    assert len(rows[""]) == 2
    assert run.primitives.count("while") == 1
    assert run.primitives.count("quantized_dot_general") == 7


def in_fori_loop(p, x):
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x)


def in_map(p, x):
    return lax.map(lambda row: jnp.tanh(row @ p["w"][0]) @ p["w"][1], x)


def in_associative_scan(p, x):
    """A linear recurrence whose coefficients come from a weight."""
    a, b = jax.nn.sigmoid(x @ p["w"][0]), x @ p["w"][1]
    combine = lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1])  # noqa: E731
    return lax.associative_scan(combine, (a, b))[1]


def in_switch(p, x):
    branches = [lambda x, i=i: jnp.tanh(x @ p["w"][i]) for i in range(3)]
    return sum(lax.switch(i, branches, x) for i in (0, 2, jnp.argmax(x[0]) % 3))


def in_nested_jit(p, x):
    @jax.jit
    def inner(w, x):
        for _ in range(10):
            x = jnp.sin(x) + x
        return x @ w

    return jax.jit(lambda p, x: inner(p["w"][2], inner(p["w"][1], x)))(p, x)


def over_experts(p, x):
    """Every token through every expert, weighted."""
    gates = jax.nn.softmax(x @ p["w"][0][:, :3])
    outs = jax.vmap(lambda w: jax.nn.relu(x @ w))(p["w"])
    return jnp.einsum("me,emn->mn", gates, outs)


def through_a_scan_of_scans(p, x):
    def outer(c, w):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, None, length=2)[0], c.sum()

    return lax.scan(outer, x, p["w"])


def as_a_batch_of_models(p, x):
    model = lambda w, x: jnp.tanh(x @ w).sum(0)  # noqa: E731
    return jax.vmap(model, (0, None))(p["w"], x), jax.vmap(model, (None, 0))(p["w"][1], x[:, None])


CONTROL = [in_fori_loop, in_map, in_associative_scan, in_switch, in_nested_jit, over_experts,
           through_a_scan_of_scans, as_a_batch_of_models]  # fmt: skip


@pytest.mark.parametrize("fn", CONTROL, ids=lambda fn: fn.__name__)
def test_control_flow(fn):
    """One parameter of three layers: each layer keeps scales of its own, none is dequantized."""
    run = quantized(fn, {"w": random(0, 3, 8, 8) / 2}, random(1, 8, 8))
    assert {status for _, status in run.rows["w"]} == {"quantized"}
    assert run.tree["w"].scale.shape == (3, 1, 8)
    for loop in ("scan", "while", "cond"):
        before = primitives_of(jax.make_jaxpr(fn)({"w": random(0, 3, 8, 8)}, random(1, 8, 8)))
        assert run.primitives.count(loop) == before.count(loop)
