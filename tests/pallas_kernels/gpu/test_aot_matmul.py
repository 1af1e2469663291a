"""The matmul kernels through the real CUDA compilers, for the H200, without a GPU.

What it checks of each format for few rows and many: that it compiles, spills nothing, that wgmma
of the right types is in it and need not be serialized, and that shared memory is within the chip's
and what the config says.
"""

import dataclasses

import pytest

from benchmarks.gpu_aot import Job, available, measure
from jaxquant.pallas_kernels.gpu.chips import CHIPS
from jaxquant.pallas_kernels.problem import MatmulProblem

pytestmark = pytest.mark.skipif(
    not available(),
    reason="JAX'S CUDA COMPILERS ARE NOT INSTALLED (pip install jax[cuda13]), OR THIS JAX IS OLDER"
    " THAN 0.11: NO GPU KERNEL WAS COMPILED",
)

INT8 = {"x_dtype": "int8", "x_scale": True}
FP8 = {"x_dtype": "float8_e4m3fn", "x_scale": True}
EPILOGUE = {"bias": True, "gate": True, "residual": True}
FORMATS = {
    "w4a16 g128": ({"codes": "int4", "group": 128, **EPILOGUE}, "f32.bf16.bf16"),
    "w4a16 g64 zero": ({"codes": "int4", "group": 64, "zero_point": True}, "f32.bf16.bf16"),
    "w4a16 g32": ({"codes": "int4", "group": 32}, "f32.bf16.bf16"),
    "w4a16": ({"codes": "int4"}, "f32.bf16.bf16"),
    "w8a16 g128": ({"codes": "int8", "group": 128}, "f32.bf16.bf16"),
    "w8a8": ({"codes": "int8", **INT8}, "s32.s8.s8"),
    "w8a8 g128 zero": ({"codes": "int8", "group": 128, "zero_point": True, **INT8}, "s32.s8.s8"),
    "w4a8 g128": ({"codes": "int4", "group": 128, **INT8}, "s32.s8.s8"),
    "w4a8 zero": ({"codes": "int4", "zero_point": True, **INT8}, "s32.s8.s8"),
    "fp8": ({"codes": "float8_e4m3fn", **FP8, **EPILOGUE}, "f32.e4m3.e4m3"),
    "bf16 x fp8 g128": ({"codes": "float8_e4m3fn", "group": 128}, "f32.bf16.bf16"),
    "bf16 x e5m2": ({"codes": "float8_e5m2"}, "f32.bf16.bf16"),
}
ROWS = (16, 64, 2048)


def test_every_kernel_compiles():
    from jaxquant.pallas_kernels.gpu.config import shared_bytes
    from jaxquant.pallas_kernels.gpu.heuristics import choose_config

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
        # Nothing of a weight's size is moved in front of the kernel.
        large = [m for m in got[name].moves if f"[{problem.n},{problem.k}" in m]
        assert large == [], name
