"""The plan of a program on several devices says what its lowering does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.core.placement import part_shardings
from jaxquant.core.qtensor import is_qtensor
from tests.core.primitives.spmd_world import AUTO, EXPLICIT, close, kernels_on_cpu, mesh_of

X = jax.random.normal(jax.random.key(0), (8, 64))
PARAMS = {
    "q": jax.random.normal(jax.random.key(1), (64, 32)) / 8,
    "k": jax.random.normal(jax.random.key(2), (64, 32)) / 8,
    "up": jax.random.normal(jax.random.key(3), (3, 32, 64)) / 6,
    "down": jax.random.normal(jax.random.key(4), (3, 64, 32)) / 8,
}
SPECS = {
    "q": P(None, "model"),
    "k": P(None, "model"),
    "up": P(None, None, "model"),
    "down": P(None, "model", None),
}


def net(p, x, rows=None):
    """`rows`: on an explicit mesh, how what is between the layers is split."""
    h = (x @ p["q"]) * (x @ p["k"])
    if rows is not None:
        h = jax.sharding.reshard(h, rows)

    def layer(h, w):
        inner, dims = jnp.tanh(h @ w[0]), (((1,), (0,)), ((), ()))
        return h + jax.lax.dot_general(inner, w[1], dims, out_sharding=rows), None

    return jax.lax.scan(layer, h, (p["up"], p["down"]))[0]


@pytest.fixture
def problems(monkeypatch):
    yield kernels_on_cpu(monkeypatch)
    jax.clear_caches()


@pytest.fixture(scope="module")
def quantized():
    return jq.ptq(jq.quantize("w4a16_g32")(net), PARAMS, X)


def placed(quantized, mesh):
    def put(path, w):
        return jax.device_put(w, part_shardings(w, NamedSharding(mesh, SPECS[path[0].key])))

    return jax.tree_util.tree_map_with_path(put, quantized, is_leaf=is_qtensor)


def floats(quantized):
    return net(jq.dequantize(quantized), X)


@pytest.mark.parametrize("how", ["compile", "eager", "jit", "grad"])
def test_recorded_on_an_automatic_mesh(problems, quantized, how):
    mesh, want = mesh_of(AUTO), floats(quantized)
    weights = jq.with_shardings(placed(quantized, mesh), batch_axes="data")
    x = jax.device_put(X, NamedSharding(mesh, P("data", None)))
    decorated = jq.quantize()(net)
    if how == "compile":
        compiled = jq.compile(net, weights, x)
        lowerings = compiled.program.facts["lowerings"]
        assert {one.implementation for one in lowerings} == {"a matmul on cpu"}
        reasons = " ".join(one.reason for one in lowerings)
        assert "64x8 of the weight on each device" in reasons
        assert "16x32 of the weight on each device, results summed over model" in reasons
        got = compiled(weights, x)
    elif how == "grad":
        got = jax.jit(jax.grad(lambda x: decorated(weights, x).sum()))(x)
        want = jax.grad(lambda x: net(jq.dequantize(quantized), x).sum())(X)
    else:
        got = (jax.jit(decorated) if how == "jit" else decorated)(weights, x)
    close(got, want, rtol=1e-4)
    forward = {(4, 64, 8), (4, 32, 16), (4, 16, 32)}
    assert forward <= {(p.m, p.k, p.n) for p in problems}


def test_explicit_types_say_it_alone(problems, quantized):
    mesh = mesh_of(EXPLICIT)
    want = floats(quantized)
    with jax.set_mesh(mesh):
        weights = placed(quantized, mesh)
        x = jax.device_put(X, NamedSharding(mesh, P("data", None)))
        whole = functools.partial(net, rows=P("data", None))
        compiled = jq.compile(whole, weights, x)
        names = {one.implementation for one in compiled.program.facts["lowerings"]}
        assert names == {"a matmul on cpu"}
        got = compiled(weights, x)
    close(got, want, rtol=1e-4)
    assert {(4, 64, 8), (4, 32, 16), (4, 16, 32)} <= {(p.m, p.k, p.n) for p in problems}


def test_without_a_record_the_plan_says_what_to_do(problems, quantized):
    mesh = mesh_of(AUTO)
    compiled = jq.compile(net, placed(quantized, mesh), X)
    for one in compiled.program.facts["lowerings"]:
        assert one.implementation.startswith("xla: ")
        assert "8 devices share the program" in one.reason
        assert "jaxquant.with_shardings" in one.reason
    close(compiled(placed(quantized, mesh), X), floats(quantized), rtol=1e-4)
    assert problems == []


def test_shapes_alone(problems, quantized):
    mesh = mesh_of(AUTO)
    weights = jq.with_shardings(placed(quantized, mesh), batch_axes=("data",))
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights
    )
    compiled = jq.compile(net, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert {o.implementation for o in compiled.program.facts["lowerings"]} == {"a matmul on cpu"}
    again = jq.with_shardings(shapes, batch_axes="data")
    assert jax.tree.structure(again) == jax.tree.structure(weights)


def test_with_shardings_refuses_what_it_cannot_see(quantized):
    mesh = mesh_of(AUTO)
    weights = placed(quantized, mesh)
    with pytest.raises(ValueError, match="batch_axes has 'expert', but '.*' lies on a mesh with"):
        jq.with_shardings(weights, batch_axes=("data", "expert"))
    with pytest.raises(TypeError, match="is being traced"):
        jax.jit(jq.with_shardings)(weights)
    alone = jq.with_shardings(quantized)
    assert jax.tree.structure(alone) == jax.tree.structure(quantized)
    np.testing.assert_array_equal(alone["q"].codes, quantized["q"].codes)
