"""Activations quantized row by row: the codes and scales of `quantize_activation`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Place, choose
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.tpu.quantize_rows import quantize_rows

DTYPES = ["int8", "int4", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (5, 300), (1030, 1024)])
def test_bit_for_bit(shape, dtype, x_dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))
    x[0] = 0  # a row of zeros has codes 0 and a tiny scale
    x = jnp.asarray(x, jnp.dtype(x_dtype))
    got = jax.jit(functools.partial(quantize_rows, dtype=dtype, interpret=True))(x)
    want = jax.jit(quantize_activation, static_argnums=1)(x, ActQuant(dtype, (1,)))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    np.testing.assert_array_equal(got[1], want[1])
    # The quotient may be rounded apart in the two programs: at most one code, and seldom.
    codes = [np.asarray(c.astype(jnp.float32), np.float64) for c in (got[0], want[0])]
    assert (codes[0] != codes[1]).mean() < 1e-4
    values = np.asarray(x.astype(jnp.float32), np.float64)
    step = {"int8": 0.5, "int4": 0.5, "float8_e4m3fn": 16.0, "float8_e5m2": 4096.0}[dtype]
    assert (np.abs(codes[0] * got[1] - values) <= 1.001 * step * np.asarray(got[1])).all()


def test_what_it_takes():
    with pytest.raises(ValueError, match="not 'int2'"):
        quantize_rows(jnp.ones((2, 128)), "int2")


def test_dispatch_puts_it_in_front_of_many_rows():
    axes = DotAxes.make((((1,), (0,)), ((), ())), 2, 2, "rhs")
    place = Place("tpu", "TPU v5 lite")

    def launches(m):
        weight = Weight("int4", (256, 128), (2, 128))
        act, dtype = ActQuant("int8", (1,)), jnp.dtype("bfloat16")
        choice = choose((m, 256), dtype, weight, axes, act, place, out_dtype=dtype)
        shapes = [((m, 256), "bfloat16"), ((256, 128), "int4"), ((2, 128), "float32")]
        avals = [jax.ShapeDtypeStruct(s, jnp.dtype(d)) for s, d in shapes]
        run = functools.partial(choice.run, interpret=True)
        jaxpr = jax.make_jaxpr(lambda x, c, s: run(x, None, c, s, None, None))(*avals)
        return [e.params["name"] for e in jaxpr.eqns if e.primitive.name == "pallas_call"]

    assert [name.split("_")[0] for name in launches(512)] == ["quantize", "int4"]
    assert [name.split("_")[0] for name in launches(16)] == ["int4"]
