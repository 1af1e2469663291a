"""x cut into parts that narrower matrix units multiply exactly.

Called by `tpu.prepare` and `tpu.body` where integer codes are multiplied in 8 bits
(`MatmulConfig.operand`) and x has more bits than that. A push of 8-bit weights brings twice as many
of them into the matrix units as one of bfloat16, and less unpacking leads to them. Rows of
bfloat16, which has eight significant bits, are first multiplied by a power of two that brings the
largest magnitude of a row to a known range.

float8_e4m3fn, two parts, since it has four significant bits: x is a rounded value and a remainder,

    x = high + low / 16,    high = e4m3(x),    low = e4m3(16 (x - high)),

whichever way the conversion rounds. Rows' largest come to 128 .. 256; int8 needs no factor. int4
codes are exact in float8.

int8, three parts, each of seven bits and a sign, rows' largest in 64 .. 128:

    x = high + middle / 2^7 + low / 2^14,    high = int8(x),    middle = int8(2^7 (x - high)), ...

int8() drops what is behind the point, and the last rounds. Sums are exact integers.

Either way values down to 2^-13 of the largest of a row are exact, smaller ones are off by at most
2^-21 of it: less than float32 sums are. A row with an infinity becomes NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.epilogue import widen
from jaxquant.pallas_kernels.tpu.reading import LANES

# Parts of x by operand, the power of two between neighbouring ones, and the exponent to which the
# largest magnitude of a row is brought.
PARTS = {"float8_e4m3fn": 2, "int8": 3}
_APART = {"float8_e4m3fn": 4, "int8": 7}
_WANTED = {"float8_e4m3fn": 7, "int8": 6}
_LEAST = 2.0**-100  # a row whose largest is less is taken for one of this
_LARGEST = {"int8": 128, "int4": 8, "int3": 8, "int2": 6}  # magnitudes of operands


def parts(problem: MatmulProblem, config: MatmulConfig) -> int:
    """How many parts x has in a kernel: 1 if it is multiplied as it is."""
    own = problem.x_dtype in (config.operand, "int4")
    return 1 if own else PARTS.get(config.operand, 1)


def needs_factor(problem: MatmulProblem, config: MatmulConfig) -> bool:
    """Whether rows are multiplied by a power of two first: int8 lies in e4m3's range as it is."""
    return parts(problem, config) > 1 and problem.x_dtype != "int8"


def unit(operand: str) -> float:
    """What the sums of `joined` count in: 1 for x as it was multiplied by its rows' factors."""
    return 2.0 ** -(_APART["int8"] * (PARTS["int8"] - 1)) if operand == "int8" else 1.0


