from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import functional


def _rotate(x, position):
    positions = jnp.full((1, 1), position, jnp.int32)
    cos, sin = functional.rope_tables(positions, x.shape[-1], 10_000.0)
    return functional.apply_rope(x[None, None, None], cos, sin)[0, 0, 0]


def test_rope_at_position_zero_is_the_identity():
    x = jax.random.normal(jax.random.key(0), (8,))
    np.testing.assert_array_equal(_rotate(x, 0), x)


def test_rope_keeps_norms():
    x = jax.random.normal(jax.random.key(0), (8,))
    np.testing.assert_allclose(jnp.linalg.norm(_rotate(x, 123)), jnp.linalg.norm(x), rtol=1e-6)


@pytest.mark.parametrize("shift", [1, 17, 100])
def test_rope_products_depend_on_the_distance_alone(shift):
    query, key = jax.random.normal(jax.random.key(1), (2, 8))
    near = _rotate(query, 9) @ _rotate(key, 4)
    far = _rotate(query, 9 + shift) @ _rotate(key, 4 + shift)
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-5)
    assert abs(near - _rotate(query, 9) @ _rotate(key, 5)) > 1e-3  # and do depend on it


def test_rope_first_pair_turns_by_one_radian_a_position():
    x = jnp.zeros(8).at[0].set(1.0)
    rotated = _rotate(x, 2)
    np.testing.assert_allclose(rotated[0], np.cos(2.0), rtol=1e-6)
    np.testing.assert_allclose(rotated[4], np.sin(2.0), rtol=1e-6)


def test_causal_mask_hides_the_future_and_padding():
    mask = functional.causal_mask(jnp.array([[-1, 0, 1]]), jnp.array([[-1, 0, 1, -1]]))
    expected = [[False] * 4, [False, True, False, False], [False, True, True, False]]
    np.testing.assert_array_equal(mask[0], expected)


def test_grouped_attention_equals_attention_with_repeated_heads():
    keys = jax.random.split(jax.random.key(2), 3)
    query = jax.random.normal(keys[0], (2, 5, 6, 4))
    key, value = (jax.random.normal(k, (2, 5, 2, 4)) for k in keys[1:])
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    mask = functional.causal_mask(positions, positions)
    ours = functional.grouped_attention(query, key, value, mask)
    theirs = jax.nn.dot_product_attention(
        query, jnp.repeat(key, 3, axis=2), jnp.repeat(value, 3, axis=2), is_causal=True
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_attention_that_sees_nothing_is_finite():
    x = jnp.ones((1, 1, 2, 4))
    out = functional.grouped_attention(x, x[:, :, :1], x[:, :, :1], jnp.zeros((1, 1, 1), bool))
    assert bool(jnp.all(jnp.isfinite(out)))
