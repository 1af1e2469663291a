"""The quantized dot_general in XLA ops: the fallback of every kernel, and their oracle.

Called by the lowering of `jaxquant.core.primitives.quantized_dot_general` and by kernels' tests;
plain arrays in and out. A weight is given as `values` (unpacked integer codes, 8-bit floats, or
floats out of a table) with `w = (values - zero_point) * scale`, blockwise.

The rules: a scale that is constant over the contracted axes multiplies the output; one that
varies only along them multiplies the input; group scales multiply partial sums, or the weight
before a float dot. int8 and int4 activations meet integer codes in a dot of int8 with int32 sums,
where a zero point costs one sum over each row of x and is exact. `choose_dot` picks the form.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels import int4_columns
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.blocks import centered, dequantize, spread_axis, spread_blocks
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers, Side
from jaxquant.pallas_kernels.dot_method import DotMethod, choose_dot
from jaxquant.pallas_kernels.plain_dot import int32_dot, move_weight, plain_dot


def dot_general(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    quantized_x: tuple[jax.Array, jax.Array] | None = None,
    *,
    dimension_numbers: DotDimensionNumbers,
    weight_side: Side = "rhs",
    act: ActQuant | None = None,
    precision: Any = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    method: DotMethod | None = None,
    on_cpu: bool = False,
) -> jax.Array:
    """Product of an activation and a quantized weight.

    Sums are float32 (float64 for float64 input) or int32, whatever the dtype of x.

    Args:
      x: the activation, floats.
      values: the weight's values: int8, int4, an 8-bit float, or floats.
      scale: floats of the weight's rank; each size divides the weight's.
      zero_point: None, or in code units and of the scale's shape; integers or floats.
      input_scale: the static activation scale, of the weight's rank; size 1 on contracted axes.
      quantized_x: codes and scale that x was already quantized to by `act`; x is not read then.
      dimension_numbers: as lax.dot_general takes them, in the order left, right.
      weight_side: which operand the weight is.
      act: how x is quantized first, or None.
      precision: as for lax.dot_general; used by float dots only.
      out_dtype: dtype of the result.
      method: the form to use; None lets `choose_dot` pick one. Others must fit the operands.
      on_cpu: multiply 8-bit floats as bfloat16, which holds them exactly and is twice as fast
        without an fp8 unit; read int4 codes two at a time where that pays.

    Returns:
      Array laid out as lax.dot_general's.

    Raises:
      ValueError: input_scale varies along a contracted axis, or is missing.
    """
    axes = DotAxes.make(dimension_numbers, x.ndim, values.ndim, weight_side)
    if act is not None and act.static and input_scale is not None:
        _check_input_scale(input_scale, axes)
        for axis in axes.w_free:
            if input_scale.shape[axis] != 1:
                weight = values, scale, zero_point, input_scale
                options = {"act": act, "precision": precision, "out_dtype": out_dtype}
                return _over_input_scales(x, weight, axis, axes, on_cpu=on_cpu, **options)
    if on_cpu and int4_columns.pays(axes.rows(x.shape), values, axes):

        def product(v: jax.Array, s: jax.Array, z: jax.Array | None) -> jax.Array:
            return dot_general(
                x,
                v,
                s,
                z,
                input_scale,
                quantized_x,
                dimension_numbers=dimension_numbers,
                weight_side=weight_side,
                act=act,
                precision=precision,
                out_dtype=out_dtype,
                method=method,
                on_cpu=True,
            )

        out_axis = axes.weight_out_axis(values.ndim - 1)
        return int4_columns.in_halves(product, values, scale, zero_point, out_axis)
    if method is None:
        method = choose_dot(x.shape, values.shape, values.dtype, scale.shape, axes, act).method
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale = scale.astype(wide)
    if act is None:
        out = _float_dot(method, x, values, scale, zero_point, axes, precision, on_cpu)
        return out.astype(out_dtype)
    if quantized_x is None:
        static_scale = None
        if act.static and input_scale is not None:
            static_scale = axes.w_to_x(input_scale)
        quantized_x = quantize_activation(x, act, static_scale)
    codes, x_scale = quantized_x[0], quantized_x[1].astype(wide)
    if method in (DotMethod.INT8, DotMethod.INT8_GROUPS, DotMethod.INT8_LOOP):
        first = axes.x_first
        out = _integer_dot(method, codes, values, scale, zero_point, first)
        return move_weight(out * first.x_to_out(x_scale), axes).astype(out_dtype)
    if method is DotMethod.FP8:
        if on_cpu:
            codes, values = codes.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
        out = plain_dot(codes, values, axes, None, wide, on_cpu=on_cpu)
        out = out * _to_out(scale, axes, values.shape)
    else:
        # Codes of 8 bits are exact in every float dtype: rounding happened once, in the codes.
        floats = codes.astype(x.dtype)
        out = _float_dot(method, floats, values, scale, zero_point, axes, precision, on_cpu)
    return (out * axes.x_to_out(x_scale)).astype(out_dtype)


def _check_input_scale(input_scale: jax.Array, axes: DotAxes) -> None:
    for axis in axes.w_contract:
        if input_scale.shape[axis] != 1:
            raise ValueError(
                f"input_scale has size {input_scale.shape[axis]} on the weight's contracted axis "
                f"{axis}; one static scale must cover all contracted values"
            )


def _to_out(scale: jax.Array, axes: DotAxes, w_shape: tuple[int, ...]) -> jax.Array:
    """A scale that is constant over contracted axes, laid out to fit the result."""
    return axes.w_to_out(spread_blocks(scale, w_shape))


def _float_dot(
    method: DotMethod,
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    axes: DotAxes,
    precision: Any,
    on_cpu: bool,
) -> jax.Array:
    """The product of floats with the weight; the result is in the dtype of the sums."""
    sums = scale.dtype
    dot = functools.partial(plain_dot, precision=precision, sums=sums, on_cpu=on_cpu)
    if method is DotMethod.DEQUANTIZE:
        return dot(x, dequantize(values, scale, zero_point, x.dtype), axes)
    w = centered(values, zero_point, x.dtype)
    if method is DotMethod.SCALED_INPUT:
        spread = axes.w_to_x(spread_blocks(scale, values.shape))
        return dot((x.astype(sums) * spread).astype(x.dtype), w, axes)
    if method is DotMethod.GROUPS:
        x, w, scale = _by_group((x, w, scale), scale.shape, axes)
        axes = axes.stacked
        return jnp.sum(dot(x, w, axes) * _to_out(scale, axes, w.shape), axis=0)
    return dot(x, w, axes) * _to_out(scale, axes, values.shape)


def _integer_dot(
    method: DotMethod,
    codes: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    axes: DotAxes,
) -> jax.Array:
    """Integer codes on both sides, with the weight's scales applied; the weight on the right."""
    operands = codes.astype(jnp.int8), values.astype(jnp.int8), scale, zero_point
    if method is DotMethod.INT8:
        return _scaled_integer_dot(operands, axes)
    groups = _by_group(operands, scale.shape, axes)
    if method is DotMethod.INT8_GROUPS:
        return jnp.sum(_scaled_integer_dot(groups, axes.stacked), axis=0)

    def add(total: jax.Array, group: tuple[Any, ...]) -> tuple[jax.Array, None]:
        return total + _scaled_integer_dot(group, axes), None

    batch = [codes.shape[a] for a in axes.x_batch]
    rows, columns = [codes.shape[a] for a in axes.x_free], [values.shape[a] for a in axes.w_free]
    return lax.scan(add, jnp.zeros((*batch, *rows, *columns), scale.dtype), groups)[0]


