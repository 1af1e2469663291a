"""The GPU kernels on a GPU: run with JAX_PLATFORMS=cuda,cpu where there is one.

`benchmarks.gpu_oracle` draws and judges: float64 answers, memory poisoned with NaN, repeated runs
to the same bits, variants of the config. Here are the formats by name at shapes of decoding and
prefill, and some that it draws. `python -m benchmarks.gpu_check` does the same and more, and goes
on where a kernel hangs: it comes first on a chip that no kernel has run on.
"""

import jax
import numpy as np
import pytest

from benchmarks import gpu_check, gpu_oracle, gpu_oracle_grouped
from benchmarks.gpu_formats import FORMATS
from jaxquant.pallas_kernels.gpu.chips import Chip, chip_of


def chip_here() -> Chip | None:
    try:
        return chip_of(jax.devices("cuda")[0].device_kind)
    except RuntimeError:
        return None


CHIP = chip_here()
pytestmark = pytest.mark.skipif(
    CHIP is None,
    reason="THERE IS NO HOPPER GPU, OR JAX_PLATFORMS HIDES IT: NO GPU KERNEL RAN ON A CHIP",
)


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, m):
    done, wrong = gpu_oracle.check(gpu_check.format_problem(name, m), 0, CHIP)
    assert done and wrong == []


@pytest.mark.parametrize("seed", range(20))
def test_drawn_at_random(seed):
    problem = gpu_oracle.random_problem(np.random.default_rng(seed))
    done, wrong = gpu_oracle.check(problem, seed, CHIP)
    assert done and wrong == []


@pytest.mark.parametrize("seed", range(10))
def test_rows_grouped_by_expert(seed):
    product, sizes = gpu_oracle_grouped.random_ragged(np.random.default_rng(seed))
    done, wrong = gpu_oracle_grouped.check_ragged(product, sizes, seed, CHIP)
    assert done and wrong == []


@pytest.mark.parametrize("seed", range(6))
def test_llm_int8(seed):
    done, wrong = gpu_oracle_grouped.check_llm_int8(seed, CHIP)
    assert done and wrong == []
