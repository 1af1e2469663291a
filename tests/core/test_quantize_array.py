"""Every qtype against float64 on ordinary, degenerate and extreme blocks."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.blocks import check_block_shape, divisors
from jaxquant.core.codes import nearest_code
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType, get_qtype, qtype_names
from jaxquant.core.quantize_array import choose_packed_axis, quantize_array
from jaxquant.core.scales import double_quantize
from tests.core import oracle

INTEGERS = [name for name in qtype_names() if get_qtype(name).kind == "int"]
SCHEMES = [(name, True) for name in qtype_names()] + [(name, False) for name in INTEGERS]


def hard_blocks(dtype=np.float32) -> np.ndarray:
    """Rows of 32: ordinary, zero, denormal, huge, one-sided, constant and with an outlier."""
    rng = np.random.default_rng(0)
    largest = float(ml_dtypes.finfo(dtype).max)
    normal = rng.normal(size=(8, 32))
    rows = [
        *normal,
        np.zeros(32),
        normal[0] * 1e-41,
        normal[1] * 1e-37,
        np.clip(normal[2], -1, 1) * largest,
        np.where(normal[3] > 0, largest, 0.0),
        np.where(normal[3] > 0, largest, -largest / 300),
        np.full(32, -largest),
        -np.abs(normal[4]),
        np.abs(normal[5]) + 5,
        np.full(32, 0.3),
        np.where(np.arange(32) == 7, 1000.0, normal[6]),
        np.where(np.arange(32) == 7, 1.0, 0.0),
    ]
    return np.array(rows).astype(dtype)


def grid_values(qtype: QType, symmetric: bool) -> np.ndarray:
    """All values that codes of the type may take, float64."""
    if qtype.table is not None:
        return np.array(qtype.table)
    if qtype.kind == "int":
        low = -qtype.qmax if symmetric else qtype.qmin
        return np.arange(low, qtype.qmax + 1, qtype.step, dtype=np.float64)
    values = np.arange(256, dtype=np.uint8).view(qtype.storage).astype(np.float64)
    return values[np.isfinite(values)]


def quantize_rows(w: np.ndarray, name: str, symmetric: bool, **options) -> QTensor:
    qtype = get_qtype(name)
    return quantize_array(w, name, (1, qtype.group_size or 32), symmetric=symmetric, **options)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("name", "symmetric"), SCHEMES)
def test_error_bound(name: str, symmetric: bool, dtype) -> None:
    qtype = get_qtype(name)
    w = hard_blocks(dtype)
    q = quantize_rows(w, name, symmetric).validate()
    assert q.dtype == dtype
    assert np.isfinite(np.asarray(q.dequantize(), np.float32)).all()
    exact = w.astype(np.float64)
    read = oracle.dequantize(q, np.float64)
    error = np.abs(read - exact)
    scale = oracle.dequantize(q.scale, np.float64) if name == "nvfp4" else q.scale
    scale = oracle.spread(np.asarray(scale).astype(np.float64), w.shape)
    amax = np.abs(exact).reshape(len(w), -1, q.block_shape[1]).max(-1)
    amax = oracle.spread(amax, w.shape)
    rounding = 1e-6 * amax + 1e-37  # float32 scales; scales are never denormal
    bound = {
        "int": 0.5 * qtype.step * scale,
        "float": np.maximum(np.abs(exact) * (2**-4 if "e4m3" in name else 2**-3), scale * 2**-9),
        "table": 0.1525 * amax if name == "nf4" else scale * np.where(amax > 6 * scale, 2, 1),
    }[qtype.kind]
    if not symmetric:  # both ends near the largest value of the dtype: see scale_from_range
        bound = np.where(np.minimum(exact.max(1), -exact.min(1))[:, None] > 1e38, 2, 1) * bound
    if name == "int1" and symmetric:
        bound = np.abs(np.abs(exact) - scale)
        np.testing.assert_allclose(scale[:8, 0], np.abs(exact[:8]).mean(1), rtol=1e-5)
    assert (error <= bound + rounding).all()
    # No other code would have been nearer.
    zero = 0.0
    if q.zero_point is not None:
        zero = oracle.spread(np.asarray(q.zero_point, np.float64), w.shape)
    least = np.full(w.shape, np.inf)
    for value in grid_values(qtype, symmetric):
        least = np.minimum(least, np.abs((value - zero) * scale - exact))
    assert (error <= least + rounding).all()


@pytest.mark.parametrize(("name", "symmetric"), SCHEMES)
def test_blocks_of_zeros_are_exact(name: str, symmetric: bool) -> None:
    q = quantize_rows(np.zeros((2, 32), np.float32), name, symmetric)
    np.testing.assert_array_equal(q.dequantize(), np.zeros((2, 32)))
    if get_qtype(name).step == 1 and name != "nvfp4":
        np.testing.assert_array_equal(np.asarray(q.scale, np.float32), 1.0)
    if get_qtype(name).step == 1 and name != "nf4":
        np.testing.assert_array_equal(oracle.unpacked_codes(q).astype(np.float32), 0)


@pytest.mark.parametrize("name", INTEGERS)
def test_asymmetric_zero_is_exact(name: str) -> None:
    w = hard_blocks()
    w[:, ::5] = 0
    read = quantize_rows(w, name, symmetric=False).dequantize()
    np.testing.assert_array_equal(np.asarray(read)[:, ::5], 0)


def test_known_values() -> None:
    w = np.array([[-7.0, 3.4, 0.6, 7.0]], np.float32)
    q = quantize_array(w, "int4", (1, 4))
    np.testing.assert_array_equal(np.asarray(q.codes).astype(int), [[-7, 3, 1, 7]])
    q = quantize_array(w + 7, "int4", (1, 4), symmetric=False)  # [0, 14]: scale 14/15
    np.testing.assert_array_equal(np.asarray(q.codes).astype(int), [[-8, 3, 0, 7]])
    assert int(q.zero_point[0, 0]) == -8
    q = quantize_array(w, "int2", (1, 4))  # scale 7/3, values -7, -7/3, 7/3, 7
    np.testing.assert_array_equal(oracle.unpacked_codes(q), [[-3, 1, 1, 3]])
    q = quantize_array(w, "int1", (1, 4))
    np.testing.assert_allclose(q.dequantize(), [[-4.5, 4.5, 4.5, 4.5]])
    q = quantize_array(np.array([[0.0, 5.0, 13.0, 0.1] * 8], np.float32), "mxfp4", (1, 32))
    assert float(q.scale[0, 0]) == 2.0  # 2^(floor(log2 13) - 2)
    np.testing.assert_array_equal(q.dequantize()[0, :4], [0.0, 4.0, 12.0, 0.0])  # 2.5 ties to 2


def test_e2m1_rounds_like_the_hardware_type() -> None:
    y = np.linspace(-7, 7, 14 * 64 + 1, dtype=np.float32)  # all ties among them
    codes = nearest_code(jnp.asarray(y), get_qtype("mxfp4"), symmetric=True)
    read = np.array(get_qtype("mxfp4").table)[np.asarray(codes).astype(int) + 8]
    np.testing.assert_array_equal(read, y.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
def test_float8_rounds_like_the_hardware_type(name: str) -> None:
    qtype = get_qtype(name)
    y = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    y *= np.exp2(np.random.default_rng(1).integers(-18, 16, 4096)).astype(np.float32)
    y = np.clip(y, qtype.qmin, qtype.qmax)
    codes = nearest_code(jnp.asarray(y), qtype, symmetric=True)
    expected = y.astype(qtype.storage).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), expected)


@settings(max_examples=15)
@given(st.sampled_from(qtype_names()), st.booleans(), st.integers(0, 3))
def test_any_axes_may_share_a_scale(name: str, symmetric: bool, seed: int) -> None:
    qtype = get_qtype(name)
    rng = np.random.default_rng(seed)
    shape = (4, 32, 8)
    blocks = [int(rng.choice(divisors(n))) for n in shape]
    if qtype.group_size:
        blocks = [1, qtype.group_size, 1]
    w = rng.normal(size=shape).astype(np.float32)
    q = quantize_array(w, name, blocks, symmetric=symmetric or qtype.kind != "int").validate()
    assert q.block_shape == tuple(blocks)
    assert q.scale.shape == tuple(n // b for n, b in zip(shape, blocks, strict=True))
    coarsest = np.abs(w).max() * (2 if qtype.bits == 1 else 1)
    assert np.abs(np.asarray(q.dequantize()) - w).max() <= coarsest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_scales(dtype: str) -> None:
    w = hard_blocks()[:8]
    q = quantize_array(w, "int4", (1, 32), scale_dtype=dtype)
    assert q.scale.dtype == dtype
    exact_scale = np.abs(w).max(1, keepdims=True) / 7
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(q.scale, np.float32), exact_scale, rtol=eps)
    bound = exact_scale * (0.5 + 7.5 * eps)
    assert (np.abs(oracle.dequantize(q, np.float64) - w) <= bound).all()


def test_given_scales_and_real_zero_points() -> None:
    w = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    scale = jnp.full((2, 4), 0.25)
    q = quantize_array(w, "int4", (16, 1), scale=scale, zero_point=jnp.full((2, 4), 0.5))
    assert q.block_shape == (8, 1)
    inside = np.abs(w) < 1.75
    assert (np.abs(np.asarray(q.dequantize()) - w)[inside] <= 0.125 + 1e-6).all()


def test_double_quantization() -> None:
    w = np.random.default_rng(0).normal(size=(3, 512, 64)).astype(np.float32)
    plain = quantize_array(w, "nf4", (1, 64, 1))
    q = quantize_array(w, "nf4", (1, 64, 1), double_quant=True, stack_axes=(0,)).validate()
    assert q.scale.codes.dtype == jnp.int8 and q.scale.block_shape == (1, 4, 64)
    scale, read = np.asarray(plain.scale, np.float64), oracle.dequantize(q.scale, np.float64)
    step = oracle.spread(np.asarray(q.scale.scale, np.float64), scale.shape)
    assert (np.abs(read - scale) <= 0.5 * step + 1e-6 * scale).all()
    lo, hi = scale.reshape(3, 2, -1).min(-1), scale.reshape(3, 2, -1).max(-1)
    np.testing.assert_allclose(np.asarray(q.scale.scale)[..., 0], (hi - lo) / 255, rtol=1e-4)
    bits = 8 * (q.nbytes - q.codes.size / 2) / q.size
    assert bits == pytest.approx(8 / 64 + 64 / (64 * 256))  # 0.129 instead of 0.5
    assert np.mean((np.asarray(q.dequantize()) - w) ** 2) < 1.01 * np.mean(
        (np.asarray(plain.dequantize()) - w) ** 2
    )


@pytest.mark.parametrize("value", [0.0, 0.37, 2e-38, 3e38])
def test_double_quantization_of_equal_scales(value: float) -> None:
    q = double_quantize(jnp.full((4, 8), value)).validate()
    np.testing.assert_allclose(q.dequantize(), np.full((4, 8), value), rtol=1e-6)


def test_nvfp4_keeps_a_scale_per_tensor_and_layer() -> None:
    w = np.random.default_rng(0).normal(size=(3, 64, 4)).astype(np.float32)
    w *= np.array([1e-20, 1.0, 1e20], np.float32)[:, None, None]
    q = quantize_array(w, "nvfp4", (1, 16, 1), stack_axes=(0,))
    assert q.scale.scale.shape == (3, 1, 1)
    top = np.abs(w).max((1, 2))
    np.testing.assert_allclose(q.scale.scale.ravel(), top / (448 * 6), rtol=1e-6)
    error = np.abs(oracle.dequantize(q, np.float64) - w).max((1, 2))
    assert (error <= 0.2 * top).all()
    flat = quantize_array(w[1], "nvfp4", (16, 1))
    assert flat.scale.scale.shape == (1, 1)
    np.testing.assert_array_equal(flat.dequantize(), q.dequantize()[1])


def test_errors_name_the_parameter() -> None:
    w = np.ones((96, 4), np.float32)
    with pytest.raises(ValueError, match=r"^a/kernel: axis 0 of length 96 .*groups of 64; its divis"
                       r"ors are 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96$"):  # fmt: skip
        quantize_array(w, "int4", (64, 1), name="a/kernel")
    bad = w.copy()
    bad[0, 0], bad[5, 1], bad[7, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match=r"^a/kernel: 3 of 384 values .*\(1 NaN, 2 Inf\)"):
        quantize_array(bad, "int4", (96, 1), name="a/kernel")
    with pytest.raises(ValueError, match="a/kernel: float8_e4m3 has no zero point"):
        quantize_array(w, "float8_e4m3", (96, 1), symmetric=False, name="a/kernel")
    with pytest.raises(ValueError, match="a/kernel: the format nvfp4 prescribes its scales"):
        quantize_array(w, "nvfp4", (16, 1), double_quant=True, name="a/kernel")
    with pytest.raises(ValueError, match="a/kernel: mxfp4 has groups of 32 along one axis"):
        quantize_array(w, "mxfp4", (16, 1), name="a/kernel")
    with pytest.raises(ValueError, match="a/kernel: only floating-point arrays"):
        quantize_array(w.astype(np.int32), "int8", (96, 1), name="a/kernel")
    with pytest.raises(ValueError, match=r"a/kernel: shape \(0, 4\) holds no values"):
        quantize_array(w[:0], "int8", (1, 1), name="a/kernel")
    with pytest.raises(ValueError, match="needs one size for each axis"):
        check_block_shape((4, 4), (4,))
    for options, message in (
        ({"zero_point": jnp.ones((1, 4))}, "a/kernel: zero_point= goes with scale="),
        ({"scale_dtype": "int8"}, "a/kernel: scale_dtype='int8' is no floating-point dtype"),
        ({"packed_axis": 2}, r"a/kernel: there is no axis 2 in shape \(96, 4\)"),
        ({"stack_axes": (-3,)}, "a/kernel: there is no axis -3"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_array(jnp.ones((96, 4)), "int8", (96, 1), name="a/kernel", **options)


def test_choice_of_the_packed_axis() -> None:
    assert choose_packed_axis((32, 6), (8, 1)) == -2
    assert choose_packed_axis((6, 32), (1, 8)) == -1
    assert choose_packed_axis((4, 12, 32), (1, 12, 1), (0,)) == -2
    assert choose_packed_axis((4, 8, 6, 32), (4, 8, 1, 1)) == -3  # 8 divides, the last that shares
    assert choose_packed_axis((32, 4, 6), (8, 1, 1), (1,)) == -1  # only axes behind the layers'
    assert choose_packed_axis((32, 6, 4), (8, 1, 1), (2,)) is None


@pytest.mark.parametrize(("name", "symmetric"), SCHEMES)
def test_traced_and_abstract_like_eager(name: str, symmetric: bool) -> None:
    w = hard_blocks()[:4]

    def quantize(w):
        return quantize_rows(w, name, symmetric)

    eager, traced = quantize(w), jax.jit(quantize)(w)
    assert jax.tree.structure(eager) == jax.tree.structure(traced)
    np.testing.assert_array_equal(eager.dequantize(), traced.dequantize())
    abstract = jax.eval_shape(quantize, jax.ShapeDtypeStruct(w.shape, w.dtype)).validate()
    for ours, theirs in zip(jax.tree.leaves(abstract), jax.tree.leaves(eager), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert abstract.nbytes == eager.nbytes


SPECS = {
    P(None, "x", "y"): (P(None, "x", "y"), P(None, "x", "y")),
    P("y", None, "x"): (P("y", None, "x"), P("y", None, "x")),
    P(None, ("x", "y"), None): (P(None, ("x", "y"), None), P(None, None, None)),  # 4 groups
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["int4", "int3", "nvfp4"])
def test_sharded_weights_stay_sharded(name: str, kind: AxisType, spec: P) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"), axis_types=(kind, kind))
    w = np.random.default_rng(0).normal(size=(4, 64, 8)).astype(np.float32)
    options = {"block_shape": (1, 16, 1), "stack_axes": (0,)}
    alone = quantize_array(w, name, **options)
    q = quantize_array(jax.device_put(w, NamedSharding(mesh, spec)), name, **options)
    codes_spec, scale_spec = SPECS[spec]
    assert q.codes.sharding == NamedSharding(mesh, codes_spec)
    if name != "nvfp4":
        assert q.scale.sharding == NamedSharding(mesh, scale_spec)
    for ours, theirs in zip(jax.tree.leaves(q), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
