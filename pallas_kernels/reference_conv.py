"""Convolution and ragged dot with quantized weights in XLA ops; activations stay float.

Called by the lowerings of `jaxquant.core.primitives`; plain arrays in and out. XLA has no integer
form of either that is faster than floats on every platform, so only the weights are quantized:
a scale that is constant over what is summed multiplies the output, other scales multiply the
weight first. Both functions are linear in x.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.blocks import centered, dequantize, spread_axis, spread_blocks


def scales_output(scale_shape: tuple[int, ...], kept: tuple[int, ...]) -> bool:
    """Whether a scale is constant on all axes but `kept`, so that the output can take it."""
    return all(n == 1 for axis, n in enumerate(scale_shape) if axis not in kept)


def conv_general_dilated(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    out_dtype: jax.typing.DTypeLike,
    **params: Any,
) -> jax.Array:
    """`lax.conv_general_dilated(x, w)` for `w = (values - zero_point) * scale`.

    Args:
      x: floats, [..] as `dimension_numbers.lhs_spec` says.
      values: the kernel's values, integers or floats.
      scale: floats of the kernel's rank; each size divides the kernel's.
      zero_point: None, or of the scale's shape.
      dimension_numbers: of jax.lax.
      out_dtype: dtype of the result.
      **params: the rest of lax.conv_general_dilated's arguments, without
        preferred_element_type.

    Returns:
      Array laid out as lax.conv_general_dilated's.
    """
    sums = jnp.promote_types(x.dtype, jnp.float32)
    params |= {"dimension_numbers": dimension_numbers, "preferred_element_type": sums}
    out_features = dimension_numbers.rhs_spec[0]
    if not scales_output(scale.shape, (out_features,)):
        w = dequantize(values, scale, zero_point, x.dtype)
        return lax.conv_general_dilated(x, w, **params).astype(out_dtype)
    out = lax.conv_general_dilated(x, centered(values, zero_point, x.dtype), **params)
    per_feature = spread_axis(scale.astype(sums), out_features, values.shape[out_features])
    shape = [1] * out.ndim
    shape[dimension_numbers.out_spec[1]] = -1
    return (out * per_feature.reshape(shape)).astype(out_dtype)


def ragged_dot_general(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    **params: Any,
) -> jax.Array:
    """`lax.ragged_dot_general(x, w, group_sizes)` for `w = (values - zero_point) * scale`.

    In the plain form, [m, k] with [experts, k, n], a scale per expert and column multiplies each
    output row by the scale of the row's expert. Rows behind the last group are zero.

    Args:
      x: floats.
      values: the weight's values, integers or floats.
      scale: floats of the weight's rank; each size divides the weight's.
      zero_point: None, or of the scale's shape.
      group_sizes: integers; how many rows of x belong to each expert.
      out_dtype: dtype of the result.
      **params: the rest of lax.ragged_dot_general's arguments, without preferred_element_type.

    Returns:
      Array laid out as lax.ragged_dot_general's.
    """
    sums = jnp.promote_types(x.dtype, jnp.float32)
    params["preferred_element_type"] = sums
    if not (plain_ragged(x, values, group_sizes, params) and scales_output(scale.shape, (0, 2))):
        w = dequantize(values, scale, zero_point, x.dtype)
        return lax.ragged_dot_general(x, w, group_sizes, **params).astype(out_dtype)
    w = centered(values, zero_point, x.dtype)
    out = lax.ragged_dot_general(x, w, group_sizes, **params)
    experts, _, columns = values.shape
    per_column = spread_blocks(scale.astype(sums), (experts, 1, columns))
    per_column = jnp.broadcast_to(per_column, (experts, 1, columns))[:, 0]
    ends = jnp.cumsum(group_sizes)
    rows = lax.broadcasted_iota(ends.dtype, (x.shape[0], 1), 0)
    expert = jnp.minimum(jnp.sum(rows >= ends, axis=1), experts - 1)
    return (out * per_column[expert]).astype(out_dtype)


def plain_ragged(x: Any, values: Any, group_sizes: Any, params: dict[str, Any]) -> bool:
    """Whether this is [m, k] x [experts, k, n] with rows grouped by expert."""
    dims = params["ragged_dot_dimension_numbers"]
    pairs = tuple(tuple(map(tuple, pair)) for pair in dims.dot_dimension_numbers)
    return (
        (x.ndim, values.ndim, group_sizes.ndim) == (2, 3, 1)
        and pairs == (((1,), (1,)), ((), ()))
        and tuple(dims.lhs_ragged_dimensions) == (0,)
        and tuple(dims.rhs_group_dimensions) == (0,)
        and params.get("group_offset") is None
    )
