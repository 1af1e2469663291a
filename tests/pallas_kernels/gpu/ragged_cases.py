"""Rows grouped by expert with their float64 answers: each expert is a product of its own.

Used by `test_ragged` and, on a chip, by `benchmarks.gpu_check`; any jax can import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.pallas_kernels.problem import MatmulProblem
from tests.pallas_kernels.tpu import cases
from tests.pallas_kernels.tpu.cases import Case

_SHARED = ("x", "x_scale")
_WEIGHT = ("codes", "scale", "zero_point")


def make(product: MatmulProblem, sizes: Sequence[int], seed: int = 0) -> Case:
    """Random operands, codes [experts, n, k], the rows of each expert, and the float64 answer."""
    each = [cases.make(product, seed + e) for e in range(len(sizes))]
    first = each[0].arrays
    arrays: dict[str, Any] = {name: first[name] for name in _SHARED if name in first}
    for name in _WEIGHT:
        if name in first:
            stack = jnp.stack([jnp.asarray(one.arrays[name]) for one in each])
            arrays[name] = stack.swapaxes(1, 2) if name == "codes" else stack
    arrays["group_sizes"] = jnp.asarray(sizes, jnp.int32)
    if "table" in first:
        arrays["table"] = first["table"]
    x = np.asarray(jnp.asarray(arrays["x"]).astype(jnp.float32), np.float64)
    x = x * np.asarray(arrays.get("x_scale", np.ones((1, 1))), np.float64)
    want, reach = np.zeros((product.m, product.n)), np.zeros((product.m, product.n))
    at = 0
    for one, size in zip(each, sizes, strict=True):
        rows = slice(at, at + size)
        want[rows], reach[rows] = x[rows] @ one.weight, np.abs(x[rows]) @ np.abs(one.weight)
        at += size
    return Case(arrays, want, reach, np.stack([one.weight for one in each]))