def _scaled_integer_dot(operands: tuple[Any, ...], axes: DotAxes) -> jax.Array:
    """One integer dot, its exact zero point correction, and the weight's scale per column."""
    codes, values, scale, zero_point = operands
    sums = int32_dot(codes, values, axes)
    if zero_point is not None:
        row_sums = axes.x_to_out(jnp.sum(codes, axes.x_contract, jnp.int32, keepdims=True))
        zero = _to_out(zero_point, axes, values.shape)
        if jnp.issubdtype(zero.dtype, jnp.integer):
            sums = sums - row_sums * zero.astype(jnp.int32)
        else:
            sums = sums.astype(scale.dtype) - row_sums.astype(scale.dtype) * zero.astype(
                scale.dtype
            )
    return sums.astype(scale.dtype) * _to_out(scale, axes, values.shape)


def _by_group(
    operands: tuple[Any, ...], scale_shape: tuple[int, ...], axes: DotAxes
) -> tuple[Any, ...]:
    """Adds a leading axis over the groups of contracted values to (x, w, scale[, zero_point]).

    The axes keep their numbers behind it; a contracted axis keeps the length of one group.
    """
    counts = [scale_shape[a] for a in axes.w_contract]
    x, *weight = operands
    parts = (None if w is None else _split_off(w, axes.w_contract, counts) for w in weight)
    return _split_off(x, axes.x_contract, counts), *parts


def _split_off(array: jax.Array, axes: tuple[int, ...], counts: list[int]) -> jax.Array:
    shape: list[int] = []
    place = {}
    for axis, size in enumerate(array.shape):
        if axis in axes:
            count = counts[axes.index(axis)]
            place[axis] = len(shape)
            shape += [count, size // count]
        else:
            shape.append(size)
    front = [place[a] for a in axes]
    rest = [i for i in range(len(shape)) if i not in front]
    array = lax.transpose(array.reshape(shape), (*front, *rest))
    return array.reshape(math.prod(counts), *(shape[i] for i in rest))


def _over_input_scales(
    x: jax.Array, weight: tuple[Any, ...], axis: int, axes: DotAxes, **options: Any
) -> jax.Array:
    """One product for each static input scale along a free axis of the weight (stacked experts)."""
    size = weight[0].shape[axis]

    def one(*slices: Any) -> jax.Array:
        inner = axes.without_w_free(axis)
        return dot_general(
            x,
            *slices,
            dimension_numbers=inner.dimension_numbers,
            weight_side=axes.weight_side,
            **options,
        )

    spread = [None if part is None else spread_axis(part, axis, size) for part in weight]
    mapped = [None if part is None else axis for part in weight]
    return jax.vmap(one, mapped, axes.weight_out_axis(axis))(*spread)
