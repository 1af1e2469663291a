"""Keys of modules: equal for equal computations, different for all others."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxquant.frontends.fingerprint import UnhashableError, fingerprint


class Pair(nn.Module):
    first: object = None
    second: object = None


def test_equal_modules_have_equal_keys():
    def make():
        config = {"sizes": [1, 2], "scale": 0.5, "table": np.arange(3)}
        return Pair(nn.Dense(3, name="a"), config)

    assert fingerprint(make()) == fingerprint(make())
    assert hash(fingerprint(make())) == hash(fingerprint(make()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ([1], (1,)),
        ({"a": 1}, {"a": 2}),
        (np.zeros(2), np.zeros((2, 1))),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.float32(1), np.float64(1)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (nn.Dense(3), nn.Dense(4)),
        (nn.Dense(3), nn.Dense(3, name="x")),
        (jnp.float32, jnp.float16),
        (nn.relu, nn.gelu),
    ],
)
def test_different_values_have_different_keys(one, other):
    assert fingerprint(Pair(one)) != fingerprint(Pair(other))
    assert fingerprint(Pair(one)) == fingerprint(Pair(one))


def test_sharing_counts():
    shared = nn.Dense(3)
    assert fingerprint(Pair(shared, shared)) != fingerprint(Pair(nn.Dense(3), nn.Dense(3)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (jnp.ones(2), r"\.first: a jax.Array"),
        ({"a": [jnp.ones(2)]}, r"\.first\['a'\]\[0\]: a jax.Array"),
        (np.zeros(1 << 15), r"\.first: an array of 262,144 bytes"),
        ({1, 2}, r"\.first: a set"),
    ],
)
def test_what_has_no_key_is_named(value, message):
    with pytest.raises(UnhashableError, match=message):
        fingerprint(Pair(value))
