"""Codes and the numbers they stand for: `encode` rounds to nearest, `code_values` reads back.

Called by `quantize_array`, `QTensor.dequantize` and by algorithms that choose scales themselves
(GPTQ, HQQ ...). Codes here are never bit-packed; packing is `jaxquant.pallas_kernels.packing`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.blocks import map_blocks
from jaxquant.core.qtypes import QType


def code_values(codes: jax.Array, qtype: QType, dtype: Any = jnp.float32) -> jax.Array:
    """The numbers that unpacked codes stand for, before zero point and scale.

    Args:
      codes: unpacked codes (`QTensor.unpacked_codes`), any shape.
      qtype: their type.
      dtype: float dtype of the result; every value is exact in bfloat16, except nf4's.

    Returns:
      Array of the codes' shape.
    """
    if qtype.table is None:
        return codes.astype(dtype)
    # A tree of selects over the four bits: vectorizes everywhere, where a gather does not.
    index = codes.astype(jnp.int32) + 8
    values: list[Any] = [jnp.asarray(v, dtype) for v in qtype.table]
    for bit in range(4):
        is_set = ((index >> bit) & 1).astype(bool)
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def encode(w: jax.Array, scale: jax.Array, zero_point: jax.Array | None, qtype: QType) -> jax.Array:
    """Rounds to the nearest code; ties to even on the integer and float grids.

    Args:
      w: floats, any shape.
      scale: float array with one value a block (its sizes divide w's). Blocks of scale 0 get
        the code nearest to zero.
      zero_point: None (the symmetric grid) or an array of the scale's shape, in code units.
      qtype: the type to encode to.

    Returns:
      Unpacked codes of w's shape and dtype `qtype.unpacked_storage`.
    """
    scale = scale.astype(jnp.float32)
    parts = [scale] if zero_point is None else [scale, zero_point.astype(jnp.float32)]

    def fn(x: jax.Array, s: jax.Array, *z: jax.Array) -> jax.Array:
        s = jnp.where(s == 0, 1.0, s)
        # XLA multiplies by 1 / s, which for a huge s would be denormal and flushed to zero.
        factor = jnp.where(s > 1.0, 0.25, 1.0)
        y = (x.astype(jnp.float32) * factor) / (s * factor)
        return nearest_code(y + z[0] if z else y, qtype, symmetric=not z)

    return map_blocks(fn, w, *parts)


def nearest_code(y: jax.Array, qtype: QType, *, symmetric: bool) -> jax.Array:
    """Nearest code of scaled values (`w / scale + zero_point`), float32 of any shape."""
    storage = jnp.dtype(qtype.unpacked_storage)
    if qtype.kind == "int":
        lowest = -qtype.qmax if symmetric else qtype.qmin
        code = jnp.round(y) if qtype.step == 1 else 2.0 * jnp.floor(y / 2.0) + 1.0
        # By way of int8: XLA's CPU backend has no fast float -> int4 conversion.
        return jnp.clip(code, lowest, qtype.qmax).astype(jnp.int8).astype(storage)
    if qtype.kind == "float":
        return jnp.clip(y, qtype.qmin, qtype.qmax).astype(storage)
    assert qtype.table is not None
    if qtype.name == "nf4":
        table = np.asarray(qtype.table, np.float32)
        rank = sum((y > mid).astype(jnp.int8) for mid in (table[1:] + table[:-1]) / 2)
        return (rank - jnp.int8(8)).astype(storage)
    return _e2m1_code(y).astype(storage)


def _e2m1_code(y: jax.Array) -> jax.Array:
    """Bits of the nearest E2M1 float as int8 in -8..7; ties to the even mantissa; never -0."""
    size = jnp.abs(y)
    mids = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    steps = [size > mid if i % 2 == 0 else size >= mid for i, mid in enumerate(mids)]
    magnitude = sum(step.astype(jnp.int8) for step in steps)
    return jnp.where((y < 0) & (magnitude > 0), magnitude - jnp.int8(8), magnitude)
