"""From a range of values per block to scale and zero point, and scales of scales.

Called by `quantize_array` and by algorithms that find ranges themselves. A range is a pair
(lo, hi) of float32 arrays with one value a block. Rounding weights is `jaxquant.core.codes`.

Zero, denormal and huge blocks: a block of zeros gets scale 1 (0 on the symmetric odd grids of
int2 and int1, which have no zero code); a scale is never denormal, so dividing by it is safe,
at the price of an absolute error below 1e-37; a scale is never so large that reading a code
back overflows the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.blocks import divisors, reduce_blocks
from jaxquant.core.codes import encode
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType, get_qtype

DOUBLE_QUANT_BLOCK = 256
_MAX_E2M1 = 6.0


def scale_from_range(
    lo: jax.Array,
    hi: jax.Array,
    qtype: QType,
    *,
    symmetric: bool = True,
    scale_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point that spread a qtype's codes over [lo, hi].

    Symmetric: scale = max(|lo|, |hi|) / qmax. Asymmetric: the range is widened to include 0,
    scale = (hi - lo) / (qmax - qmin) and zero_point = the code nearest to where 0 falls, so that
    zero is exact. (Where lo and hi are both near the dtype's largest values, one end of the grid
    would overflow; there the scale is less, and the other end is off by up to one scale.) mxfp4
    takes the power of two 2^(floor(log2 max) - 2) (OCP MX 1.0, section 6.3), which saturates
    values above 6.

    Args:
      lo: least value of each block, float32.
      hi: greatest value of each block, float32.
      qtype: target type.
      symmetric: False for a zero point (integer types only).
      scale_dtype: dtype of the scale; a type that prescribes one overrides it.
      dtype: dtype of the weight, whose largest value no code may exceed.

    Returns:
      Scale in its dtype and zero point (int8) or None, both of lo's shape.

    Raises:
      ValueError: asymmetric, but the type has no zero point.
    """
    if qtype.scale_dtype is not None:
        return _power_of_two(jnp.maximum(-lo, hi)).astype(qtype.scale_dtype), None
    if symmetric:
        amax = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
        zero = 0.0 if qtype.step == 2 else 1.0
        return _storable(amax / qtype.qmax, amax == 0, zero, scale_dtype, dtype, qtype.qmax), None
    if not qtype.asymmetric:
        raise ValueError(f"{qtype.name} has no zero point; use symmetric=True")
    lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    units = qtype.qmax - qtype.qmin
    is_zero = lo == hi
    # Neither the difference of huge values nor quotients of tiny ones can be represented.
    width = jnp.where(hi - lo > 1.0, hi / units - lo / units, (hi - lo) / units)
    rough = jnp.where(is_zero, 1.0, jnp.maximum(width, _tiny(scale_dtype)))
    below = qtype.step * jnp.clip(jnp.round(-lo / rough / qtype.step), 0, units // qtype.step)
    reach = jnp.maximum(below, units - below)
    scale = _storable(rough, is_zero, 1.0, scale_dtype, dtype, reach)
    # A block of zeros has zero point 0 where the grid has that code.
    below = jnp.where(is_zero, -qtype.qmin - (qtype.step - 1), below)
    return scale, (below + qtype.qmin).astype(jnp.int8)


def nvfp4_scale(amax: jax.Array, outer_shape: Sequence[int]) -> QTensor:
    """NVFP4's two-level scale: float8_e4m3 per block, float32 per tensor.

    g = (amax of the tensor) / (448 * 6); block scale = e4m3(amax / 6 / g) * g. A block's e4m3
    is at least its least positive value, 2^-9, so no block is lost.

    Args:
      amax: largest magnitude of each block, float32.
      outer_shape: shape of g: sizes 1 or amax's own (one g a layer or expert).

    Returns:
      A QTensor of amax's shape.
    """
    inner = get_qtype("float8_e4m3")
    outer_blocks = [n // s for n, s in zip(amax.shape, outer_shape, strict=True)]
    top = reduce_blocks(amax, outer_blocks, jnp.max)
    reach = _MAX_E2M1 * inner.qmax
    g = _storable(top / reach, top == 0, 1.0, jnp.float32, jnp.float32, reach)
    g = jnp.maximum(g, _tiny(jnp.float32) * 2.0**9)
    codes = encode(amax / _MAX_E2M1, g, None, inner)
    least = jnp.asarray(2.0**-9, codes.dtype)
    return QTensor(jnp.where(codes == 0, least, codes), g, qtype=inner)


def double_quantize(scale: jax.Array, kept_axes: Sequence[int] = ()) -> QTensor:
    """Stores scales in 8 bits: int8 codes, a float32 scale and zero point per 256 of them.

    QLoRA (arXiv 2305.14314, section 3) subtracts the mean of all scales and keeps signed 8-bit
    values in blocks of 256. Here every block has an offset of its own, the middle of its range,
    so that slices of a stacked weight stay self-contained and all 256 codes are used: with
    lo, hi the block's extremes, s2 = (hi - lo) / 255 and scale = (code - zero_point) * s2 where
    zero_point = -(lo + hi) / (2 * s2), which is real. The error is at most s2 / 2. The cost is
    8 bits a scale and 64 a block: at 64 weights a scale, 0.129 bits a weight instead of 0.5.

    A block is a rectangle of at most 256 scales, filled from the last axis backwards by each
    axis' largest divisor that fits; it never spans `kept_axes`.

    Args:
      scale: positive floats.
      kept_axes: axes, such as those of layers and experts, where every index keeps its own.

    Returns:
      A QTensor of the same shape and dtype.
    """
    qtype = get_qtype("int8")
    kept = {axis % scale.ndim for axis in kept_axes}
    block, room = [1] * scale.ndim, DOUBLE_QUANT_BLOCK
    for axis in reversed(range(scale.ndim)):
        if axis not in kept:
            block[axis] = max(d for d in divisors(scale.shape[axis]) if d <= room)
            room //= block[axis]
    values = scale.astype(jnp.float32)
    lo, hi = reduce_blocks(values, block, jnp.min), reduce_blocks(values, block, jnp.max)
    middle = lo + (hi - lo) / 2  # no over- or underflow
    # A range this narrow (one value, most often) is one code: middle = (0 - -1) * middle.
    narrow = hi - lo <= hi * 2.0**-16
    step = jnp.maximum(jnp.where(narrow, middle, (hi - lo) / 255), _tiny(jnp.float32))
    zero_point = jnp.where(narrow, -1.0, -middle / step)
    codes = encode(values, step, zero_point, qtype)
    return QTensor(codes, step, zero_point, qtype=qtype, dtype=jnp.dtype(scale.dtype))


def kept_axes(block_shape: Sequence[int], stack_axes: Sequence[int] | None) -> tuple[int, ...]:
    """Axes along which an outer scale (nvfp4, double quantization) keeps every index.

    Args:
      block_shape: blocks of the weight.
      stack_axes: axes of layers and experts where they are known. Where they are not (None),
        all axes before the first one with blocks are taken: a leading layer axis among them.

    Returns:
      Axis numbers, not negative.
    """
    if stack_axes is not None:
        return tuple(sorted(axis % len(block_shape) for axis in stack_axes))
    first = next((i for i, b in enumerate(block_shape) if b > 1), 0)
    return tuple(range(first))


def _tiny(dtype: Any) -> float:
    return float(jnp.finfo(dtype).tiny)


def _storable(
    scale: jax.Array, is_zero: jax.Array, at_zero: float, scale_dtype: Any, dtype: Any, reach: Any
) -> jax.Array:
    """Clamps a scale so that neither it nor `reach * scale` under- or overflows; casts it."""
    info = jnp.finfo(scale_dtype)
    limit = float(jnp.finfo(dtype).max) * (1.0 - 2.0 * float(info.eps)) / reach
    largest = jnp.minimum(limit, float(info.max))
    bounded = jnp.clip(scale, float(info.tiny), largest)
    return jnp.where(is_zero, at_zero, bounded).astype(scale_dtype)


def _power_of_two(amax: jax.Array) -> jax.Array:
    """2^(floor(log2 amax) - 2) as float32, at least 2^-126; 1 for zero."""
    exponent = (jax.lax.bitcast_convert_type(amax, jnp.int32) >> 23) & 0xFF  # biased by 127
    bits = jnp.maximum(exponent - 2, 1) << 23
    return jnp.where(amax == 0, 1.0, jax.lax.bitcast_convert_type(bits, jnp.float32))
