"""Convolution and ragged dot with quantized weights in XLA ops.

Called by the lowerings of `jaxquant.core.primitives`; plain arrays in and out. A scale that is
constant over what is summed multiplies the output, other scales multiply the weight first. The
input is quantized only where an `ActQuant` says so: XLA has no integer form of either that is
faster than floats on every platform (on CPU it widens the codes to int32 and loops). Without it
both functions are linear in x.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.blocks import centered, dequantize, spread_axis, spread_blocks
from jaxquant.pallas_kernels.dot_method import MOST_INT32_TERMS


class LinearMethod(enum.Enum):
    """The forms of a convolution or ragged dot; the values are the names shown in plans."""

    INT8 = "int8 {}"
    CODES = "float {} on codes"
    DEQUANTIZE = "dequantize, then float {}"


class LinearChoice(NamedTuple):
    """A method and the reason for it, in words."""

    method: LinearMethod
    reason: str


def choose_linear(
    w_dtype: np.dtype, terms: int, scales: str | None, zero_points: bool, act: ActQuant | None
) -> LinearChoice:
    """Picks the form; asked by the reference, which does it, and by the plan, which shows it.

    Args:
      w_dtype: dtype of the weight's values.
      terms: how many products one output sums.
      scales: in words, what has a scale of its own, if the output can take the scales; else None.
      zero_points: whether the weight has them.
      act: how the input is quantized, or None.
    """
    if scales is None:
        return LinearChoice(LinearMethod.DEQUANTIZE, "scales vary over what is summed")
    if act is None:
        return LinearChoice(LinearMethod.CODES, scales)
    if not (act.integer and jnp.issubdtype(w_dtype, jnp.integer)):
        reason = f"{act.dtype} activations meet {w_dtype} codes: multiplied as floats"
        return LinearChoice(LinearMethod.CODES, reason)
    if zero_points:
        return LinearChoice(LinearMethod.CODES, "zero points: codes are multiplied as floats")
    if terms > MOST_INT32_TERMS:
        return LinearChoice(LinearMethod.CODES, f"sums of {terms} products could overflow int32")
    return LinearChoice(LinearMethod.INT8, f"{scales}; integer codes on both sides, int32 sums")


def conv_scales(scale_shape: tuple[int, ...], numbers: lax.ConvDimensionNumbers) -> str | None:
    """What has a scale of its own, if the output of a convolution can take the scales."""
    return "one scale per output feature" if _only(scale_shape, (numbers.rhs_spec[0],)) else None


def ragged_scales(scale_shape: tuple[int, ...]) -> str | None:
    """What has a scale of its own, if the output of a plain ragged dot can take the scales."""
    return "scales per expert and output column" if _only(scale_shape, (0, 2)) else None


def _only(scale_shape: tuple[int, ...], kept: tuple[int, ...]) -> bool:
    return all(n == 1 for axis, n in enumerate(scale_shape) if axis not in kept)


def conv_general_dilated(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    out_dtype: jax.typing.DTypeLike,
    act: ActQuant | None = None,
    quantized_x: Sequence[jax.Array] = (),
    **params: Any,
) -> jax.Array:
    """`lax.conv_general_dilated(x, w)` for `w = (values - zero_point) * scale`.

    Args:
      x: floats, [..] as `dimension_numbers.lhs_spec` says.
      values: the kernel's values, integers or floats.
      scale: floats of the kernel's rank; each size divides the kernel's.
      zero_point: None, or of the scale's shape.
      input_scale: for a static `act`, one value.
      dimension_numbers: of jax.lax.
      out_dtype: dtype of the result.
      act: how x becomes codes: with one scale an image (all axes but the batch share it) or one in
        all. Padding is code 0, which is exact. None leaves x as it is.
      quantized_x: codes and scale that x was already quantized to by `act`.
      **params: the rest of lax.conv_general_dilated's arguments, without
        preferred_element_type.

    Returns:
      Array laid out as lax.conv_general_dilated's.
    """
    out_features = dimension_numbers.rhs_spec[0]
    terms = values.size // max(values.shape[out_features], 1)
    scales = conv_scales(scale.shape, dimension_numbers)
    method, _ = choose_linear(values.dtype, terms, scales, zero_point is not None, act)
    params["dimension_numbers"] = dimension_numbers

    def multiply(x: jax.Array, w: jax.Array, sums: Any) -> jax.Array:
        return lax.conv_general_dilated(x, w, preferred_element_type=sums, **params)

    x, x_scale = _quantized(x, act, input_scale, method, quantized_x)
    out = _multiply(multiply, method, x, values, scale, zero_point, x_scale)
    if x_scale is not None:
        per_image = [1] * out.ndim
        per_image[dimension_numbers.out_spec[0]] = x_scale.size
        out = out * x_scale.reshape(per_image)
    if method is not LinearMethod.DEQUANTIZE:
        per_feature = [1] * out.ndim
        per_feature[dimension_numbers.out_spec[1]] = -1
        spread = spread_axis(scale.astype(out.dtype), out_features, values.shape[out_features])
        out = out * spread.reshape(per_feature)
    return out.astype(out_dtype)


def ragged_dot_general(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    input_scale: jax.Array | None,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    act: ActQuant | None = None,
    quantized_x: Sequence[jax.Array] = (),
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
      input_scale: for a static `act`, one value.
      group_sizes: integers; how many rows of x belong to each expert.
      out_dtype: dtype of the result.
      act: how x becomes codes: with one scale a row in the plain form, or one in all. None leaves
        x as it is.
      quantized_x: codes and scale that x was already quantized to by `act`.
      **params: the rest of lax.ragged_dot_general's arguments, without preferred_element_type.

    Returns:
      Array laid out as lax.ragged_dot_general's.
    """
    plain = plain_ragged(x, values, group_sizes, params)
    scales = ragged_scales(scale.shape) if plain else None
    terms = values.shape[1] if plain else values.size
    method, _ = choose_linear(values.dtype, terms, scales, zero_point is not None, act)

    def multiply(x: jax.Array, w: jax.Array, sums: Any) -> jax.Array:
        return lax.ragged_dot_general(x, w, group_sizes, preferred_element_type=sums, **params)

    x, x_scale = _quantized(x, act, input_scale, method, quantized_x)
    out = _multiply(multiply, method, x, values, scale, zero_point, x_scale)
    if x_scale is not None:
        out = out * (x_scale if plain else x_scale.reshape(()))
    if method is not LinearMethod.DEQUANTIZE:
        experts, _, columns = values.shape
        per_column = spread_blocks(scale.astype(out.dtype), (experts, 1, columns))
        per_column = jnp.broadcast_to(per_column, (experts, 1, columns))[:, 0]
        ends = jnp.cumsum(group_sizes)
        rows = lax.broadcasted_iota(ends.dtype, (x.shape[0], 1), 0)
        expert = jnp.minimum(jnp.sum(rows >= ends, axis=1), experts - 1)
        out = out * per_column[expert]
    return out.astype(out_dtype)


