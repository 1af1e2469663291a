import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from jaxquant.evaluate.divergence import kl_divergence, row_scores, value_scores


def kl64(a, b):
    """Float64 oracle on the very numbers that the device saw."""
    p, q = softmax(np.asarray(a, np.float64), -1), softmax(np.asarray(b, np.float64), -1)
    return rel_entr(p, q).sum(-1)


@given(
    st.sampled_from([1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.floats(-50, 50),
    st.integers(0, 10**6),
)
def test_kl_matches_float64_at_all_sizes(noise, spread, shift, seed):
    rng = np.random.default_rng(seed)
    a = (spread * rng.normal(size=(2, 3, 50)) + shift).astype(np.float32)
    b = (a + noise * rng.normal(size=a.shape)).astype(np.float32)
    got = np.asarray(kl_divergence(a, b))
    assert got.shape == (2, 3)
    assert (got >= 0).all()
    np.testing.assert_allclose(got, kl64(a, b), rtol=2e-3, atol=1e-11)


def test_small_kl_is_not_the_noise_of_a_plain_float32_sum():
    rng = np.random.default_rng(0)
    a = (5 * rng.normal(size=(1, 64, 4096))).astype(np.float32)
    b = (a + 3e-4 * rng.normal(size=a.shape)).astype(np.float32)
    exact = kl64(a, b)
    log_p, log_q = (log_softmax(x, -1) for x in (a, b))
    plain = (np.exp(log_p) * (log_p - log_q)).sum(-1, dtype=np.float32)
    ours = np.abs(np.asarray(kl_divergence(a, b)) - exact).max()
    assert ours < 0.01 * exact.min()
    assert np.abs(plain - exact).max() > exact.max()


def test_kl_of_equal_logits_up_to_a_shift_is_zero():
    a = np.random.default_rng(0).normal(size=(1, 4, 33)).astype(np.float32)
    assert (np.asarray(kl_divergence(a, a)) == 0).all()
    np.testing.assert_allclose(kl_divergence(a, a + np.float32(8)), 0, atol=1e-11)


def test_kl_with_masked_classes():
    inf = np.inf
    a = np.array([[[0.0, 1.0, -inf], [0.0, 1.0, -inf], [0.0, 1.0, 2.0]]], np.float32)
    b = np.array([[[0.0, 1.0, -inf], [0.0, 1.0, 0.5], [0.0, 1.0, -inf]]], np.float32)
    got = np.asarray(kl_divergence(a, b))[0]
    assert got[0] == 0  # both masked
    assert got[1] == pytest.approx(kl64(a, b)[0, 1], rel=1e-6)  # some given to a masked class
    assert got[2] == np.inf  # a class with probability has none in the other


def test_kl_far_apart_does_not_overflow():
    a, b = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 4), np.float32)
    a[..., 0], b[..., 1] = 1e4, 1e4
    assert float(kl_divergence(a, b)[0, 0]) == pytest.approx(1e4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_row_scores_match_float64_on_the_stored_numbers(dtype):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(4 * rng.normal(size=(3, 5, 17)), dtype)
    targets = rng.integers(-1, 17, (3, 5))
    got = row_scores(logits, targets)
    log_p = log_softmax(np.asarray(logits, np.float64), -1)
    nll = -np.take_along_axis(log_p, targets.clip(0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(got.nll, np.where(targets >= 0, nll, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.top, log_p.argmax(-1))
    np.testing.assert_allclose(got.top_probability, np.exp(log_p.max(-1)), rtol=1e-5)
    assert not got.bad.any()


def test_bad_positions_are_those_with_nan_or_plus_infinity():
    logits = np.zeros((1, 4, 3), np.float32)
    logits[0, 1, 0], logits[0, 2, 1], logits[0, 3, 2] = np.nan, np.inf, -np.inf
    got = row_scores(logits, np.zeros((1, 4), np.int32))
    np.testing.assert_array_equal(got.bad, [[False, True, True, False]])


def test_value_scores_sum_over_leaves_and_axes():
    rng = np.random.default_rng(2)
    a = [rng.normal(size=(4, 3, 2)).astype(np.float32), rng.normal(size=4).astype(np.complex64)]
    b = [x + np.float32(0.1) * rng.normal(size=x.shape).astype(np.float32) for x in a]
    b[0][2, 0, 0] = np.inf
    got = value_scores(a, b)
    signal = (a[0].astype(float) ** 2).sum((1, 2)) + np.abs(a[1]) ** 2
    noise = ((b[0] - a[0]).astype(float) ** 2).sum((1, 2)) + np.abs(b[1] - a[1]) ** 2
    np.testing.assert_allclose(got.signal, signal, rtol=1e-5)
    np.testing.assert_allclose(got.noise, noise, rtol=1e-5)
    np.testing.assert_array_equal(got.bad, [False, False, True, False])
