"""Products for the GPU kernels' tests: those of the TPU's, with codes K-minor."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.problem import MatmulProblem
from tests.pallas_kernels.tpu import cases
from tests.pallas_kernels.tpu.cases import Case


def make(problem: MatmulProblem, seed: int = 0) -> Case:
    """Random operands of a problem, codes [n, k], and the float64 answer."""
    case = cases.make(problem, seed)
    return case._replace(arrays=case.arrays | {"codes": case.arrays["codes"].T})


def run(problem: MatmulProblem, config: GpuConfig, case: Case) -> Any:
    """The kernel, interpreted on CPU: converted weights go through shared memory."""
    staged = dataclasses.replace(config, staged=config.reading != "direct")
    arrays = dict(case.arrays)
    table = arrays.pop("table", None)

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return quantized_matmul(
            **arrays,
            problem=problem,
            config=staged,
            table=table,
            interpret=plgpu.InterpretGPUParams(),
        )

    return jax.jit(fn)(arrays)


assert_close = cases.assert_close
