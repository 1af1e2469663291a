"""The primitives on 8 host devices: partitioned automatically, by explicit types, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.primitives import dequantize, quantized_dot_general
from jaxquant.core.qtensor import QTensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from tests.pallas_kernels import dot_oracle as oracle

MATMUL = (((1,), (0,)), ((), ()))


def _mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def _weight(qtype, act, block):
    w = jax.random.normal(jax.random.key(0), (64, 16))
    return quantize_array(w, qtype, block).replace(act=act)


def _placed(w, mesh, spec):
    """Codes with `spec`; the scale too, where it has more than one element along an axis."""

    def put(part):
        kept = (name if n > 1 else None for name, n in zip(spec, part.shape, strict=True))
        return jax.device_put(part, NamedSharding(mesh, P(*kept)))

    return jax.tree.map(put, w)


CASES = [
    ("int8", ActScheme(), (64, 1)),
    ("int8", None, (64, 1)),
    ("int4", ActScheme(), (16, 1)),
    ("int4", None, (16, 1)),
    ("float8_e4m3", ActScheme("float8_e4m3"), (64, 1)),
]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "specs", [(P("data", None), P(None, "model")), (P("data", "model"), P(None, None))]
)
@pytest.mark.parametrize(("qtype", "act", "block"), CASES, ids=str)
def test_sharded_operands(kind, specs, qtype, act, block):
    mesh = _mesh(kind)
    w = _weight(qtype, act, block)
    x = jax.random.normal(jax.random.key(1), (8, 64))
    fn = jax.jit(lambda x, w: quantized_dot_general(x, w, MATMUL))
    want = np.asarray(fn(x, w), np.float64)
    with jax.set_mesh(mesh):
        placed = _placed(w, mesh, specs[1])
        got = fn(jax.device_put(x, NamedSharding(mesh, specs[0])), placed)
        oracle.assert_close(jax.device_get(got), want)
        if kind is AxisType.Explicit:
            assert jax.typeof(got).sharding.spec == P("data", specs[1][1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradient_keeps_the_sharding_type(kind):
    mesh = _mesh(kind)
    w = _weight("int8", ActScheme(), (64, 1))
    x = jax.random.normal(jax.random.key(1), (8, 64))
    fn = jax.jit(jax.grad(lambda x, w: jnp.sum(quantized_dot_general(x, w, MATMUL) ** 2)))
    want = np.asarray(fn(x, w), np.float64)
    with jax.set_mesh(mesh):
        got = fn(
            jax.device_put(x, NamedSharding(mesh, P("data", None))),
            _placed(w, mesh, P(None, "model")),
        )
        oracle.assert_close(jax.device_get(got), want)
        if kind is AxisType.Explicit:
            assert jax.typeof(got).sharding.spec == P("data", None)


@pytest.mark.parametrize(
    ("qtype", "block"), [("int4", (16, 1)), ("nvfp4", (16, 1)), ("int3", (64, 1))], ids=str
)
def test_the_method_dequantize_keeps_the_sharding_type(qtype, block):
    mesh = _mesh(AxisType.Explicit)
    w = _weight(qtype, None, block)
    for spec in (P("data", "model"), P("model", None)):
        placed = _placed(w, mesh, spec)
        for run in (QTensor.dequantize, jax.jit(QTensor.dequantize)):
            with jax.set_mesh(mesh):
                got = run(placed)
            assert jax.typeof(got).sharding.spec == spec
            np.testing.assert_array_equal(got, w.dequantize())


def test_explicit_out_sharding():
    mesh = _mesh(AxisType.Explicit)
    w = _weight("int8", None, (64, 1))
    x = jax.random.normal(jax.random.key(1), (8, 64))
    want = np.asarray(quantized_dot_general(x, w, MATMUL), np.float64)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        w = _placed(w, mesh, P("model", None))
        fn = functools.partial(quantized_dot_general, dimension_numbers=MATMUL)
        with pytest.raises(Exception, match="out_sharding") as error:
            fn(x, w)
        assert type(error.value).__name__ == "ShardingTypeError"  # JAX does not export it
        got = jax.jit(functools.partial(fn, out_sharding=P("data", "model")))(x, w)
        assert jax.typeof(got).sharding.spec == P("data", "model")
        oracle.assert_close(jax.device_get(got), want)


@pytest.mark.parametrize(("qtype", "act", "block"), CASES, ids=str)
def test_shard_map(qtype, act, block):
    mesh = _mesh(AxisType.Auto)
    w = _weight(qtype, act, block)
    x = jax.random.normal(jax.random.key(1), (8, 64))

    def local(x, w):
        return quantized_dot_general(x, w, MATMUL)

    columns = jax.tree.map(lambda leaf: P(None, "model"), w)
    fn = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data", None), columns), out_specs=P("data", "model")
    )
    got, grad = jax.jit(lambda x, w: (fn(x, w), jax.grad(lambda x: fn(x, w).sum())(x)))(x, w)
    want = functools.partial(quantized_dot_general, w=w, dimension_numbers=MATMUL)
    oracle.assert_close(jax.device_get(got), np.asarray(want(x), np.float64))
    float_grad = np.broadcast_to(np.asarray(w.dequantize(), np.float64).sum(1), x.shape)
    oracle.assert_close(jax.device_get(grad), float_grad)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_partly_manual_shard_map(kind):
    mesh = _mesh(kind)
    w = _weight("int8", ActScheme(), (64, 1))
    x = jax.random.normal(jax.random.key(1), (8, 64))
    want = np.asarray(quantized_dot_general(x, w, MATMUL), np.float64)
    with jax.set_mesh(mesh):
        fn = jax.shard_map(
            lambda x, w: quantized_dot_general(x, w, MATMUL),
            in_specs=(P("data", None), jax.tree.map(lambda leaf: P(), w)),
            out_specs=P("data", None),
            axis_names={"data"},
        )
        x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        got = jax.jit(fn)(x, _placed(w, mesh, P(None, "model")))
        oracle.assert_close(jax.device_get(got), want)


def test_dequantize_keeps_the_sharding_type():
    mesh = _mesh(AxisType.Explicit)
    w = _weight("int4", None, (16, 1))
    with jax.set_mesh(mesh):
        got = jax.jit(dequantize)(_placed(w, mesh, P(None, "model")))
        assert jax.typeof(got).sharding.spec == P(None, "model")
        oracle.assert_close(jax.device_get(got), np.asarray(w.dequantize(), np.float64))
