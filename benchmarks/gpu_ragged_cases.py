"""Products of rows grouped by expert that are compiled for the GPU ahead of time.

A maker for `benchmarks.gpu_aot`'s jobs, as those of `benchmarks.gpu_cases`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_cases import operands
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.gpu.ragged import ragged_matmul
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem

_SHARED = ("x", "x_scale")


def ragged_operands(problem: RaggedProblem) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `ragged_matmul`'s arrays for a problem, codes K-minor."""
    arrays = {
        name: array
        if name in _SHARED
        else jax.ShapeDtypeStruct((problem.experts, *array.shape), array.dtype)
        for name, array in operands(problem.product).items()
    }
    return arrays | {"group_sizes": jax.ShapeDtypeStruct((problem.experts,), jnp.int32)}


def ours(product: dict[str, Any], experts: int, config: dict[str, Any]) -> tuple[Any, Any]:
    """`ragged_matmul` with this problem and config (their fields)."""
    p, c = RaggedProblem(MatmulProblem(**product), experts), GpuConfig(**config)
    table = tuple(range(-8, 8)) if p.product.codes == "table4" else None

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return ragged_matmul(**arrays, problem=p, config=c, table=table)

    return fn, (ragged_operands(p),)
