"""What follows the sums of a product: zero points, scales, bias, gate, residual.

Used by the body on a transposed tile in registers, and by `gpu.matmul` on whole arrays where XLA
adds up the parts of a product; everything is in float32 until the last cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.pallas_kernels.gpu import reading
from jaxquant.pallas_kernels.gpu.config import GpuConfig, needs_sums
from jaxquant.pallas_kernels.problem import MatmulProblem

# Arguments of `finish` that are vectors, by what they run over.
OVER_COLUMNS = ("scale", "zero_point", "bias")
OVER_ROWS = ("x_scale", "x_sums")
TILES = ("gate", "residual")


def names(problem: MatmulProblem, config: GpuConfig) -> tuple[str, ...]:
    """What `finish` wants to be given."""
    at_end = config.scale == "end"
    wanted = {
        "scale": at_end,
        "zero_point": at_end and needs_sums(problem, config),
        "bias": problem.bias,
        "x_scale": problem.x_scale,
        "x_sums": at_end and needs_sums(problem, config),
        "gate": problem.gate,
        "residual": problem.residual,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def finish(
    total: jax.Array, given: Mapping[str, Any], problem: MatmulProblem, config: GpuConfig
) -> jax.Array:
    """`act(total)` in the result's dtype.

    In this order: zero point and scale of the column (if scales come at the end), the row's scale,
    bias, times silu(gate), plus residual.

    Args:
      total: sums, float32 or int32, transposed or not.
      given: arrays that broadcast to `total`, by `names`.
      problem: the product.
      config: says whether scales come at the end.

    Returns:
      Array of `total`'s shape.
    """
    out = total.astype(jnp.float32)
    if config.scale == "end":
        out = scaled(out, given, problem, config)
    if problem.x_scale:
        out = out * given["x_scale"]
    if problem.bias:
        out = out + given["bias"].astype(jnp.float32)
    if problem.gate:
        gate = given["gate"].astype(jnp.float32)
        out = out * (gate / (1.0 + jnp.exp(-gate)))
    if problem.residual:
        out = out + given["residual"].astype(jnp.float32)
    return out.astype(problem.out_dtype)


def scaled(
    sums: jax.Array, given: Mapping[str, Any], problem: MatmulProblem, config: GpuConfig
) -> jax.Array:
    """Float32 sums of operands as sums of values: `(sums * factor - zero * x_sums) * scale`."""
    factor = reading.words_of(problem.codes, config).factor
    if config.operand == "int8" and factor != 1.0:  # bfloat16 operands had theirs at once
        sums = sums * factor
    if "x_sums" in given:
        sums = sums - given["zero_point"].astype(jnp.float32) * given["x_sums"]
    return sums * given["scale"].astype(jnp.float32)
