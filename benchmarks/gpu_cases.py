"""The programs that are compiled for the GPU ahead of time: ours, and XLA's own lowering.

Makers for `benchmarks.gpu_aot`'s jobs: each returns `(fn, avals)` from plain numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_products import FORMATS, PLAIN, random_weight
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.gpu.quantize_rows import quantize_rows
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem


def operands(problem: MatmulProblem) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `quantized_matmul`'s arrays for a problem, codes K-minor."""
    p, struct = problem, jax.ShapeDtypeStruct
    arrays = {
        "x": struct((p.m, p.k), jnp.dtype(p.x_dtype)),
        "codes": struct((p.n, p.code_rows), jnp.dtype(STORAGE[p.codes][0])),
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
    return arrays


def ours(problem: dict[str, Any], config: dict[str, Any]) -> tuple[Any, Any]:
    """`quantized_matmul` with this problem and config (their fields)."""
    p, c = MatmulProblem(**problem), GpuConfig(**config)

    table = tuple(range(-8, 8)) if p.codes == "table4" else None

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return quantized_matmul(**arrays, problem=p, config=c, table=table)

    return fn, (operands(p),)


def rows(m: int, k: int, dtype: str, floats: str) -> tuple[Any, Any]:
    """The quantization of activations."""
    return lambda x: quantize_rows(x, dtype), (jax.ShapeDtypeStruct((m, k), jnp.dtype(floats)),)


def product(form: str, m: int, k: int, n: int) -> tuple[Any, Any]:
    """A product as a program has it: what dispatch makes of a format of `gpu_products`."""
    shapes = jax.eval_shape(
        lambda key: random_weight(key, k, n, FORMATS[form], None), jax.random.key(0)
    )
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    return lambda x, w: quantized_dot_general(x, w, PLAIN), (x, shapes)