def factors(x: jax.Array, operand: str) -> tuple[jax.Array, jax.Array]:
    """What sums of rows are multiplied by, and, before them, the rows: float32 [m, 128] each.

    Powers of two, but for `unit` inverse to each other, all lanes alike. They are found by halving
    and doubling: libtpu's estimator knows no numbers that were made as bits.

    Args:
      x: [m, k] floats, m a multiple of 8.
      operand: "float8_e4m3fn" or "int8".
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True)
    # Rows of next to nothing, or zeros, get a factor that is still a number, as its inverse is.
    left = jnp.maximum(jnp.broadcast_to(largest, (x.shape[0], LANES)), _LEAST)
    up, down = jnp.ones_like(left), jnp.full_like(left, unit(operand))
    wanted = 2.0 ** _WANTED[operand]
    for bits in (64, 32, 16, 8, 4, 2, 1):
        more, less = 2.0**bits, 2.0**-bits
        large, small = left >= wanted * more, left < 2 * wanted * less
        up_by = jnp.where(large, less, jnp.where(small, more, 1.0))
        down_by = jnp.where(large, more, jnp.where(small, less, 1.0))
        left, up, down = left * up_by, up * up_by, down * down_by
    return jnp.where(left < 2 * wanted, down, jnp.nan), up


def separated(copies: Sequence[jax.Array], up: jax.Array | None, operand: str) -> jax.Array:
    """The parts of x, all high ones first: [parts * copies * m, k] of `operand`.

    Args:
      copies: of x, each bfloat16 [m, k].
      up: what rows are multiplied by first, as `factors` says.
      operand: "float8_e4m3fn" or "int8".
    """
    if operand == "int8":
        assert up is not None
        wide = widen(up, copies[0].shape[1])
        return _separated_integers([x.astype(jnp.float32) * wide for x in copies])
    if up is not None:
        copies = [x * widen(up, x.shape[1]).astype(x.dtype) for x in copies]
    highs = [x.astype(operand).astype(x.dtype) for x in copies]
    # In bfloat16, of which these chips have arithmetic: a power of two rounds nothing.
    lows = [(x - high) * 2 ** _APART[operand] for x, high in zip(copies, highs, strict=True)]
    return jnp.concatenate([*highs, *lows], axis=0).astype(operand)


def _separated_integers(rests: list[jax.Array]) -> jax.Array:
    found: list[jax.Array] = []
    for _ in range(PARTS["int8"] - 1):
        own = [rest.astype(jnp.int32) for rest in rests]
        found += own
        rests = [
            (rest - part.astype(jnp.float32)) * 2 ** _APART["int8"]
            for rest, part in zip(rests, own, strict=True)
        ]
    found += [jnp.minimum(jnp.round(rest), 127).astype(jnp.int32) for rest in rests]
    return jnp.concatenate(found, axis=0).astype(jnp.int8)


def rows_of(
    sums: jax.Array, copy: int, copies: int, problem: MatmulProblem, config: MatmulConfig
) -> jax.Array:
    """Those of one copy's rows, of [parts * copies * rows, n].

    Whole numbers are joined at once: [rows, n], as of `joined`. The sums of float8 parts are scaled
    and added up apart, [parts * rows, n], and `joined` at the end: what follows each other within a
    group is shorter so than if they were joined there.
    """
    count, rows = parts(problem, config), config.bm
    firsts = [(part * copies + copy) * rows for part in range(count)]
    own = [sums[first : first + rows, :] for first in firsts]
    if count == 1:
        return own[0]
    return _joined_integers(own, problem, config) if _whole(sums) else jnp.concatenate(own, axis=0)


def without(sums: jax.Array, correction: jax.Array) -> jax.Array:
    """Sums of parts [parts * rows, n], a correction [rows, n] taken out of what they join to."""
    rows = correction.shape[0]
    if sums.shape[0] == rows:
        return sums - correction
    return jnp.concatenate([sums[:rows] - correction, sums[rows:]], axis=0)


def joined(sums: jax.Array, problem: MatmulProblem, config: MatmulConfig) -> jax.Array:
    """The sums of x [rows, n], counted in `unit`, from those of its parts [parts * rows, n].

    Of sums that are joined already, the same.
    """
    count, rows = parts(problem, config), config.bm
    own = [sums[first : first + rows] for first in range(0, sums.shape[0], rows)]
    if count == 1 or len(own) == 1:
        return sums
    if _whole(sums):
        return _joined_integers(own, problem, config)
    return own[0] + own[1] * (1 / 2 ** _APART[config.operand])


def _whole(sums: jax.Array) -> bool:
    return jnp.issubdtype(sums.dtype, jnp.integer)


def _joined_integers(
    sums: Sequence[jax.Array], problem: MatmulProblem, config: MatmulConfig
) -> jax.Array:
    """As whole numbers where they fit, else as float32."""
    high, middle, low = sums
    once, twice = _APART["int8"], 2 * _APART["int8"]
    most = 127 * _LARGEST[problem.codes] * min(problem.group, config.bk)
    if most * (2**once + 1) < 2**31:
        rest = (middle << once) + low
    else:
        rest = middle.astype(jnp.float32) * 2.0**once + low.astype(jnp.float32)
    if most * (2**twice + 2**once + 1) < 2**31:
        return (high << twice) + rest
    return high.astype(jnp.float32) * 2.0**twice + rest.astype(jnp.float32)
