"""Random architectures: folds and rotations leave their function as it was, in float64.

`python -m benchmarks.random_folds` runs hundreds of others.
"""

import collections

import jax
import pytest

from tests.passes import random_architectures


@pytest.mark.parametrize("part", range(4))
def test_random_architectures(part):
    done = collections.Counter()
    with jax.enable_x64(True):
        for number in range(5 * part, 5 * part + 5):
            done += random_architectures.check(10_000 + number)
    assert done["folded"] > 5 and done["rotated"] > 3 and done["turned"] > 3
