"""Makers for `benchmarks.tpu_aot.Job`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, RaggedProblem
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_ragged_config
from jaxquant.pallas_kernels.tpu.ragged import ragged_matmul


def kernel(product: dict[str, Any], experts: int, chip: str, config=None) -> tuple[Any, Any, int]:
    """`ragged_matmul` with the config that is chosen for the chip."""
    p = RaggedProblem(MatmulProblem(**product), experts)
    q = p.product
    c = MatmulConfig(**config) if config else choose_ragged_config(p, CHIPS[chip])
    struct = jax.ShapeDtypeStruct
    arrays = {
        "x": struct((q.m, q.k), jnp.dtype(q.x_dtype)),
        "codes": struct((experts, q.code_rows, q.n), jnp.dtype(STORAGE[q.codes][0])),
        "scale": struct((experts, q.groups, q.n), jnp.float32),
        "group_sizes": struct((experts,), jnp.int32),
    }
    if q.x_scale:
        arrays["x_scale"] = struct((q.m, 1), jnp.float32)

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return ragged_matmul(**arrays, problem=p, config=c)

    return fn, (arrays,), math.ceil(q.n / c.bn) * (q.k // c.bk)
