import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.evaluate.bootstrap import (
    Interval,
    quantile,
    quantile_interval,
    ratio_interval,
    resample_counts,
)


def test_counts_are_samples_with_replacement_and_repeat_with_the_seed():
    counts = resample_counts(7, 200, seed=3)
    assert counts.shape == (200, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert (counts >= 0).all()
    np.testing.assert_array_equal(counts, resample_counts(7, 200, seed=3))
    assert (counts != resample_counts(7, 200, seed=4)).any()


def test_ratio_interval_is_the_percentiles_of_the_resampled_ratios():
    rng = np.random.default_rng(0)
    num, den = rng.normal(size=9), rng.integers(1, 5, 9).astype(float)
    counts = resample_counts(9, 500, seed=1)
    got = ratio_interval(num, den, counts, level=0.9)
    ratios = [(c * num).sum() / (c * den).sum() for c in counts]
    assert got.value == pytest.approx(num.sum() / den.sum(), rel=1e-12)
    assert got.low == pytest.approx(np.quantile(ratios, 0.05), rel=1e-12)
    assert got.high == pytest.approx(np.quantile(ratios, 0.95), rel=1e-12)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_intervals_of_clustered_data_cover_the_truth(statistic):
    """Nominal 95%, on 40 examples of 12 correlated positions; over positions far too low."""
    rng = np.random.default_rng(0)
    examples, positions, trials = 40, 12, 300
    covered = naive = 0
    owners = np.repeat(np.arange(examples), positions)
    for trial in range(trials):
        values = rng.normal(size=(examples, 1)) + 0.3 * rng.normal(size=(examples, positions))
        counts = resample_counts(examples, 300, seed=trial)
        flat = values.ravel()
        if statistic == "mean":
            got = ratio_interval(values.sum(1), np.full(examples, positions), counts)
        else:
            got = quantile_interval(flat, owners, counts, 0.5)
        covered += got.low <= 0 <= got.high
        half = 1.96 * flat.std() / math.sqrt(len(flat))
        naive += abs(flat.mean()) <= half
    assert 0.90 <= covered / trials <= 0.98
    assert naive / trials < 0.6


@given(
    st.integers(1, 12),
    st.integers(1, 30),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
    st.integers(0, 10**6),
)
def test_quantile_interval_equals_brute_force(examples, positions, q, seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(size=examples * positions), 1)  # with ties
    owners = rng.integers(0, examples, len(values))
    counts = resample_counts(examples, 20, seed)
    got = quantile_interval(values, owners, counts, q, level=0.8)
    assert got.value == np.quantile(values, q, method="inverted_cdf")
    found = []
    for c in counts:
        repeated = np.repeat(values, c[owners].astype(int))
        if len(repeated):
            found.append(np.quantile(repeated, q, method="inverted_cdf"))
    if examples > 1 and found:
        np.testing.assert_allclose([got.low, got.high], np.quantile(found, [0.1, 0.9]))
    elif examples == 1:
        assert got.low is None


def test_quantile_is_a_value_of_the_sample():
    values = np.arange(1, 101, dtype=float)
    np.random.default_rng(0).shuffle(values)
    assert [quantile(values, q) for q in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]


def test_no_interval_for_one_example_or_for_values_that_are_not_finite():
    one = resample_counts(1, 10, 0)
    assert ratio_interval(np.array([2.0]), np.array([1.0]), one) == Interval(2.0)
    two = resample_counts(2, 10, 0)
    assert ratio_interval(np.array([np.inf, 1]), np.ones(2), two) == Interval(math.inf)
    assert quantile_interval(np.array([1.0, 2.0]), np.array([0, 1]), None, 0.5) == Interval(1.0)


def test_a_mean_over_nothing_is_an_error():
    with pytest.raises(ValueError, match="every example has weight zero"):
        ratio_interval(np.zeros(3), np.zeros(3), None)
    with pytest.raises(ValueError, match="quantile of nothing"):
        quantile(np.zeros(0), 0.5)
    with pytest.raises(ValueError, match="at least one example"):
        resample_counts(0, 10, 0)


def test_map_keeps_a_missing_interval_missing():
    assert Interval(1.0).map(math.exp) == Interval(math.e)
    assert Interval(0.0, -1.0, 1.0).map(math.exp) == Interval(1.0, math.exp(-1), math.e)
