"""Orthogonal matrices: orthogonal, flat, and applied along the right part of an axis."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.rotations import fixing_ones, random_hadamard


@pytest.mark.parametrize("size", [1, 2, 7, 12, 20, 24, 28, 36, 43, 52, 64, 96, 384, 1024])
def test_orthogonal(size):
    q = random_hadamard(size, 0).matrix()
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("size", [2, 12, 20, 24, 28, 36, 64, 96, 384, 1024])
def test_hadamard_entries_have_one_magnitude(size):
    np.testing.assert_allclose(np.abs(random_hadamard(size, 3).matrix()), size**-0.5, rtol=1e-12)


def test_the_seed_decides():
    a, b, c = (random_hadamard(16, seed).matrix() for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_the_ones_vector_is_kept_if_that_is_asked_for():
    q = fixing_ones(24, 0).matrix()
    np.testing.assert_allclose(q @ q.T, np.eye(24), atol=1e-12)
    np.testing.assert_allclose(np.ones(24) @ q, np.ones(24), atol=1e-12)
    assert np.abs(q - np.eye(24)).max() > 0.5
    assert fixing_ones(1, 0).matrix() == [[1.0]]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis", "inner"), [((3, 12), 1, 1), ((12, 5), 0, 1), ((2, 96, 3), 1, 4)]
)
def test_applied_to_a_part_of_an_axis(shape, axis, inner, inverse):
    x = np.random.default_rng(0).normal(size=shape)
    rotation = random_hadamard(12, 1)
    q = rotation.matrix().T if inverse else rotation.matrix()
    lead = shape[:axis] + (shape[axis] // (12 * inner),)
    parts = x.reshape(int(np.prod(lead)), 12, -1)
    want = np.einsum("akb,kl->alb", parts, q).reshape(shape)
    got = rotation.apply(jnp.asarray(x, jnp.float32), axis, inner, inverse)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert rotation.apply(jnp.asarray(x, jnp.bfloat16), axis, inner).dtype == jnp.bfloat16
