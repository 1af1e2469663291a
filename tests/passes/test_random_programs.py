"""Random programs: quantized at 8 bits they give what the dequantized floats give.

`random_programs.check` says what is asserted of each. `python -m benchmarks.random_programs` runs
thousands of others.
"""

import jax
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.passes import random_programs

_ANY = list(HealthCheck)


@pytest.fixture(autouse=True)
def _wide():
    """With float64, differences that are no rounding show."""
    with jax.enable_x64(True):
        yield


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("part", range(5))
def test_random_programs(part):
    @seed(part)
    @settings(max_examples=100, derandomize=False, database=None, suppress_health_check=_ANY)
    @given(st.data())
    def run(data):
        case = random_programs.program(lambda options: data.draw(st.sampled_from(options)))
        random_programs.check(case)

    run()
