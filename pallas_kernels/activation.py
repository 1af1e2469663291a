"""Quantization of activations: one cheap pass from floats to codes and scales.

Called by the `quantize_activation` primitive, by the reference where a product is given floats, and
by kernels that take quantized inputs; plain arrays in and out. The ops emitted depend only on `x`,
the scheme and the axes, never on the weight: so one result can serve all dots that share an input
(Q, K and V; gate and up), by a pass or by XLA's common-subexpression elimination. Keep it so:
nothing of the weight's shape may enter here.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GREATEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
# Codes of a byte: what kernels without int4 inputs take.
BYTES = tuple(dtype for dtype in GREATEST if dtype != "int4")
# Ranges below this count as zero: the reciprocal of their scale would overflow float32.
SMALLEST_RANGE = 2.0**-100
# Adding 1.5 * 2**23 leaves a float32's value, rounded half to even, in its low mantissa bits.
# On CPU this takes half the time of round + convert, which XLA guards against NaN and overflow.
ROUNDER = np.float32(1.5 * 2**23)
_ROUNDER_BITS = np.int32(np.float32(1.5 * 2**23).view(np.int32))


@dataclasses.dataclass(frozen=True)
class ActQuant:
    """How an activation becomes codes.

    Attributes:
      dtype: dtype name of the codes: "int8", "int4", "float8_e4m3fn" or "float8_e5m2".
      reduce_axes: axes of x that share one scale: the contracted ones for a scale per token,
        all of them for a scale per tensor.
      static: the scale is given, not measured.
    """

    dtype: str
    reduce_axes: tuple[int, ...]
    static: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in GREATEST:
            raise ValueError(f"activations become one of {list(GREATEST)}, not {self.dtype!r}")

    @property
    def integer(self) -> bool:
        """Whether codes are integers: all are exact in int8."""
        return self.dtype.startswith("int")

    def behind_new_axis(self) -> ActQuant:
        """The same scheme after an axis, with scales of its own, was put in front of x."""
        return dataclasses.replace(self, reduce_axes=tuple(a + 1 for a in self.reduce_axes))


def quantize_activation(
    x: jax.Array, act: ActQuant, static_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Symmetric codes and scales of `x`, with `x ~ codes * scale`.

    Integer codes are `round(x / scale)`, half to even, within -127..127 (int4: -7..7); a scale is
    the largest magnitude over 127 (7 for int4, 448 for float8_e4m3fn, 57344 for float8_e5m2). A
    scale of zeros is tiny and positive. NaN and infinities make every output that depends on them
    NaN or infinite.

    Args:
      x: floats, any shape.
      act: scheme and axes.
      static_scale: for `act.static`, positive scales that broadcast against x.

    Returns:
      `(codes, scale)`: codes of x's shape; scale of x's rank with size 1 on `act.reduce_axes`,
      float32 (float64 for float64 input).

    Raises:
      ValueError: a static scheme without a scale.
    """
    compute = jnp.promote_types(x.dtype, jnp.float32)
    greatest = GREATEST[act.dtype]
    x = x.astype(compute)
    if act.static:
        if static_scale is None:
            raise ValueError(
                "a static activation scheme needs input_scale: calibrate, or use a dynamic one"
            )
        scale = lax.max(static_scale.astype(compute), _full_like(static_scale, compute))
        reach = scale * greatest
    else:
        reach = _absmax(x, act.reduce_axes)
        reach = lax.max(reach, _full_like(reach, compute))
        scale = reach * np.asarray(1 / greatest, compute)
    scaled = x * (np.asarray(greatest, compute) / reach)
    if act.static:  # a measured range holds all values, up to what rounding takes back
        limit = np.asarray(greatest, compute)
        scaled = lax.clamp(-limit, scaled, limit)
    if act.integer:
        return _round_to_int8(scaled).astype(act.dtype), scale
    return scaled.astype(act.dtype), scale


def _absmax(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    if not x.size:
        return jnp.zeros([1 if i in axes else n for i, n in enumerate(x.shape)], x.dtype)
    return jnp.max(lax.abs(x), axis=axes, keepdims=True)


def _full_like(scale: jax.Array, dtype: np.dtype) -> jax.Array:
    return lax.full(scale.shape, np.asarray(SMALLEST_RANGE, dtype))


def _round_to_int8(x: jax.Array) -> jax.Array:
    """Nearest integers, half to even, of values within -127.5..127.5; NaN becomes any code."""
    if x.dtype != jnp.float32:
        return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int8)
    bits = lax.bitcast_convert_type(x + ROUNDER, jnp.int32)
    return (bits - _ROUNDER_BITS).astype(jnp.int8)
