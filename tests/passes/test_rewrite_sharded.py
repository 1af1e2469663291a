"""Quantized execution on 8 host devices: automatic and explicit meshes, shard_map, scans."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.core import placement
from jaxquant.core.qtensor import make_qtensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.frontends.function import transform
from tests.passes.test_survives import equations
from tests.passes.zoo import quantize_axes

X = jax.random.normal(jax.random.key(1), (8, 32))
W = jax.random.normal(jax.random.key(0), (32, 16)) / 4


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("d", "t"), axis_types=(kind, kind))


def grouped(w, group):
    k, n = w.shape
    blocks = w.reshape(k // group, group, n)
    scale = jnp.max(jnp.abs(blocks), axis=1) / 7
    codes = jnp.round(blocks / scale[:, None]).reshape(k, n).astype(jnp.int4)
    return make_qtensor(codes, scale, qtype="int4")


def place(q, mesh, spec):
    return jax.device_put(q, placement.part_shardings(q, NamedSharding(mesh, spec)))


WEIGHTS = {"channel": quantize_axes(W, (0,)), "group": grouped(W, 4), "coarse": grouped(W, 16)}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("spec", [P(None, "t"), P("t", None), P("d", "t")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_column_and_row_parallel(kind, spec, weight):
    mesh, q = mesh_of(kind), WEIGHTS[weight]
    x_spec = P(None, spec[0])

    def fn(p, x):
        if kind is AxisType.Explicit:
            return jnp.einsum("mk,kn->mn", x, p["w"], out_sharding=P(None, spec[1]))
        return jnp.tanh(x @ p["w"])

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, x_spec))
        params = {"w": place(q, mesh, spec)}
        out = jax.jit(transform(fn))(params, x)
        eager = transform(fn)(params, x)
    expected = X @ q.dequantize()
    expected = expected if kind is AxisType.Explicit else jnp.tanh(expected)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(eager, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("split", ["columns", "rows"])
def test_inside_shard_map(split, weight):
    """Row-parallel shards split the groups, or repeat scales that cover several shards."""
    mesh, q = mesh_of(AxisType.Auto), WEIGHTS[weight]
    w_spec, x_spec = (P(None, "d"), P()) if split == "columns" else (P("d", None), P(None, "d"))

    def local(w, x):
        y = x @ w
        return jax.lax.psum(y, "d") if split == "rows" else y

    out_spec = P(None, "d") if split == "columns" else P()

    def fn(p, x):
        return jax.shard_map(local, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=out_spec)(
            p["w"], x
        )

    events = []
    quantized = transform(fn, on_event=events.append)
    np.testing.assert_allclose(
        jax.jit(quantized)({"w": q}, X), X @ q.dequantize(), rtol=1e-4, atol=1e-4
    )
    assert [e.action for e in events] == ["quantized"]
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(quantized({"w": q}, x))))(X)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ q.dequantize())))(X)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)


def gathering(mesh, axis, check_vma=True, **options):
    """x[rows over "d"] times a weight that lies over "d" and is gathered for the product."""
    w_spec = P(*[None] * axis, "d")

    def local(w, x):
        return x @ jax.lax.all_gather(w, "d", axis=axis, **{"tiled": True, **options})

    return lambda p, x: jax.shard_map(
        local, mesh=mesh, in_specs=(w_spec, P("d")), out_specs=P("d"), check_vma=check_vma
    )(p["w"], x)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_gathered_weight_travels_as_codes(weight, axis, check_vma):
    """As fully sharded data parallelism gathers it; scales that all devices have stay at home."""
    mesh, q = mesh_of(AxisType.Auto), WEIGHTS[weight]
    quantized = transform(gathering(mesh, axis, check_vma), strict=True)
    np.testing.assert_allclose(
        jax.jit(quantized)({"w": q}, X), X @ q.dequantize(), rtol=1e-5, atol=1e-5
    )
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(quantized({"w": q}, x))))(X)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ q.dequantize())))(X)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)
    gathered = {
        eqn.outvars[0].aval.dtype.name: eqn.outvars[0].aval.shape
        for eqn in equations(jax.make_jaxpr(quantized)({"w": q}, X).jaxpr)
        if eqn.primitive.name == "all_gather"
    }
    codes = q.codes.dtype.name
    assert gathered.pop(codes) == (32, 16)
    at_home = check_vma and axis == 0 and weight == "channel"
    rows = {"channel": 1, "group": 8, "coarse": 2}[weight]
    if axis == 0:  # a piece of 8 rows has whole groups of its own
        rows = {"channel": 4, "group": 8, "coarse": 4}[weight]
    assert gathered == ({} if at_home else {"float32": (rows, 16)})


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_gathered_weight_with_a_static_input_scale(check_vma):
    """Calibration reaches it; without types the scale might differ between devices."""
    gathered = jq.quantize("w8a8_static")(gathering(mesh_of(AxisType.Auto), 0, check_vma))
    plain = jq.quantize("w8a8_static")(lambda p, x: x @ p["w"])
    params = jq.ptq(gathered, {"w": W}, calibration=[X])
    expected = jq.ptq(plain, {"w": W}, calibration=[X])
    np.testing.assert_array_equal(params["w"].input_scale, expected["w"].input_scale)
    if check_vma:
        np.testing.assert_array_equal(gathered(params, X), plain(expected, X))
    else:
        (row,) = jq.explain(gathered, params, X).rows
        assert "check_vma=True" in row.reason
        floats = X @ params["w"].dequantize()
        np.testing.assert_allclose(gathered(params, X), floats, rtol=1e-5, atol=1e-5)


def test_a_packed_weight_travels_packed_but_for_its_packed_axis():
    mesh = mesh_of(AxisType.Auto)
    q = quantize_array(W, "int2", (16, 1), packed_axis=0)
    for axis, sizes in ((0, (32, 16)), (1, q.codes.shape)):
        quantized = transform(gathering(mesh, axis), strict=True)
        np.testing.assert_allclose(
            jax.jit(quantized)({"w": q}, X), X @ q.dequantize(), rtol=1e-5, atol=1e-5
        )
        shapes = [
            eqn.outvars[0].aval.shape
            for eqn in equations(jax.make_jaxpr(quantized)({"w": q}, X).jaxpr)
            if eqn.primitive.name == "all_gather"
        ]
        assert sizes in shapes


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda mesh: gathering(mesh, 0, tiled=False), "new axis"),
        (lambda mesh: gathering(mesh, 0, axis_index_groups=[[0, 1], [2, 3]]), "axis_index_groups"),
    ],
)
def test_other_ways_of_gathering_dequantize_and_say_so(fn, reason):
    mesh, q, events = mesh_of(AxisType.Auto), WEIGHTS["channel"], []
    f = fn(mesh)
    x = X[:, :8] if reason == "new axis" else X[:, :16]
    out = transform(f, on_event=events.append)({"w": q}, x)
    np.testing.assert_allclose(out, f({"w": q.dequantize()}, x), rtol=1e-5, atol=1e-5)
    (event,) = (e for e in events if e.action == "dequantized")
    assert reason in event.reason


def test_sharding_constraint_on_a_weight_inside():
    mesh, q = mesh_of(AxisType.Auto), WEIGHTS["channel"]

    def fn(p, x):
        w = jax.lax.with_sharding_constraint(p["w"], NamedSharding(mesh, P("d", "t")))
        return x @ w

    out = jax.jit(transform(fn, strict=True))({"w": q}, X)
    np.testing.assert_allclose(out, X @ q.dequantize(), rtol=1e-4, atol=1e-4)


def test_scan_over_sharded_stacked_layers():
    mesh = mesh_of(AxisType.Auto)
    stack = jax.random.normal(jax.random.key(5), (3, 32, 32)) / 6
    q = quantize_axes(stack, (1,))

    def fn(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    expected = fn({"w": q.dequantize()}, X)
    params = {"w": place(q, mesh, P(None, None, "t"))}
    x = jax.device_put(X, NamedSharding(mesh, P("d")))
    np.testing.assert_allclose(jax.jit(transform(fn))(params, x), expected, rtol=1e-4, atol=1e-4)
