"""Unknown factors: what follows from equalities, against numbers that satisfy them."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from jaxquant.passes.channel_labels import ONE, Labels, inverse


def test_merging_is_transitive_and_closed_under_inversion():
    labels = Labels()
    a, b, c = labels.fresh((3,))
    labels.merge(np.array([a]), np.array([b ^ 1]))  # a = 1/b
    labels.merge(np.array([b]), np.array([c]))
    roots = labels.find(np.array([a, b, c, a ^ 1]))
    assert roots[1] == roots[2] == roots[3] != roots[0]
    assert labels.find(np.array([a]))[0] ^ 1 == roots[1]


def test_a_positive_number_that_is_its_own_inverse_is_one():
    labels = Labels()
    a, b = labels.fresh((2,))
    labels.merge(np.array([a]), np.array([b]))
    labels.merge(np.array([a]), inverse(np.array([b])))
    assert labels.find(np.array([a, b])).tolist() == [ONE, ONE]


def test_a_copy_keeps_what_is_merged_later_to_itself():
    labels = Labels()
    pair = labels.fresh((2,))
    other = labels.copy()
    other.merge(pair, ONE)
    assert other.is_one(pair) and not labels.is_one(pair)


def test_collapsing_an_axis_makes_its_factors_equal():
    labels = Labels()
    x = labels.fresh((2, 3))
    assert labels.varies(x, [0]) and labels.varies(x, [1])
    assert labels.collapse(x, [1]).shape == (2, 1)
    assert labels.varies(x, [0]) and not labels.varies(x, [1])


PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=12)


@given(PAIRS)
def test_merges_agree_with_gaussian_elimination(pairs):
    """a = b or a = 1/b is linear in the logarithms; equal labels are equal rows of a basis."""
    labels = Labels()
    x = labels.fresh((10,))
    rows = [np.zeros(10)]
    for a, b, flipped in pairs:
        row = np.zeros(10)
        row[a] += 1
        row[b] += 1 if flipped else -1
        rows.append(row)
        labels.merge(x[[a]], inverse(x[[b]]) if flipped else x[[b]])
    _, values, basis = np.linalg.svd(np.stack(rows), full_matrices=True)
    free = basis[np.sum(values > 1e-9) :]  # solutions, one column a number
    roots = labels.find(x)
    for i in range(10):
        assert (roots[i] == ONE) == (np.abs(free[:, i]).max(initial=0) < 1e-9)
        for j in range(i):
            same = np.allclose(free[:, i], free[:, j], atol=1e-9)
            assert (roots[i] == roots[j]) == same
