"""Computing a product in slices of rows, where its sums would be too large a temporary array.

Used by the reference on CPU. XLA's CPU backend keeps the int32 sums of an integer dot in memory
before they are scaled, and an allocation of tens of MiB comes from the system anew in every
call: at 2048 x 384 x 3072 the page faults took twice the time of the product.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.dot_axes import DotAxes

# Up to this many sums a product is computed in one piece (16 MiB of int32) ...
WHOLE_SUMS = 2**22
# ... and else in slices of about this many, which stay in the second-level or last-level cache.
SLICE_SUMS = 2**21


def map_row_slices(
    fn: Callable[..., jax.Array], parts: tuple[jax.Array, ...], axes: DotAxes, columns: int
) -> jax.Array:
    """`fn(*parts)`, in slices along the first axis of rows if the sums are many.

    Args:
      fn: of arrays over x's axes, to the result with the weight on the right.
      parts: x and what goes with it (its scale), each of x's rank.
      axes: of the product.
      columns: how many columns a row of x meets.

    Returns:
      The same as `fn(*parts)`.
    """
    x = parts[0]
    sums = axes.rows(x.shape) * columns
    long = [a for a in axes.x_free if x.shape[a] > 1]
    if sums <= WHOLE_SUMS or axes.x_batch or not long:
        return fn(*parts)
    axis = long[0]  # axes before it have size 1: cutting the result here moves no data
    length = x.shape[axis]
    counts = [n for n in range(1, length + 1) if length % n == 0]
    count = next((n for n in counts if sums / n <= SLICE_SUMS), length)
    cut = [part.shape[axis] == length for part in parts]
    slices = tuple(_cut(p, axis, count) for p, c in zip(parts, cut, strict=True) if c)

    def one(slices: tuple[jax.Array, ...]) -> jax.Array:
        remaining = iter(slices)
        whole = [next(remaining) if c else p for p, c in zip(parts, cut, strict=True)]
        return fn(*whole)

    at = axes.x_free.index(axis)
    out = jnp.moveaxis(lax.map(one, slices), 0, at)
    return out.reshape(*out.shape[:at], length, *out.shape[at + 2 :])


def _cut(part: jax.Array, axis: int, count: int) -> jax.Array:
    shape = part.shape
    part = part.reshape(*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :])
    return jnp.moveaxis(part, axis, 0)
