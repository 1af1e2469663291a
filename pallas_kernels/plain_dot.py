"""The two dots everything else is made of: floats, and int8 with int32 sums.

Used by the reference; plain arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.pallas_kernels.dot_axes import DotAxes


def plain_dot(
    x: jax.Array,
    w: jax.Array,
    axes: DotAxes,
    precision: Any,
    sums: Any,
    *,
    on_cpu: bool = False,
) -> jax.Array:
    """lax.dot_general of x and w on their sides, with sums (and a result) of dtype `sums`.

    With `on_cpu`, narrow floats with wider sums have x on the left and a barrier behind: XLA's CPU
    backend folds the transpose of such a product's result into the product, and then refuses to
    run it ("Unsupported element type: BF16 x BF16 = F32").
    """
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < np.dtype(sums).itemsize
    if on_cpu and narrow:
        if axes.weight_side == "lhs" and isinstance(precision, tuple):
            precision = precision[::-1]
        out = plain_dot(x, w, axes.x_first, precision, sums)
        return move_weight(lax.optimization_barrier(out), axes)
    left, right = (x, w) if axes.weight_side == "rhs" else (w, x)
    return lax.dot_general(
        left, right, axes.dimension_numbers, precision=precision, preferred_element_type=sums
    )


def move_weight(out: jax.Array, axes: DotAxes) -> jax.Array:
    """A result from the layout with the weight on the right to that of `axes`."""
    if axes.weight_side == "rhs":
        return out
    batch, rows = len(axes.x_batch), len(axes.x_free)
    return jnp.moveaxis(out, range(batch, batch + rows), range(out.ndim - rows, out.ndim))


def int32_dot(codes: jax.Array, values: jax.Array, axes: DotAxes) -> jax.Array:
    """int8 x int8 -> int32.

    A single row gets a row of zeros for company: XLA's CPU backend turns a matrix-vector product
    of integers into a loop that takes five times as long.
    """
    if axes.rows(codes.shape) != 1:
        return plain_dot(codes, values, axes, None, jnp.int32)
    if not axes.x_free:
        out = int32_dot(codes[None], values, axes.with_x_row)
        return lax.squeeze(out, [len(axes.x_batch)])
    axis = axes.x_free[0]
    padding = [(0, int(a == axis), 0) for a in range(codes.ndim)]
    out = plain_dot(lax.pad(codes, np.int8(0), padding), values, axes, None, jnp.int32)
    return lax.slice_in_dim(out, 0, 1, axis=len(axes.x_batch))
