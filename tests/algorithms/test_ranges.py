from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxquant.algorithms.ranges import PercentileRange, absmax_range, mse_range
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.quantize_array import quantize_array

INT4 = get_qtype("int4")


def test_absmax() -> None:
    w = jnp.asarray([[1.0, -3.0, 2.0, 0.5]])
    np.testing.assert_array_equal(absmax_range(w, (1, 2), INT4, True), [[[-3, -2]], [[3, 2]]])
    np.testing.assert_array_equal(absmax_range(w, (1, 4), INT4, False), [[[-3]], [[2]]])
    np.testing.assert_allclose(absmax_range(w, (1, 4), get_qtype("int1"), True)[1], [[1.625]])
    np.testing.assert_array_equal(
        absmax_range(w, (1, 4), get_qtype("int1"), False), [[[-3]], [[2]]]
    )


@settings(max_examples=12)
@given(st.sampled_from([0.1, 25.0, 50.0, 99.0, 99.9, 100.0]), st.integers(0, 2), st.booleans())
def test_percentile_is_numpys(percentile: float, seed: int, symmetric: bool) -> None:
    w = np.random.default_rng(seed).normal(size=(2, 12, 4)).astype(np.float32)
    w[0, :5] = 0.0  # ties, and values of both zeros
    w[0, 0] = -0.0
    lo, hi = PercentileRange(percentile)(jnp.asarray(w), (1, 6, 2), INT4, symmetric)
    blocks = w.reshape(2, 2, 6, 2, 2).astype(np.float64)
    if symmetric:
        expected = np.percentile(np.abs(blocks), percentile, axis=(2, 4))
        np.testing.assert_array_equal(lo, -hi)
    else:
        expected = np.percentile(blocks, percentile, axis=(2, 4))
        lowest = np.percentile(blocks, 100 - percentile, axis=(2, 4))
        np.testing.assert_allclose(lo, lowest, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(hi, expected, rtol=1e-5, atol=1e-7)


def test_percentile_of_blocks_of_one_and_of_extremes() -> None:
    w = jnp.asarray([[3e38, -3e38, 1e-30, 0.0]])
    lo, hi = PercentileRange(99.0)(w, (1, 1), INT4, False)
    np.testing.assert_array_equal(lo, w)
    np.testing.assert_array_equal(hi, w)
    assert PercentileRange(99.0) == PercentileRange(99.0)  # a static argument of jit
    assert hash(PercentileRange(99.0)) != hash(PercentileRange(98.0))


def best_by_hand(block: np.ndarray, bits: int, symmetric: bool) -> float:
    """The p that loses least by |w - q|^2.4, in float64."""
    losses = []
    for i in range(80):
        p = 1 - i / 100
        if symmetric:
            top = 2 ** (bits - 1) - 1
            scale = p * np.abs(block).max() / top
            q = np.clip(np.round(block / scale), -top, top) * scale
        else:
            lo, hi = p * min(block.min(), 0), p * max(block.max(), 0)
            scale = (hi - lo) / (2**bits - 1)
            zero = np.round(-lo / scale)
            q = (np.clip(np.round(block / scale) + zero, 0, 2**bits - 1) - zero) * scale
        losses.append((np.abs(block - q) ** 2.4).sum())
    return 1 - int(np.argmin(losses)) / 100


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("name", "bits"), [("int4", 4), ("int3", 3)])
def test_mse_finds_the_best_candidate(name: str, bits: int, symmetric: bool) -> None:
    w = np.random.default_rng(0).standard_t(3, size=(64, 6)).astype(np.float32)
    lo, hi = mse_range(jnp.asarray(w), (64, 1), get_qtype(name), symmetric)
    _, amax = absmax_range(jnp.asarray(w), (64, 1), get_qtype(name), symmetric)
    found = np.asarray(hi / amax)[0]
    blocks = w.astype(np.float64).T
    np.testing.assert_allclose(found, [best_by_hand(b, bits, symmetric) for b in blocks], atol=1e-4)


@pytest.mark.parametrize("name", ["int4", "int2", "nf4", "mxfp4", "nvfp4", "float8_e4m3"])
def test_mse_never_loses_more_than_absmax(name: str) -> None:
    w = np.random.default_rng(0).standard_t(3, size=(256, 8)).astype(np.float32)
    blocks = (get_qtype(name).group_size or 64, 1)

    def loss(range_fn) -> float:
        q = quantize_array(w, name, blocks, range_fn=range_fn)
        return float((np.abs(np.asarray(q.dequantize(), np.float64) - w) ** 2.4).sum())

    assert loss(mse_range) <= loss(absmax_range) * 1.0001
    if name in ("int4", "int2"):
        assert loss(mse_range) < 0.9 * loss(absmax_range)


def test_mse_of_degenerate_blocks() -> None:
    w = np.stack([np.zeros(8), np.full(8, 3e38), np.full(8, 1e-41), np.full(8, -2.0)])
    q = quantize_array(w.astype(np.float32), "int4", (1, 8), range_fn=mse_range)
    np.testing.assert_allclose(q.dequantize(), w, rtol=0.02, atol=1e-37)


@pytest.mark.parametrize("range_fn", [PercentileRange(99.0), mse_range])
def test_slices_give_what_the_whole_gives(range_fn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large weight is searched slice by slice; the result must not depend on it."""
    from jaxquant.core import quantize_array as module

    w = np.random.default_rng(0).normal(size=(2, 32, 8)).astype(np.float32)
    for blocks in ((1, 8, 1), (2, 1, 8), (1, 32, 1)):
        whole = quantize_array(w, "int3", blocks, range_fn=range_fn)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_SLICE", 64)
            module._compiled.cache_clear()
            sliced = quantize_array(w, "int3", blocks, range_fn=range_fn)
        module._compiled.cache_clear()
        np.testing.assert_array_equal(sliced.codes, whole.codes)
        np.testing.assert_array_equal(sliced.scale, whole.scale)


def test_ranges_work_in_bfloat16_and_under_jit() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.bfloat16)
    for fn in (absmax_range, PercentileRange(90.0), mse_range):
        traced = jax.jit(lambda w, fn=fn: fn(w, (16, 1), INT4, True))(w)
        for ours, theirs in zip(
            traced, fn(w.astype(jnp.float32), (16, 1), INT4, True), strict=True
        ):
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
