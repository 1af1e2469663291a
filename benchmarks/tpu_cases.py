"""The programs whose static cost is asked for: ours, bfloat16, and XLA's own lowering.

Makers for `benchmarks.tpu_aot.Job`: each returns `(fn, avals, steps)` from plain numbers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.pallas_kernels.tpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.tpu.problem import STORAGE, MatmulConfig, MatmulProblem

# Any 16 values will do: what a lookup costs does not depend on them.
_TABLE = tuple(i / 8 - 1 for i in range(16))


def ours(problem: dict[str, Any], config: dict[str, Any]) -> tuple[Any, Any, int]:
    """`quantized_matmul` with this problem and config (their fields)."""
    p, c = MatmulProblem(**problem), MatmulConfig(**config)
    struct = jax.ShapeDtypeStruct
    arrays = {
        "x": struct((p.m, p.k), jnp.dtype(p.x_dtype)),
        "codes": struct((p.code_rows, p.n), jnp.dtype(STORAGE[p.codes][0])),
        "scale": struct((p.groups, p.n), jnp.float32),
    }
    if p.zero_point:
        arrays["zero_point"] = struct((p.groups, p.n), jnp.int8)
    if p.x_scale:
        arrays["x_scale"] = struct((p.m, 1), jnp.float32)
    if p.bias:
        arrays["bias"] = struct((p.n,), jnp.float32)
    for name in ("gate", "residual"):
        if getattr(p, name):
            arrays[name] = struct((p.m, p.n), jnp.dtype(p.out_dtype))
    table = _TABLE if p.codes == "table4" else None

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return quantized_matmul(**arrays, problem=p, config=c, table=table)

    steps = math.ceil(p.m / c.bm) * math.ceil(p.n / c.bn) * (p.k // c.bk)
    return fn, (arrays,), steps
