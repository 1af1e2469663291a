"""From codes of a 4-bit table (nf4, mxfp4) to operands of the matrix units, inside a kernel.

Used by `tpu.body` for the storage "table4". Four ways, as `MatmulConfig.reading` names them:

* "bytes of table", for any 16 values, rounded to bfloat16, where bytes are picked within registers
  (v6e, v7x): one operation picks four, so that it serves two codes. Rows stay as stored.
* "table", the same values, where words are picked: they lie in two registers, a value a sublane.
  The low three bits of a code pick a sublane of both, which is one vector operation (a rotation of
  the sublanes by as much as each lane says), its highest bit picks the register.
* "e2m1", for E2M1 floats: shifts and masks put sign, exponent and mantissa where bfloat16 has them.
* "float4", for E2M1 floats where the compiler has a conversion of its own (v7x).

"table" and "e2m1" read 32-bit words of eight codes of a column, and leave rows in the order that
`reading.source_row` says. E2M1 is exact in all four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.tpu.reading import LANES, shifted

# What "e2m1" makes of a value, over the value.
E2M1_FACTOR = 4.0
# Sublanes of a register, and rows of `table_rows` (four registers) and of `table_bytes` (one).
_EIGHT = 8
TABLE_ROWS = 4 * _EIGHT
_CODES = 16


def table_bytes(table: Sequence[float]) -> jax.Array:
    """A table as `values_from_codes` takes it: int8 [32, 128], all lanes alike.

    The low bytes of bfloat16 values of codes 0 to 7 and -8 to -1, then the high bytes.

    Args:
      table: 16 values, by code + 8.

    Raises:
      ValueError: they are not 16.
    """
    bits = _bits(table)
    halves = [(bits >> jnp.uint16(8 * i)).astype(jnp.uint8) for i in range(2)]
    rows = jax.lax.bitcast_convert_type(jnp.concatenate(halves), jnp.int8)
    return jnp.broadcast_to(rows[:, None], (TABLE_ROWS, LANES))


def table_rows(table: Sequence[float]) -> jax.Array:
    """A table as `values_from_words` takes it: uint32 [32, 128], all lanes alike.

    Eight rows of bfloat16 bits of the values of codes 0 to 7, eight of those of -8 to -1, in the
    low halves of their words; then the same in the high halves.

    Args:
      table: 16 values, by code + 8.

    Raises:
      ValueError: they are not 16.
    """
    low = _bits(table).astype(jnp.uint32)
    rows = jnp.concatenate([low, low << jnp.uint32(16)])
    return jnp.broadcast_to(rows[:, None], (TABLE_ROWS, LANES))


def _bits(table: Sequence[float]) -> jax.Array:
    """Bits of the values rounded to bfloat16, uint16 [16], by the lowest four bits of a code."""
    if len(table) != _CODES:
        raise ValueError(f"a table of 4-bit codes has {_CODES} values, not {len(table)}")
    values = np.asarray([*table[_EIGHT:], *table[:_EIGHT]], np.float32)
    return jax.lax.bitcast_convert_type(jnp.asarray(values, jnp.bfloat16), jnp.uint16)


def values_from_codes(block: jax.Array, table_ref: Any) -> jax.Array:
    """bfloat16 [rows, bn] of the table's values, rows as stored.

    Each byte of a register picks one of the 32 bytes that a lane of another register holds. Bytes
    of 32 codes are picked twice each, into two registers of pairs; the upper one of a pair is made
    to point to the high bytes, and then both pick what they point to, which is a bfloat16 value.

    Args:
      block: int4 [rows, bn]; whole registers of int8, that is rows in multiples of 32.
      table_ref: reference to `table_bytes`.
    """
    twice = _bytes_twice()
    codes = block.astype(jnp.int8)
    columns = []
    for start in range(0, block.shape[1], LANES):
        width = min(LANES, block.shape[1] - start)
        table, parts = table_ref[:, :width], []
        for first in range(0, block.shape[0], TABLE_ROWS):
            own = codes[first : first + TABLE_ROWS, start : start + width]
            low = pltpu.bitcast(own, jnp.uint32) & jnp.uint32(0x0F0F0F0F)
            for rows in twice:
                pairs = picked(pltpu.bitcast(low, jnp.int8), rows[:, :width])
                at = pltpu.bitcast(pairs, jnp.uint32) | jnp.uint32(0x10001000)
                values = picked(table, pltpu.bitcast(at, jnp.int8))
                parts.append(pltpu.bitcast(values, jnp.bfloat16))
        columns.append(jnp.concatenate(parts, axis=0))
    return jnp.concatenate(columns, axis=1)


def _bytes_twice() -> list[jax.Array]:
    """Two of int8 [32, 128]: 0, 0, 1, 1 to 15, 15 down the rows, and 16, 16 to 31, 31."""
    word = jax.lax.broadcasted_iota(jnp.int32, (_EIGHT, LANES), 0) * 0x02020202 + 0x01010000
    return [pltpu.bitcast(word + first * 0x01010101, jnp.int8) for first in (0, _CODES)]


def picked(source: jax.Array, rows: jax.Array) -> jax.Array:
    """`take_along_axis` of rows, whose indices it would widen: here as wide as what is picked."""
    by_column = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(1,),
    )
    return jax.lax.gather(source, rows[..., None], by_column, (1, 1), mode="promise_in_bounds")


def values_from_words(words: jax.Array, units: int, table_ref: Any) -> jax.Array:
    """bfloat16 [units * 64, bn] of the table's values, rows in the order of `source_row`.

    Args:
      words: uint32 [units * 8, bn], bn a multiple of 128.
      units: how many units of 64 codes.
      table_ref: reference to `table_rows`.
    """
    registers = [table_ref[i : i + _EIGHT, :] for i in range(0, TABLE_ROWS, _EIGHT)]

    def value(word: jax.Array, nibble: int, halves: list[jax.Array]) -> jax.Array:
        at = shifted(word, -4 * nibble) & jnp.uint32(7)
        low, high = (
            jnp.take_along_axis(half, at, axis=0, mode="promise_in_bounds") for half in halves
        )
        return jnp.where((word & jnp.uint32(8 << 4 * nibble)) != 0, high, low)

    columns = []
    for start in range(0, words.shape[1], LANES):
        parts = []
        for unit in range(units):
            word = words[_EIGHT * unit : _EIGHT * (unit + 1), start : start + LANES]
            for plane in range(4):
                first = value(word, plane, registers[:2])
                pair = first | value(word, plane + 4, registers[2:])
                parts.append(pltpu.bitcast(pair, jnp.bfloat16))
        columns.append(jnp.concatenate(parts, axis=0))
    return jnp.concatenate(columns, axis=1)


def e2m1_from_words(words: jax.Array, units: int) -> jax.Array:
    """bfloat16 [units * 64, bn] of `E2M1_FACTOR` times the values, in the order of `source_row`.

    A code is a sign, two bits of exponent and one of mantissa; with them in place and the highest
    bit of bfloat16's exponent set, 1 is 4. That bit is not set for zeros; and 0.5, whose bits of
    exponent are 0, is 2 with the mantissa bit taken away: it has no implied one.

    Args:
      words: uint32 [units * 8, bn].
      units: how many units of 64 codes.
    """
    parts = []
    for unit in range(units):
        word = words[_EIGHT * unit : _EIGHT * (unit + 1), :]
        normal = shifted(word, -1) | shifted(word, -2)  # in the lowest bit of each code
        magnitude = word & (normal | jnp.uint32(0xEEEEEEEE))
        low = shifted(word, 1) | shifted(word, 2)
        top = word | low & jnp.uint32(0x44444444)  # above: the sign, and whether it is no zero
        for plane in range(4):
            upper = shifted(top, 12 - 4 * plane) & jnp.uint32(0xC000C000)
            fields = shifted(magnitude, 6 - 4 * plane) & jnp.uint32(0x01C001C0)
            parts.append(pltpu.bitcast(upper | fields, jnp.bfloat16))
    return jnp.concatenate(parts, axis=0)


def converted(block: jax.Array) -> jax.Array:
    """bfloat16 values of E2M1 codes [rows, bn], rows as stored."""
    return pltpu.bitcast(block, jnp.float4_e2m1fn).astype(jnp.bfloat16)
