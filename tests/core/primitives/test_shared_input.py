"""quantize_activation and quantized_dots: bit-equal to products that quantize for themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core import _compat
from jaxquant.core.primitives import quantize_activation, quantized_dot_general
from jaxquant.core.primitives.dot import bind_dot
from jaxquant.core.primitives.dots import bind_dots
from jaxquant.core.primitives.weights import act_quant
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.remat_policy import as_dot_policy
from jaxquant.core.schemes import ActScheme
from tests.core.primitives.test_dot import primitives_in

MATMUL = (((1,), (0,)), ((), ()))
ACTS = [
    ActScheme(),
    ActScheme(granularity="tensor"),
    ActScheme("float8_e4m3"),
    ActScheme(mode="static"),
    ActScheme("int4"),
]
X = jax.random.normal(jax.random.key(0), (6, 32))
OPTIONS = {
    "dimension_numbers": MATMUL,
    "weight_side": "rhs",
    "precision": None,
    "preferred_element_type": None,
}


def weights(act=None, qtype="int8", block=(32, 1), shapes=((32, 8), (32, 4), (32, 8))):
    out = []
    for i, shape in enumerate(shapes):
        w = quantize_array(jax.random.normal(jax.random.key(i), shape), qtype, block)
        if act is not None and act.mode == "static":
            w = w.replace(input_scale=jnp.full((1, 1), 0.02))
        out.append(w.replace(act=act))
    return out


def apart(x, ws):
    """Each product quantizes its input itself."""
    return [quantized_dot_general(x, w, MATMUL) for w in ws]


def _codes(x, ws):
    if ws[0].act is None:
        return None, ()
    act = act_quant(ws[0].act, 2, (1,))
    static = ws[0].input_scale if act.static else None
    return act, quantize_activation(x, act, static_scale=static)


def shared(x, ws):
    """One quantization, a product for each weight."""
    act, codes = _codes(x, ws)
    return [bind_dot(x, w, act=act, quantized_x=codes, out_sharding=None, **OPTIONS) for w in ws]


def fused(x, ws, out_shardings=None):
    """One quantization, one equation."""
    act, codes = _codes(x, ws)
    out_shardings = out_shardings or [None] * len(ws)
    return bind_dots(x, ws, act=act, quantized_x=codes, out_shardings=out_shardings, **OPTIONS)


FORMS = pytest.mark.parametrize("form", [shared, fused])


def same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@FORMS
@pytest.mark.parametrize("act", [None, *ACTS], ids=str)
@pytest.mark.parametrize("block", [(32, 1), (8, 1)], ids=str)
def test_values_and_gradients(form, act, block):
    ws = weights(act, "float8_e4m3" if act and "float8" in act.qtype else "int8", block)

    def loss(fn):
        return lambda x: sum(jnp.sum(jnp.sin(y)) for y in fn(x, ws))

    same(jax.jit(form)(X, ws), jax.jit(apart)(X, ws))
    same(jax.jit(jax.grad(loss(form)))(X), jax.jit(jax.grad(loss(apart)))(X))
    same(jax.jvp(lambda x: form(x, ws), (X,), (X,)), jax.jvp(lambda x: apart(x, ws), (X,), (X,)))


def test_backward_of_siblings_is_quantized():
    ws = weights(ACTS[0])
    names = primitives_in(jax.make_jaxpr(jax.grad(lambda x: fused(x, ws)[0].sum()))(X).jaxpr)
    assert names.count("quantized_dots") == 1
    assert names.count("quantize_activation") == 1
    assert "dot_general" not in names
    # Two of the three cotangents are zero: only the first product is transposed.
    assert names.count("quantized_dot_general") == 1


@FORMS
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_vmap(form, act):
    ws, stack = weights(act, "int8"), jnp.stack([X, 2 * X, X - 1])
    layers = [jax.tree.map(lambda *p: jnp.stack(p), w, w.replace(scale=2 * w.scale)) for w in ws]
    same(*(jax.vmap(fn, (1, None), 1)(stack.swapaxes(0, 1), ws) for fn in (form, apart)))
    same(*(jax.vmap(fn, (None, 0))(X, layers) for fn in (form, apart)))
    same(*(jax.vmap(fn)(stack[:2], layers) for fn in (form, apart)))
    mixed = [layers[0], *ws[1:]]  # one of the weights only
    same(*(jax.vmap(fn, (None, [0, None, None]))(X, mixed) for fn in (form, apart)))
    for i, rows in enumerate(jax.vmap(form, (0, None))(stack, ws)[0]):
        np.testing.assert_allclose(rows, apart(stack[i], ws)[0], rtol=1e-6)


def test_vmap_over_a_given_scale_only():
    act = act_quant(ACTS[3], 2, (1,))
    scales = jnp.array([0.01, 0.02]).reshape(2, 1, 1)
    codes, scale = jax.vmap(lambda s: quantize_activation(X, act, static_scale=s))(scales)
    for i in range(2):
        same((codes[i], scale[i]), quantize_activation(X, act, static_scale=scales[i]))


@FORMS
def test_remat_scan_and_policies(form):
    square = weights(ACTS[0], shapes=[(32, 32)] * 3)
    layers = jax.tree.map(lambda part: jnp.stack([part, part]), square)

    def model(fn, policy):
        step = jax.checkpoint(lambda x, ws: sum(map(jnp.tanh, fn(x, ws))), policy=policy)
        return lambda x: jax.lax.scan(lambda c, ws: (step(c, ws), None), x, layers)[0].sum()

    dots = as_dot_policy(jax.checkpoint_policies.dots_saveable)
    for policy in (None, dots):
        got, want = (jax.jit(jax.value_and_grad(model(fn, policy)))(X) for fn in (form, apart))
        same(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)
    # Saved dots are not computed again in the backward pass, and nothing is quantized again.
    grad = jax.make_jaxpr(jax.grad(model(form, dots)))(X).jaxpr
    assert primitives_in(grad).count("quantize_activation") == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(None, "t"), P("t", None), P("d", "t")])
def test_sharded(kind, spec):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind, kind))
    ws = weights(ACTS[0])
    want = jax.jit(apart)(jnp.tile(X, (4, 1)), ws)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.tile(X, (4, 1)), NamedSharding(mesh, P(None, spec[0])))
        codes = NamedSharding(mesh, spec)
        scales = NamedSharding(mesh, P(None, spec[1]))
        placed = [
            w.replace(codes=jax.device_put(w.codes, codes), scale=jax.device_put(w.scale, scales))
            for w in ws
        ]
        out = None
        if kind is AxisType.Explicit:
            out = _compat.canonical_out_sharding(NamedSharding(mesh, P(None, spec[1])), "test")
        got = jax.jit(lambda x, ws: fused(x, ws, [out] * 3))(x, placed)
        if kind is AxisType.Explicit:
            assert all(jax.typeof(y).sharding.spec == P(None, spec[1]) for y in got)
            act = act_quant(ACTS[0], 2, (1,))
            types = jax.eval_shape(lambda x: quantize_activation(x, act), x)
            assert [t.sharding.spec for t in types] == [P(None, spec[0]), P(None, None)]
    for a, b in zip(got, want, strict=True):  # the sum over a split axis is of whole numbers
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    ws, x = weights(ACTS[3]), jnp.tile(X, (4, 1))

    def local(fn):
        return jax.shard_map(
            lambda x, ws: list(fn(x, ws)), mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")
        )

    same(jax.jit(local(fused))(x, ws), jax.jit(apart)(x, ws))

    def loss(fn):
        return lambda x: sum(jnp.sum(jnp.sin(y)) for y in fn(x, ws))

    same(jax.jit(jax.grad(loss(local(fused))))(x), jax.jit(jax.grad(loss(apart)))(x))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_other_platforms(platform):
    fn = jax.jit(jax.grad(lambda x: sum(jnp.sum(y**2) for y in fused(x, weights(ACTS[0])))))
    text = fn.trace(X).lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text


def test_the_float_input_is_dead_in_the_forward_pass():
    ws, act = weights(ACTS[0]), act_quant(ACTS[0], 2, (1,))
    codes = quantize_activation(X, act)
    nonsense = jnp.full_like(X, jnp.nan)
    got = bind_dots(nonsense, ws, act=act, quantized_x=codes, out_shardings=[None] * 3, **OPTIONS)
    same(got, apart(X, ws))


def test_errors():
    ws, act = weights(ACTS[0]), act_quant(ACTS[0], 2, (1,))
    codes, scale = quantize_activation(X, act)
    bind = lambda x, **o: bind_dot(x, ws[0], out_sharding=None, **{**OPTIONS, **o})  # noqa: E731
    with pytest.raises(TypeError, match=r"codes int8\[6, 32\] are not those of x \[3, 32\]"):
        bind(X[:3], act=act, quantized_x=(codes, scale))
    with pytest.raises(TypeError, match=r"scale \[6, 32\] is not one of x"):
        bind(X, act=act, quantized_x=(codes, jnp.tile(scale, (1, 32))))
    with pytest.raises(TypeError, match="x_quantized needs act"):
        bind(X, act=None, quantized_x=(codes, scale))
    with pytest.raises(TypeError, match="needs the codes and scale of x"):
        bind_dots(X, ws, act=act, out_shardings=[None] * 3, **OPTIONS)
    with pytest.raises(ValueError, match="static schemes need one"):
        quantize_activation(X, dataclasses.replace(act, static=True))
    given = lambda s: quantize_activation(X, static, static_scale=s)[1].sum()  # noqa: E731
    static = dataclasses.replace(act, static=True)
    with pytest.raises(TypeError, match=r"static_scale \(3, 1\) does not broadcast against x"):
        given(jnp.ones((3, 1)))
    with pytest.raises(TypeError, match="gradient with respect to a static scale"):
        jax.grad(given)(jnp.ones((1, 1)))
