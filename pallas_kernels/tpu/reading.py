"""From stored codes to operands of the matrix units, inside a kernel.

Used by the bodies in this package. Codes that count, in two ways (tables: `tpu.lookup`):

* "cast": the compiler's own conversion.
* "bits": four to eight shifts and masks turn one 32-bit word of codes into bfloat16 numbers
  128 + u, where u is the code counted from its lowest: u goes straight into the mantissa. The
  offset of 128 is left in and taken out of the sums, where it costs one product with the sum of
  x's row over the group. Words hold rows 8r .. 8r + 7 of a column, so the operand's rows come out
  in another order than stored; `source_row` says which, and x's columns follow suit.

A `Layout` describes one way for one storage: rows come in units of `unit` codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_MAGIC = 0x43004300  # two bfloat16 numbers 128; the low mantissa bit of each counts 1
_OFFSET = 128.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the words of one storage are read.

    Attributes:
      unit: codes whose order is shuffled among themselves; 8 rows of 32-bit words.
      lowest: the code that is stored as 0.
      step: distance of neighbouring codes.
    """

    unit: int
    lowest: int = 0
    step: int = 1

    @property
    def offset(self) -> float:
        """What a zero point of 0 becomes, counted in steps from the operand's zero."""
        return _OFFSET - self.lowest / self.step


BITS = {
    "int4": Layout(64, -8, 1),
    "int2": Layout(128, -3, 2),
    "int3": Layout(256, -4, 1),
    "table4": Layout(64),
}
# Readings that take words apart: rows come out in the order of `source_row`.
SHUFFLED = ("bits", "table", "e2m1")


def source_row(codes: str, position: Any) -> Any:
    """The stored row, within its unit, of the operand's row at `position` (arrays of int32)."""
    unit = BITS[codes].unit
    start, p = (position // unit) * unit, position % unit
    plane, word, half = p // 16, (p % 16) // 2, p % 2
    if unit == 64:
        return start + 8 * word + 4 * half + plane
    if codes == "int2":
        return start + 16 * word + 8 * half + plane
    return start + 32 * word + 16 * half + plane


def read_words(codes: str, block: jax.Array) -> jax.Array:
    """The block as 32-bit words, codes counted from the lowest one (int4: two's complement away).

    Args:
      codes: "int4", "int2", or "table4", whose bits stay as they are.
      block: [rows, bn] as stored.

    Returns:
      uint32 [rows * bits / 32, bn].
    """
    words = pltpu.bitcast(block, jnp.uint32)
    return words ^ jnp.uint32(0x88888888) if codes == "int4" else words


def operand_from_words(codes: str, words: jax.Array, units: int) -> jax.Array:
    """bfloat16 [units * unit, bn] of 128 + u, rows in the order of `source_row`.

    Args:
      codes: "int4" or "int2".
      words: uint32 [units * 8, bn].
      units: how many units.
    """
    bits = 4 if codes == "int4" else 2
    mask = jnp.uint32((2**bits - 1) * 0x10001)
    parts = []
    for unit in range(units):
        word = words[8 * unit : 8 * unit + 8, :]
        for plane in range(16 // bits):
            parts.append(_to_bf16((word >> jnp.uint32(bits * plane)) & mask))
    return jnp.concatenate(parts, axis=0)


def operand_from_triples(words_ref: Any, rows: int, unit: int) -> jax.Array:
    """bfloat16 [256, bn] of 128 + u from int3 codes, rows in the order of `source_row`.

    Args:
      words_ref: uint32 reference [bn / 128 * rows, 128], one 128 columns after the other: three
        words are 32 codes of a column. (Strided loads take references of 128 lanes only.)
      rows: words a column.
      unit: which unit, a static number.
    """
    columns = []
    for start in range(24 * unit, words_ref.shape[0], rows):
        a, b, c = (words_ref[pl.ds(start + i, 8, stride=3), :] for i in range(3))
        planes = [
            _to_bf16(_three_bits(a, b, c, 3 * i, 0) | _three_bits(a, b, c, 3 * (16 + i), 16))
            for i in range(16)
        ]
        columns.append(jnp.concatenate(planes, axis=0))
    return jnp.concatenate(columns, axis=1)


def _three_bits(a: Any, b: Any, c: Any, start: int, to: int) -> jax.Array:
    """Bits start .. start + 2 of the 96-bit numbers (c, b, a), at bit `to` of the result."""
    words = (a, b, c)
    index, bit = divmod(start, 32)
    field = shifted(words[index], to - bit)
    if bit > 29:
        field = field | shifted(words[index + 1], to + 32 - bit)
    return field & jnp.uint32(7 << to)


def shifted(word: jax.Array, left: int) -> jax.Array:
    """Words shifted to the left, or to the right by a negative number of bits."""
    if left >= 0:
        return word << jnp.uint32(left) if left else word
    return word >> jnp.uint32(-left)


def _to_bf16(pairs: jax.Array) -> jax.Array:
    """Two small numbers in the halves of each word become two rows of 128 + number."""
    return pltpu.bitcast(pairs | jnp.uint32(_MAGIC), jnp.bfloat16)


def permutation(codes: str, width: int) -> jax.Array:
    """float32 [width, width]: x @ it has x's columns in the order of `source_row`."""
    stored = lax.broadcasted_iota(jnp.int32, (width, width), 0)
    position = lax.broadcasted_iota(jnp.int32, (width, width), 1)
    return (stored == source_row(codes, position)).astype(jnp.float32)
