"""`transform` called eagerly: which calls share a compiled program, and which one is forgotten.

What it does to a program is in tests/passes.
"""

import jax
import numpy as np
import pytest

from jaxquant.core.quantize_array import quantize_array
from jaxquant.frontends import function, transform

X = jax.random.normal(jax.random.key(0), (3, 16))
W = quantize_array(jax.random.normal(jax.random.key(1), (16, 8)), "int8", (16, 1))


def test_zeros_of_both_signs_are_two_values():
    fn = transform(lambda w, x, factor: x @ w + np.copysign(1.0, factor))
    product = X @ W.dequantize()
    for factor in (0.0, -0.0):
        expected = product + np.copysign(1.0, factor)
        np.testing.assert_allclose(fn(W, X, factor), expected, rtol=1e-5, atol=1e-5)


def test_compiled_calls_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(function, "_CACHED_CALLS", 2)
    traced = []

    @transform
    def fn(w, x, factor):
        traced.append(factor)
        return x @ w * factor

    for factor in (1, 2, 3, 3, 2, 1):
        fn(W, X, factor)
    assert traced == [1, 2, 3, 1]  # the oldest was forgotten, the last two were kept


def test_only_functions_are_transformed():
    with pytest.raises(TypeError, match="transform takes a function, not 3"):
        transform(3)


def test_a_tree_whose_codes_were_cast_is_refused():
    cast = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), {"kernel": W})
    with pytest.raises(ValueError, match="kernel: invariant 1: int8 codes must be int8, not bf"):
        transform(lambda p, x: x @ p["kernel"])(cast, X)
