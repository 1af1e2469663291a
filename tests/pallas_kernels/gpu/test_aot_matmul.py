"""The matmul kernels through the real CUDA compilers, for the H200, without a GPU.

What it checks of each format for few rows and many: that it compiles, spills nothing, that wgmma
of the right types is in it and need not be serialized, and that shared memory is within the chip's
and what the config says.
"""

import dataclasses

import pytest

from benchmarks.gpu_aot import Job, available, measure
from benchmarks.gpu_formats import FORMATS
from jaxquant.pallas_kernels.gpu.chips import CHIPS
from jaxquant.pallas_kernels.gpu.config import shared_bytes
from jaxquant.pallas_kernels.gpu.heuristics import choose_config
from jaxquant.pallas_kernels.problem import MatmulProblem

pytestmark = pytest.mark.skipif(
    not available(),
    reason="JAX'S CUDA COMPILERS ARE NOT INSTALLED (pip install jax[cuda13]), OR THIS JAX IS OLDER"
    " THAN 0.11: NO GPU KERNEL WAS COMPILED",
)

ROWS = (16, 64, 2048)


def test_every_kernel_compiles():
    chip, problems = CHIPS["H200"], {}
    for name, (fields, _) in FORMATS.items():
        for m in ROWS:
            problems[f"{name}, {m} rows"] = MatmulProblem(m, 4096, 4096, **fields)
    problems["w4a16 g64 zero, ragged"] = MatmulProblem(3, 320, 144, **FORMATS["w4a16 g64 zero"][0])
    configs = {name: choose_config(problem, chip) for name, problem in problems.items()}
    jobs = [
        Job(
            name,
            "benchmarks.gpu_cases:ours",
            {
                "problem": dataclasses.asdict(problem),
                "config": dataclasses.asdict(configs[name]),
            },
        )
        for name, problem in problems.items()
    ]
    got = measure(jobs)
    assert {n: s.error for n, s in got.items() if s.error} == {}
    for name, problem in problems.items():
        (kernel,) = got[name].kernels
        types = FORMATS[name.split(",")[0]][1]
        assert kernel.mma and all(key.endswith(f".{types}") for key in kernel.mma), name
        assert (kernel.spills, kernel.stack, kernel.complaints) == (0, 0, []), name
        assert 0 < kernel.shared <= shared_bytes(problem, configs[name]) <= chip.shared_bytes, name
        # No weight is moved in front of the kernel: all that is moved has rows of x first.
        assert [move for move in got[name].moves if f"[{problem.n}," in move] == [], name