def _quantized(
    x: jax.Array,
    act: ActQuant | None,
    input_scale: jax.Array | None,
    method: LinearMethod,
    quantized_x: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """What is multiplied in the place of x, and its scale."""
    if act is None:
        return x, None
    static = None
    if act.static and input_scale is not None:
        if input_scale.size != 1:
            raise ValueError(
                f"input_scale has shape {input_scale.shape}; a convolution or ragged dot takes one "
                "static scale for its whole input"
            )
        static = input_scale.reshape((1,) * x.ndim)
    codes, x_scale = quantized_x or quantize_activation(x, act, static)
    return codes.astype(jnp.int8 if method is LinearMethod.INT8 else x.dtype), x_scale


def _multiply(
    multiply: Any,
    method: LinearMethod,
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    x_scale: jax.Array | None,
) -> jax.Array:
    """The products, summed in float32 or wider (exactly, where all are integers)."""
    if method is LinearMethod.INT8:
        assert x_scale is not None
        return multiply(x, values.astype(jnp.int8), jnp.dtype("int32")).astype(x_scale.dtype)
    sums = jnp.promote_types(x.dtype, jnp.float32)
    if method is LinearMethod.DEQUANTIZE:
        return multiply(x, dequantize(values, scale, zero_point, x.dtype), sums)
    return multiply(x, centered(values, zero_point, x.dtype), sums)


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
