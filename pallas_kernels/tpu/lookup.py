"""From codes of a 4-bit table (nf4, mxfp4) to operands of the matrix units, inside a kernel.

Used by `tpu.body` for the storage "table4". Four ways, as `MatmulConfig.reading` names them:

* "bytes of table", for any 16 values, rounded to bfloat16, where bytes are picked within registers
  (v6e, v7x): one operation picks four, so that it serves two codes.
* "table", the same values, where only words are picked (v5e, v5p): one holds the values of two
  codes, of which the highest bit of a code chooses.
* "e2m1", for E2M1 floats: shifts and masks put sign, exponent and mantissa where bfloat16 has them.
* "float4", for E2M1 floats where the compiler has a conversion of its own (v7x).

"e2m1" reads 32-bit words of eight codes of a column, and leaves rows in the order that
`reading.source_row` says; of the others rows stay as stored. E2M1 is exact in all four.
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
_CODES = 16
TABLE_ROWS = _EIGHT = 8  # sublanes of a register
_BYTES = 32  # of a lane of a register


def table_rows(reading: str, table: Sequence[float]) -> jax.Array:
    """A table as `table_values` takes it: uint32 [8, 128], a register whose lanes are alike.

    Bytes of bfloat16 values. "bytes of table": the low ones of codes 0 to 7 and -8 to -1, then the
    high ones. "table": words of the values of codes c (low half) and c - 8 (high), c from 0 to 7.

    Args:
      reading: "table" or "bytes of table".
      table: 16 values, by code + 8.

    Raises:
      ValueError: they are not 16.
    """
    if len(table) != _CODES:
        raise ValueError(f"a table of 4-bit codes has {_CODES} values, not {len(table)}")
    values = np.asarray([*table[_EIGHT:], *table[:_EIGHT]], np.float32).astype(jnp.bfloat16)
    low_high = values.view(np.int8).reshape(2, _EIGHT, 2)
    order = (2, 0, 1) if reading == "bytes of table" else (1, 0, 2)
    rows = low_high.transpose(order).reshape(-1).view(np.uint32)[:, None]
    # By numpy, in full: a constant of the program. Other operations would run at each call.
    return jnp.asarray(np.repeat(rows, LANES, axis=1))


def table_values(reading: str, block: jax.Array, table_ref: Any) -> jax.Array:
    """bfloat16 [rows, bn] of the table's values, rows as stored.

    Args:
      reading: "table" or "bytes of table".
      block: int4 [rows, bn]; whole registers of int8, that is rows in multiples of 32.
      table_ref: reference to `table_rows`.
    """
    codes = block.astype(jnp.int8)
    of_register = _by_bytes if reading == "bytes of table" else _by_words
    columns = []
    for start in range(0, block.shape[1], LANES):
        width = min(LANES, block.shape[1] - start)
        parts: list[jax.Array] = []
        for first in range(0, block.shape[0], _BYTES):
            own = codes[first : first + _BYTES, start : start + width]
            parts += of_register(pltpu.bitcast(own, jnp.uint32), table_ref[:, :width])
        columns.append(jnp.concatenate(parts, axis=0))
    return jnp.concatenate(columns, axis=1)


def _by_words(codes: jax.Array, table: jax.Array) -> list[jax.Array]:
    """Values of a register of codes, bytes that hold their sign above bit 3: rows as stored.

    The word that the lowest three bits pick is shifted by 16 if the sign is set.
    """
    at, up = (
        pltpu.bitcast(codes & jnp.uint32(bits), jnp.int8).astype(jnp.int32)
        for bits in (0x07070707, 0x10101010)
    )
    values = []
    for i in range(0, _BYTES, _EIGHT):
        values.append(picked(table, at[i : i + _EIGHT]) >> up[i : i + _EIGHT].astype(jnp.uint32))
    # Two registers become one where they are narrowed together.
    return [pltpu.bitcast(jnp.concatenate(values).astype(jnp.uint16), jnp.bfloat16)]


def _by_bytes(codes: jax.Array, table: jax.Array) -> list[jax.Array]:
    """Values of a register of codes, bytes: two registers, rows as stored.

    Each byte of a register picks one of the 32 bytes that a lane of another register holds. Bytes
    of 32 codes are picked twice each, into two registers of pairs; the upper one of a pair is made
    to point to the high bytes, and then both pick what they point to, which is a bfloat16 value.
    """
    low = pltpu.bitcast(codes & jnp.uint32(0x0F0F0F0F), jnp.int8)
    # Rows 0, 0, 1, 1 to 15, 15; of the other register 16 more.
    rows = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 0) * 0x02020202 + 0x01010000
    values = []
    for first in (0, _CODES):
        twice = picked(low, pltpu.bitcast(rows + first * 0x01010101, jnp.int8))
        at = pltpu.bitcast(twice, jnp.uint32) | jnp.uint32(0x10001000)
        found = picked(pltpu.bitcast(table, jnp.int8), pltpu.bitcast(at, jnp.int8))
        values.append(pltpu.bitcast(found, jnp.bfloat16))
    return values


def picked(source: jax.Array, rows: jax.Array) -> jax.Array:
    """`take_along_axis`, which would widen indices of 8 bits: here as wide as what is picked."""
    by_column = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(1,),
    )
    return jax.lax.gather(source, rows[..., None], by_column, (1, 1), mode="promise_in_bounds")


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
