"""The GPU matmul kernels on a GPU: run with JAX_PLATFORMS=cuda,cpu where there is one.

`benchmarks.gpu_check` draws and judges: float64 answers, memory poisoned with NaN, repeated runs to
the same bits, variants of the config. Here are the formats by name at shapes of decoding and
prefill, and some that it draws.
"""

import jax
import numpy as np
import pytest

from benchmarks import gpu_check
from jaxquant.pallas_kernels.gpu.chips import Chip, chip_of
from jaxquant.pallas_kernels.problem import MatmulProblem


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
INT8 = {"x_dtype": "int8", "x_scale": True}
FP8 = {"x_dtype": "float8_e4m3fn", "x_scale": True}
FORMATS = {
    "w4a16 g128": {"codes": "int4", "group": 128, "bias": True, "gate": True, "residual": True},
    "w4a16 g32, zero points": {"codes": "int4", "group": 32, "zero_point": True},
    "w4a16": {"codes": "int4"},
    "w8a16 g64": {"codes": "int8", "group": 64, "zero_point": True},
    "w8a8": {"codes": "int8", **INT8},
    "w8a8 g128, zero points": {"codes": "int8", "group": 128, "zero_point": True, **INT8},
    "w4a8 g128": {"codes": "int4", "group": 128, **INT8},
    "w4a8, zero points": {"codes": "int4", "zero_point": True, **INT8},
    "fp8 g128": {"codes": "float8_e4m3fn", "group": 128, **FP8},
    "bf16 x e4m3 g128": {"codes": "float8_e4m3fn", "group": 128},
    "bf16 x e5m2": {"codes": "float8_e5m2"},
}


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, m):
    problem = MatmulProblem(m, 2048, 1040, out_dtype="float32", **FORMATS[name])
    done, wrong = gpu_check.check(problem, 0, CHIP)
    assert done and wrong == []


@pytest.mark.parametrize("seed", range(20))
def test_drawn_at_random(seed):
    problem = gpu_check.random_problem(np.random.default_rng(seed))
    done, wrong = gpu_check.check(problem, seed, CHIP)
    assert done and wrong == []
