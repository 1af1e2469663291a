from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import GREEDY, Sampling
from jaxquant.models.sampling import keep_top_k, keep_top_p, sample

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))


def _draws(sampling: Sampling, count: int = 2000) -> np.ndarray:
    rows = jnp.broadcast_to(LOGITS, (count, 4))
    return np.asarray(jax.jit(sample, static_argnums=2)(rows, jax.random.key(0), sampling))


def test_greedy_takes_the_likeliest():
    assert int(sample(LOGITS, jax.random.key(0), GREEDY)[0]) == 1


def test_plain_sampling_follows_the_probabilities():
    frequencies = np.bincount(_draws(Sampling()), minlength=4) / 2000
    np.testing.assert_allclose(frequencies, [0.1, 0.4, 0.2, 0.3], atol=0.04)


def test_a_low_temperature_sharpens():
    frequencies = np.bincount(_draws(Sampling(temperature=0.25)), minlength=4) / 2000
    expected = np.array([0.1, 0.4, 0.2, 0.3]) ** 4
    np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.04)


def test_top_k_draws_only_the_k_likeliest():
    assert set(_draws(Sampling(top_k=2))) == {1, 3}
    assert set(_draws(Sampling(top_k=1))) == {1}


def test_top_p_keeps_the_fewest_that_reach_p():
    # 0.4, 0.3, 0.2, 0.1 in order: two reach 0.65, three reach 0.75, one reaches 0.35.
    assert set(_draws(Sampling(top_p=0.65))) == {1, 3}
    assert set(_draws(Sampling(top_p=0.75))) == {1, 2, 3}
    assert set(_draws(Sampling(top_p=0.35))) == {1}


def test_filters_keep_what_they_keep_unchanged():
    for kept in (keep_top_k(LOGITS, 3), keep_top_p(LOGITS, 0.75)):
        np.testing.assert_array_equal(kept[0, 1:], LOGITS[0, 1:])
        assert kept[0, 0] == -jnp.inf
    np.testing.assert_array_equal(keep_top_k(LOGITS, 99), LOGITS)
    np.testing.assert_array_equal(keep_top_p(LOGITS, 1.0), LOGITS)


def test_top_p_applies_to_what_top_k_left():
    # Of {0.4, 0.3} renormalized, the first alone has 0.571.
    assert set(_draws(Sampling(top_k=2, top_p=0.55))) == {1}


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p")],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
