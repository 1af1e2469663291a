"""What follows the sums of a product: scales, zero points, bias, gate, residual.

Used by the bodies of this package, on values; everything is in float32 until the last cast.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu import e4m3, reading
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.lookup import E2M1_FACTOR
from jaxquant.pallas_kernels.tpu.reading import LANES

_SUBLANES = 8  # rows of a register of 32 bits


def finish(
    total: jax.Array, refs: dict[str, Any], problem: MatmulProblem, config: MatmulConfig
) -> jax.Array:
    """`act(total)` in the result's dtype.

    In this order: zero point and scale of the column (if scales come at the end), the row's scale,
    bias, times silu(gate), plus residual.

    Args:
      total: sums [bm, bn], float32 or int32.
      refs: the body's references.
      problem: says which of them there are.
      config: says whether scales come at the end.

    Returns:
      [bm, bn].
    """
    out = total.astype(jnp.float32)
    if config.scale == "end":
        row = pl.ds(0, 1)
        if "offsets" in refs:
            out = out - widen(refs["offsets"][...], config.bn)
        if "sums" in refs:
            out = out - widen(refs["sums"][...], config.bn) * zero_rows(refs, problem, config, row)
        out = out * scale_rows(refs, problem, config, row)
    if problem.x_scale:
        out = out * _row_scales(refs["x_scale"], config.bm)
    if problem.bias:
        out = out + refs["bias"][...].astype(jnp.float32)
    if problem.gate:
        gate = refs["gate"][...].astype(jnp.float32)
        out = out * (gate / (1.0 + jnp.exp(-gate)))
    if problem.residual:
        out = out + refs["residual"][...].astype(jnp.float32)
    return out.astype(problem.out_dtype)


def _row_scales(ref: Any, rows: int) -> jax.Array:
    """Scales of x's rows as a column [rows, 1]; those that there are may lie in a row [1, m]."""
    scales = ref[...]
    if scales.shape[0] == rows:
        return scales
    square = rows, scales.shape[1]
    places = [lax.broadcasted_iota(jnp.int32, square, axis) for axis in range(2)]
    own = jnp.where(places[0] == places[1], jnp.broadcast_to(scales, square), 0.0)
    return jnp.sum(own, axis=1, keepdims=True)


def scale_rows(
    refs: dict[str, Any], problem: MatmulProblem, config: MatmulConfig, rows: Any, repeat: int = 1
) -> jax.Array:
    """float32 scales of these rows [rows, bn], for operands as the reading leaves them.

    With `repeat`, of one row: [1, bn], or [repeat, bn] if loads can repeat it.
    """
    scale = _repeated(refs["scale"], rows, repeat).astype(jnp.float32)
    step = reading.step(problem.codes, config.reading)
    if config.reading == "e2m1":
        step = 1 / E2M1_FACTOR
    if config.reading == "e4m3":
        step = 1 / e4m3.DOWN
    return scale * step if step != 1 else scale


def _repeated(ref: Any, rows: Any, repeat: int) -> jax.Array:
    """One row, where its number is known before the kernel runs, in all sublanes of a register.

    A load of 128 columns does that at no cost; a row of more is loaded into fewer registers, and
    brought to all sublanes by vector operations.
    """
    columns = ref.shape[1]
    if repeat % _SUBLANES or columns % LANES or not isinstance(rows.start, int):
        return ref[rows, :]
    tiles = [ref[rows, c : c + LANES] for c in range(0, columns, LANES)]
    spread = [jnp.broadcast_to(tile, (_SUBLANES, LANES)) for tile in tiles]
    return jnp.concatenate([jnp.concatenate(spread, axis=1)] * (repeat // _SUBLANES), axis=0)


def zero_rows(
    refs: dict[str, Any], problem: MatmulProblem, config: MatmulConfig, rows: Any
) -> jax.Array:
    """Zero points of these rows [rows, bn], in the operand's units, without its offsets."""
    zero = refs["zero_point"][rows, :].astype(jnp.float32)
    step = reading.step(problem.codes, config.reading)
    return zero / step if step != 1 else zero


def widen(lanes: jax.Array, columns: int) -> jax.Array:
    """[rows, 128] with equal lanes to [rows, columns]."""
    if columns <= LANES:
        return lanes[:, :columns]
    if columns % LANES:
        return jnp.broadcast_to(lanes[:, :1], (lanes.shape[0], columns))
    return jnp.concatenate([lanes] * (columns // LANES), axis=1)
