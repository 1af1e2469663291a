"""From stored codes to operands of the matrix units, inside a kernel.

Used by the bodies in this package. Codes that count, in several ways (tables: `tpu.lookup`):

* "cast": the compiler's own conversion.
* "bits": shifts and masks turn one 32-bit word of codes into pairs of bfloat16 numbers M + u, where
  u is the code counted from its lowest: u goes into the mantissa where it happens to lie, and the
  exponent is set so that it counts 1 there (M is 128 for the lowest bits, 64 one bit up, ...). What
  M adds is taken out of the sums, where it costs one product with x's row over the group.
* "nibbles", of int2 and int3, where the compiler converts a register of int4 in one operation:
  words of codes become words of int4 that hold twice the value, and those are converted. There is
  no offset.
* "pairs", of int2, where bytes are picked within registers: `tpu.pairs`.
* "bytes", of int8: each byte of a word becomes a float32 number, as with "bits" but without its
  offset, and then bfloat16. v4 has no conversion of its own that is as short.

Words hold the codes of a column that follow each other, so the operand's rows come out in another
order than stored; `source_row` says which, and x's columns follow suit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Codes whose order is shuffled among themselves: those of 8 rows of words (int3: of triples).
UNITS = {"int8": 32, "int4": 64, "int2": 128, "int3": 256, "table4": 64, "float8_e4m3fn": 32}
# Readings that take words apart: rows come out in the order of `source_row`.
SHUFFLED = ("bits", "nibbles", "pairs", "bytes", "e4m3", "e2m1")

_ROWS = 8  # of a register of 32-bit words
_MANTISSA = 7  # bits of bfloat16's
# The lowest code and the distance of neighbours.
_GRID = {"int4": (-8, 1), "int2": (-3, 2), "int3": (-4, 1)}
# By plane of 16 rows, each with a code of the low and one of the high half of every word: by how
# many bits the word is shifted to the right, and where in the halves the codes are then. int3: of
# each word of a triple, once it is shifted to where the middle one has its ten codes.
_INT4 = tuple((4 * i, 0, 0) for i in range(4))
_INT2 = tuple((s, 2 * i - s, 2 * i - s) for i, s in enumerate((-1, 0, 0, 5, 5, 5, 9, 9)))
_INT3 = tuple((s, 1 + 3 * i - s, 3 * i - s) for i, s in enumerate((0, 0, 6, 6, 12)))
_PLANES = {"int4": _INT4, "int2": _INT2, "int3": _INT3}


def step(codes: str, reading: str) -> float:
    """What the value of a code grows by when the operand does by 1."""
    if reading == "nibbles":
        return 0.5
    return _GRID[codes][1] if reading == "bits" else 1


def offsets(codes: str, rows: int, columns: int, *, stored: bool = False) -> jax.Array:
    """float32 [rows, columns]: what "bits" adds, operand minus value / step; exact in bfloat16.

    Args:
      codes: "int4", "int2" or "int3".
      rows: of the operand, whole units; of stored ones, whole words (of int3: triples).
      columns: all are alike.
      stored: of rows in the order in which the codes are stored.
    """
    lowest, distance = _GRID[codes]
    of_code = np.zeros(UNITS[codes] // _ROWS)
    for code, bit in _lowest_bits(codes).items():
        of_code[code] = 2.0 ** (_MANTISSA - bit) - lowest / distance
    position = np.arange(rows)
    order = position if stored else source_row(codes, "bits", position)
    row = lax.broadcasted_iota(jnp.int32, (16, columns), 0)
    tiles = []
    for tile in of_code[order % of_code.size].reshape(-1, 16):
        made = jnp.full((16, columns), tile[0], jnp.float32)
        for value in np.unique(tile):
            own = [row == i for i in np.flatnonzero(tile == value)]
            made = jnp.where(functools.reduce(jnp.logical_or, own), jnp.float32(value), made)
        tiles.append(made)
    return jnp.concatenate(tiles, axis=0)


def _lowest_bits(codes: str) -> dict[int, int]:
    """Where "bits" has the codes of a word (int3: of a triple) in the mantissa."""
    halves = {"int4": 4, "int2": 8, "int3": 5}[codes]
    starts = (0, 11, 22) if codes == "int3" else (0,)
    bits = {10: 0, 21: 0} if codes == "int3" else {}  # those across words
    for start in starts:
        for plane, (_, low, high) in enumerate(_PLANES[codes]):
            bits |= {start + plane: low, start + halves + plane: high}
    return bits


def source_row(codes: str, reading: str, position: Any) -> Any:
    """The stored row, within its unit, of the operand's row at `position` (arrays of int32)."""
    unit = UNITS[codes]
    start, p = (position // unit) * unit, position % unit
    at_once = {"nibbles": 8, "pairs": 4, "bytes": 1}.get(reading, 2)  # rows from one word
    plane, word, slot = p // (_ROWS * at_once), p // at_once % _ROWS, p % at_once
    xp = np if isinstance(position, np.ndarray) else jnp
    if reading == "pairs":
        code = 4 * slot + plane
    elif codes != "int3":
        code = (2 * slot + plane) if reading == "nibbles" else plane + unit // 16 * slot
    elif reading == "nibbles":
        # Of each register 32 rows belong to the first 128 stored ones: they come first.
        plane, word = p // 32 % 4, p // 128 * 4 + p // 8 % 4
        third = slot % 3
        code = xp.where(plane < 3, 11 * plane + third + third // 2, 11 * third + 2) + slot // 3 * 4
    else:
        # A register has words of the same four triples twice: of a and b, or of two other planes.
        plane, second, word = p // 16 % 8, word // 4, word % 4 + p // 128 * 4
        last = 2 * plane - 10 + second  # planes of c, then the two codes across words
        code = xp.where(last < 5, 22 + last + 5 * slot, 10 + 11 * slot)
        code = xp.where(plane < 5, 11 * second + plane + 5 * slot, code)
    return start + unit // _ROWS * word + code


def operand_from_words(codes: str, reading: str, operand: str, block: jax.Array) -> jax.Array:
    """The operand [rows, bn] of a block of codes, in the order of `source_row`.

    Args:
      codes: "int4", "int2" or "int8".
      reading: "bits", or for int2 "nibbles", or for int8 "bytes".
      operand: its dtype name; "bits" makes bfloat16.
      block: as stored; whole units.
    """
    words = pltpu.bitcast(block, jnp.uint32)
    parts: list[jax.Array] = []
    for first in range(0, words.shape[0], _ROWS):
        word = words[first : first + _ROWS, :]
        if reading == "nibbles":
            # Two's complement of 2 (2 u - 3): u's bits above, the upper one flipped, and 10.
            both = [shifted(word, up) & _each(0xC) for up in (2, 0)]
            parts += [_nibbles(part, 0xA, operand) for part in both]
        elif reading == "bytes":
            values = [_byte(half, i) for half in (word, shifted(word, -16)) for i in range(2)]
            parts.append(jnp.concatenate(values, axis=0).astype(operand))
        else:
            parts += [pltpu.bitcast(pair, jnp.bfloat16) for pair in _planes(word, codes)]
    return jnp.concatenate(parts, axis=0)


def operand_from_triples(
    words_ref: Any, reading: str, operand: str, rows: int, unit: int
) -> jax.Array:
    """The operand [256, bn] of one unit of int3 codes, in the order of `source_row`.

    Args:
      words_ref: uint32 reference [bn / 128 * rows, 128], one 128 columns after the other: three
        words are 32 codes of a column. (Strided loads take references of 128 lanes only.)
      reading: "bits" or "nibbles".
      operand: its dtype name; "bits" makes bfloat16.
      rows: words a column.
      unit: which unit, a static number.
    """
    columns = []
    for start in range(3 * _ROWS * unit, words_ref.shape[0], rows):
        a, b, c = (words_ref[pl.ds(start + i, _ROWS, stride=3), :] for i in range(3))
        if reading == "nibbles":
            registers = [_nibbles(part, 8, operand) for part in _nibbles_of_triple(a, b, c)]
            parts = [part[half : half + 32] for half in (0, 32) for part in registers]
        else:
            parts = _pairs_of_triple(a, b, c)
        columns.append(jnp.concatenate(parts, axis=0))
    return jnp.concatenate(columns, axis=1)


def _pairs_of_triple(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
    """Planes of bfloat16 of 96-bit numbers (c, b, a): eight of the first four, then of the others.

    Shifted by one bit at most, each word has ten codes where the middle one has them. The eleventh
    of a and of b end in the next word.
    """
    a_and_b = _sorted(a << jnp.uint32(1), b)
    low = shifted(a, -30) | shifted(b, 2) & jnp.uint32(4)
    high = shifted(b, -15) & jnp.uint32(1 << 16) | shifted(c, 17) & jnp.uint32(6 << 16)
    across = low | high | jnp.uint32(_exponent(0) * 0x10001)
    last = [*_planes(c >> jnp.uint32(1), "int3"), across]
    pairs = [_sorted(first, second) for first, second in zip(last[::2], last[1::2], strict=True)]
    halves = ([*_planes(a_and_b[i], "int3"), *(pair[i] for pair in pairs)] for i in range(2))
    return [pltpu.bitcast(plane, jnp.bfloat16) for half in halves for plane in half]


def _sorted(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two registers of 8 rows: the first four of both in one, the last four in the other."""
    first_four = lax.broadcasted_iota(jnp.int32, first.shape, 0) < _ROWS // 2
    turned = [pltpu.roll(words, _ROWS // 2, 0) for words in (first, second)]
    return jnp.where(first_four, first, turned[1]), jnp.where(first_four, turned[0], second)


def _nibbles_of_triple(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
    """Four registers of nibbles, 2 u, of 96-bit numbers (c, b, a).

    A code fills bits 1 to 3 of a nibble; with the upper one flipped, that is 2 (u - 4). Codes that
    are four apart in a word are twelve bits apart, three nibbles: one mask takes them all.
    Three such masks fill the nibbles of a register; what is left of each word, the last.
    """
    first, second, third = 0x0E00E00E, 0xE00E00E0, 0x00E00E00
    parts = []
    for i, word in enumerate((a, b, c)):
        own = shifted(word, 1 - i) & jnp.uint32(first) | shifted(word, 2 - i) & jnp.uint32(second)
        parts.append(own | shifted(word, -i) & jnp.uint32(third))
    last = shifted(a, -5) & jnp.uint32(0x0600E00E) | shifted(b, -2) & jnp.uint32(0x200E00E0)
    last = last | shifted(b, 27) & jnp.uint32(1 << 27) | shifted(c, 30)
    parts.append(last | shifted(c, 1) & jnp.uint32(third))
    return parts


def _planes(word: jax.Array, codes: str) -> list[jax.Array]:
    """Pairs of bfloat16, M + u, in words [8, bn]: one for each of `_PLANES`."""
    field = (1 << {"int4": 4, "int2": 2, "int3": 3}[codes]) - 1
    planes: list[jax.Array] = []
    for right, low, high in _PLANES[codes]:
        magic = _exponent(low) | _exponent(high) << 16
        if codes == "int4":  # two's complement: counted from the lowest with another highest bit
            magic |= 0x00080008
        fields = shifted(word, -right) & jnp.uint32(field << low | field << high + 16)
        planes.append(fields ^ jnp.uint32(magic))
    return planes


def _exponent(low: int) -> int:
    """The bits of the bfloat16 number whose mantissa counts 1 at this bit."""
    return (127 + _MANTISSA - low) << _MANTISSA


def _each(nibble: int) -> jax.Array:
    return jnp.uint32(nibble * 0x11111111)


def _nibbles(words: jax.Array, flipped: int, operand: str) -> jax.Array:
    """Words [8, bn] of int4, with these bits of each nibble flipped, as operand [64, bn]."""
    return pltpu.bitcast(words ^ _each(flipped), jnp.int4).astype(operand)


def _byte(words: jax.Array, byte: int) -> jax.Array:
    """Byte 0 or 1 of each word, an int8 code, as float32."""
    power = 23 - 8 * byte  # 2^power's mantissa counts 1 at the byte's lowest bit
    magic = (127 + power) << 23 | 0x80 << 8 * byte
    bits = (words & jnp.uint32(0xFF << 8 * byte)) ^ jnp.uint32(magic)
    return lax.bitcast_convert_type(bits, jnp.float32) - (2.0**power + 128)


def shifted(word: jax.Array, left: int) -> jax.Array:
    """Words shifted to the left, or to the right by a negative number of bits."""
    if left >= 0:
        return word << jnp.uint32(left) if left else word
    return word >> jnp.uint32(-left)


def permutation(codes: str, reading: str, width: int) -> jax.Array:
    """float32 [width, width]: x @ it has x's columns in the order of `source_row`."""
    stored = lax.broadcasted_iota(jnp.int32, (width, width), 0)
    position = lax.broadcasted_iota(jnp.int32, (1, width), 1)
    return (stored == source_row(codes, reading, position)).astype(jnp.float32)
