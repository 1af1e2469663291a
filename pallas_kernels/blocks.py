"""Blockwise scales on plain arrays: spreading them over a weight, and undoing the encoding.

Called by the reference and by kernels' fallbacks. A scale has the rank of its weight, and one
element of it serves `weight.shape[i] // scale.shape[i]` neighbours along axis i.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def spread_blocks(part: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats each element over its block; axes of size 1 stay 1, since they broadcast.

    Args:
      part: scales or zero points, each size a divisor of that of `shape`.
      shape: the weight's shape.

    Returns:
      Array with sizes 1 or those of `shape`.
    """
    for axis in range(part.ndim):
        part = spread_axis(part, axis, 1 if part.shape[axis] == 1 else shape[axis])
    return part


def spread_axis(part: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeats the elements along one axis, each `size // part.shape[axis]` times in a row."""
    before = part.shape[axis]
    if before == size:
        return part
    shape = part.shape
    spread = (*shape[: axis + 1], size // before, *shape[axis + 1 :])
    kept = [i for i in range(len(spread)) if i != axis + 1]
    part = lax.broadcast_in_dim(part, spread, kept)
    return part.reshape(*shape[:axis], size, *shape[axis + 1 :])


def centered(
    values: jax.Array, zero_point: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`values - zero_point` in `dtype`: the weight before its scale.

    The subtraction happens in float32 or wider, so that narrow types round once.
    """
    if zero_point is None:
        return values.astype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    zero = spread_blocks(zero_point.astype(wide), values.shape)
    return (values.astype(wide) - zero).astype(dtype)


def dequantize(
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`(values - zero_point) * scale` blockwise, computed in float32 or wider, cast to `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    floats = centered(values, zero_point, wide)
    return (floats * spread_blocks(scale.astype(wide), values.shape)).astype(dtype)
