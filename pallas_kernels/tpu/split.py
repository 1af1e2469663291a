"""x cut into parts that narrower matrix units multiply exactly.

Called by `tpu.prepare` where int4 codes are multiplied as float8 (`MatmulConfig.operand`) and x has
more bits than that. A push of float8 brings twice as many weights into the matrix units as one of
bfloat16, and int4 codes are exact in float8_e4m3fn, which has four significant bits. bfloat16 has
eight, int8 seven and a sign: x is the sum of its rounded value and a remainder of four bits,

    x = high + low / 16,    high = e4m3(x),    low = e4m3(16 (x - high)),

whichever way the conversion rounds. Rows of bfloat16 are first multiplied by a power of two that
brings the largest magnitude of a row to 128 .. 256. Values down to 2^-13 of that are exact; smaller
ones, whose low part has fewer bits left, are off by at most 2^-21 of it: less than float32 sums
are. A row with an infinity becomes NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.reading import LANES

PARTS = 2
_LOW = 16.0
# Bits of a float32: its exponent; the largest magnitude of a row is brought to 2^7 .. 2^8.
_EXPONENT, _MANTISSA_BITS, _BIAS, _WANTED = 0x7F800000, 23, 127, 7


def parts(problem: MatmulProblem, config: MatmulConfig) -> int:
    """How many parts x has in a kernel: 1 if it is multiplied as it is."""
    narrow = config.operand.startswith("float8")
    return PARTS if narrow and problem.x_dtype not in (config.operand, "int4") else 1


def needs_factor(problem: MatmulProblem, config: MatmulConfig) -> bool:
    """Whether rows are multiplied by a power of two first: int8 lies in e4m3's range as it is."""
    return parts(problem, config) > 1 and problem.x_dtype != "int8"


def factors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What sums of rows are multiplied by, and, before them, the rows: float32 [m, 128] each.

    Powers of two, inverse to each other, all lanes alike.

    Args:
      x: [m, k] floats, m a multiple of 8.
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True)
    largest = jnp.broadcast_to(largest, (x.shape[0], LANES))
    exponent = pltpu.bitcast(largest, jnp.int32) & _EXPONENT
    # Rows of next to nothing, or zeros, get a factor that is still a number, as its inverse is.
    down = jnp.maximum(exponent - (_WANTED << _MANTISSA_BITS), 1 << _MANTISSA_BITS)
    up = (2 * _BIAS << _MANTISSA_BITS) - down
    finite = exponent != _EXPONENT
    up, down = (pltpu.bitcast(bits, jnp.float32) for bits in (up, down))
    return jnp.where(finite, down, jnp.nan), up


def separated(copies: Sequence[jax.Array], dtype: str) -> jax.Array:
    """The parts of x, all high ones first: [PARTS * copies * m, k] of `dtype`.

    Args:
      copies: of x, each bfloat16 [m, k], rows multiplied by their factor.
      dtype: float8_e4m3fn.
    """
    highs = [x.astype(dtype).astype(x.dtype) for x in copies]
    # In bfloat16, of which these chips have arithmetic: a power of two rounds nothing.
    lows = [(x - high) * _LOW for x, high in zip(copies, highs, strict=True)]
    return jnp.concatenate([*highs, *lows], axis=0).astype(dtype)


def rows_of(sums: jax.Array, copy: int, rows: int, copies: int, parts: int) -> jax.Array:
    """Those of one copy's rows, of all parts: [parts * rows, n] of [parts * copies * rows, n].

    The sums of parts are scaled and added up apart, and `joined` at the end: what follows each
    other within a group is shorter so than if they were joined there.
    """
    firsts = [(part * copies + copy) * rows for part in range(parts)]
    own = [sums[first : first + rows, :] for first in firsts]
    return own[0] if parts == 1 else jnp.concatenate(own, axis=0)


def without(sums: jax.Array, correction: jax.Array) -> jax.Array:
    """Sums of parts [parts * rows, n], a correction [rows, n] taken out of what they join to."""
    rows = correction.shape[0]
    if sums.shape[0] == rows:
        return sums - correction
    return jnp.concatenate([sums[:rows] - correction, sums[rows:]], axis=0)


def joined(sums: jax.Array, parts: int) -> jax.Array:
    """The sums of x [rows, n] from those of its parts [parts * rows, n]."""
    if parts == 1:
        return sums
    rows = sums.shape[0] // parts
    return sums[:rows] + sums[rows:] * (1 / _LOW)
