"""Rows times the transpose of a weight, as gradients want it: by value, and through dispatch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.quantize_array import quantize_array
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Place, choose
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.transposed import choose_transposed_config, transposed_matmul
from tests.pallas_kernels.tpu import cases

V6E = Place("tpu", "TPU v6 lite")
BACK = (((1,), (1,)), ((), ()))


@settings(max_examples=8)
@given(
    m=st.sampled_from([1, 20, 130, 520]),
    k=st.sampled_from([256, 384, 768]),
    n=st.sampled_from([128, 384, 4352]),
    group=st.sampled_from([32, 64, 128]),
    codes=st.sampled_from(["int4", "int8", "float8_e4m3fn"]),
    zero_point=st.booleans(),
    chip=st.sampled_from(sorted(CHIPS)),
    seed=st.integers(0, 99),
)
def test_by_value(m, k, n, group, codes, zero_point, chip, seed):
    zero_point = zero_point and codes != "float8_e4m3fn"
    problem = MatmulProblem(m, k, n, codes, group=group, zero_point=zero_point, out_dtype="float32")
    config = choose_transposed_config(problem, CHIPS[chip])
    case = cases.make(problem, seed)
    y = jnp.asarray(np.random.default_rng(seed).normal(size=(m, n)), jnp.bfloat16)
    run = functools.partial(transposed_matmul, problem=problem, config=config, interpret=True)
    got = jax.jit(run)(y, *(case.arrays.get(name) for name in ("codes", "scale", "zero_point")))
    rows = np.asarray(y, np.float64)
    own = case._replace(want=rows @ case.weight.T, scale_of_errors=abs(rows) @ abs(case.weight.T))
    cases.assert_close(got, own, config)


def pick(weight, m=24, place=V6E, dims=BACK, **options):
    axes = DotAxes.make(dims, 2, len(weight.shape), "rhs")
    shape = (m, weight.shape[-1])
    return choose(shape, "bfloat16", weight, axes, None, place, out_dtype="float32", **options)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernel_takes_codes_as_they_are_stored(symmetric):
    w = quantize_array(
        jax.random.normal(jax.random.key(0), (256, 384)), "int4", (64, 1), symmetric=symmetric
    )
    choice = pick(Weight("int4", (256, 384), (4, 384), zero_point=not symmetric))
    assert choice.name == "pallas tpu v6e: int4 transposed, scale before the dot"
    y = jax.random.normal(jax.random.key(1), (24, 384), jnp.bfloat16)
    run = functools.partial(choice.run, interpret=True)
    got = jax.jit(run)(y, None, w.codes, w.scale, w.zero_point, None)
    want = np.asarray(y, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    assert got.shape == (24, 256)
    np.testing.assert_allclose(got, want, atol=2.0**-7 * np.abs(want).max())


def test_value_and_gradient_are_a_kernel_each():
    w = quantize_array(jax.random.normal(jax.random.key(0), (256, 384)), "int4", (64, 1))

    def both(x, y):
        out, pull = jax.vjp(lambda x: quantized_dot_general(x, w, (((1,), (0,)), ((), ()))), x)
        return out, pull(y)[0]

    device = jax.sharding.AbstractDevice(device_kind="TPU v6e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    avals = [jax.ShapeDtypeStruct((8, n), jnp.float32) for n in (256, 384)]
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(both).trace(*avals).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2 and "transposed_int4_g64" in text


def test_several_axes_and_scales_shared_by_columns():
    """[2, 128, 3, 128] summed over its last two axes; one scale for all of the last."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-8, 8, (2, 128, 3, 128)), jnp.int4)
    scale = jnp.asarray(rng.uniform(0.5, 2, (2, 4, 3, 1)), jnp.float32)
    weight = Weight("int4", codes.shape, scale.shape)
    axes = DotAxes.make((((1, 2), (2, 3)), ((), ())), 3, 4, "rhs")
    choice = choose((5, 3, 128), "bfloat16", weight, axes, None, V6E, out_dtype="float32")
    y = jnp.asarray(rng.normal(size=(5, 3, 128)), jnp.bfloat16)
    got = jax.jit(functools.partial(choice.run, interpret=True))(y, None, codes, scale, None, None)
    floats = np.asarray(codes, np.float64) * np.repeat(np.asarray(scale, np.float64), 32, 1)
    want = np.einsum("mcd,abcd->mab", np.asarray(y, np.float64), floats)
    np.testing.assert_allclose(got, want, atol=2.0**-7 * np.abs(want).max())


@pytest.mark.parametrize(
    ("weight", "place", "reason"),
    [
        (Weight("int4", (256, 128), (4, 128)), Place("tpu", "TPU v5 lite"), "XLA fuses conversion"),
        (Weight("int4", (256, 96), (4, 96)), V6E, r"n (now 96) in multiples of 128"),
        (Weight("int4", (256, 128), (16, 128)), V6E, "groups (now 16) in multiples of 32"),
        (Weight("int2", (256, 128), (4, 128), packed_axis=0), V6E, "int2 codes transposed"),
        (Weight("table4", (256, 128), (4, 128)), V6E, "table4 codes have no kernel"),
        (Weight("int4", (256, 128), (4, 4)), V6E, "along contracted axis 1 of the weight too"),
        (Weight("int4", (256, 128), (1, 128)), V6E, "not its first"),
    ],
)
def test_why_not(weight, place, reason):
    choice = pick(weight, place=place)
    assert choice.run is None and reason in choice.reason


def test_blocks_that_do_not_divide():
    with pytest.raises(Unsupported, match="do not divide a weight of 512 x 16256"):
        choose_transposed_config(MatmulProblem(16, 512, 127 * 128, "int4", group=512), CHIPS["v6e"])
