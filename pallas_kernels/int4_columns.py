"""Reading int4 weights two columns at a time, on CPU.

XLA's CPU backend converts int4 element by element, a nanosecond for four: for few rows that takes
longer than the product. Seen as bytes, a pair of neighbouring columns is two shifts, six times as
fast (2048 x 2048: 0.15 ms instead of 0.94); the product is then computed for even and odd columns
apart, and its columns are interleaved. Used by the reference; plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.blocks import spread_axis
from jaxquant.pallas_kernels.dot_axes import DotAxes

# Interleaving costs about this many times as much for an element of the result as the faster
# reading saves for an element of the weight.
INTERLEAVING_COST = 2


def pays(rows: int, values: jax.Array, axes: DotAxes) -> bool:
    """Whether the product is to be computed in two halves.

    Args:
      rows: how many rows of x meet one matrix of the weight.
      values: the weight's codes.
      axes: of the product.
    """
    if values.dtype != jnp.int4 or not axes.w_free or axes.w_free[-1] != values.ndim - 1:
        return False
    if not isinstance(rows, int):  # symbolic (jax.export): many
        return False
    contracted = math.prod(values.shape[a] for a in axes.w_contract)
    return values.shape[-1] % 2 == 0 and rows * INTERLEAVING_COST <= contracted


def in_halves(
    product: Callable[..., jax.Array],
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    out_axis: int,
) -> jax.Array:
    """`product(values, scale, zero_point)`, computed for even and odd columns apart.

    Args:
      product: of int8 codes with half of the columns, their scales and zero points.
      values: int4 codes; the last axis is free and even.
      scale: scales of the codes' rank.
      zero_point: None, or of the scale's shape.
      out_axis: where the last axis of the codes lies in the result.

    Returns:
      The result with all columns.
    """
    columns = values.shape[-1]
    pairs = lax.bitcast_convert_type(values.reshape(*values.shape[:-1], columns // 2, 2), jnp.int8)
    low, high = (pairs << 4) >> 4, pairs >> 4
    halves = [
        product(half, _every_second(scale, i, columns), _every_second(zero_point, i, columns))
        for i, half in enumerate((low, high))
    ]
    out = jnp.stack(halves, out_axis + 1)
    return out.reshape(*out.shape[:out_axis], columns, *out.shape[out_axis + 2 :])


def _every_second(part: jax.Array | None, first: int, columns: int) -> jax.Array | None:
    """The part's values for columns first, first + 2, ..."""
    if part is None or part.shape[-1] == 1:
        return part
    return spread_axis(part, part.ndim - 1, columns)[..., first::2]
