"""int2 codes to 8-bit operands of the matrix units, two codes a look-up.

Called by `tpu.body` for the reading "pairs", on chips that pick bytes within registers (v6e, v7x).
A word holds sixteen codes of a column, a byte four, a nibble two. A mask, and a shift, leave a
nibble in each byte; it points to one of 16 rows of a register, and there are two such registers:
one has the value of the lower code of its row's number, one that of the upper. Seven operations
make four registers of operands so, and there is no offset: values come out as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.tpu.lookup import picked
from jaxquant.pallas_kernels.tpu.reading import LANES, shifted

_ROWS = 8  # of a register of 32-bit words
_VALUES = (-3, -1, 1, 3)
_NIBBLES = 0x0F0F0F0F


def operand_from_pairs(block: jax.Array, operand: str) -> jax.Array:
    """The operand [4 * rows, bn] of a block of codes, in the order of `reading.source_row`.

    Args:
      block: uint8 [rows, bn] as stored, four codes a byte; whole units, bn a multiple of 128.
      operand: its dtype name, of 8 bits.
    """
    words = pltpu.bitcast(block, jnp.uint32)
    tables = [_values(upper, operand) for upper in (False, True)]
    columns = []
    for start in range(0, words.shape[1], LANES):
        parts = []
        for first in range(0, words.shape[0], _ROWS):
            word = words[first : first + _ROWS, start : start + LANES]
            for right in (0, 4):
                at = pltpu.bitcast(shifted(word, -right) & jnp.uint32(_NIBBLES), jnp.int8)
                parts += [pltpu.bitcast(picked(table, at), jnp.dtype(operand)) for table in tables]
        columns.append(jnp.concatenate(parts, axis=0))
    return jnp.concatenate(columns, axis=1)


def _values(upper: bool, operand: str) -> jax.Array:
    """int8 [32, 128]: bytes of the value of the lower or the upper code of each row's number."""
    values = np.asarray(_VALUES, jnp.dtype(operand)).view(np.uint8).astype(np.uint32)
    if not upper:  # the four rows of a word are four numbers in turn
        word = int(sum(value << np.uint32(8 * i) for i, value in enumerate(values)))
        return pltpu.bitcast(jnp.full((_ROWS, LANES), word, jnp.uint32), jnp.int8)
    number = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, LANES), 0) % 4
    words = jnp.full((_ROWS, LANES), int(values[0]) * 0x01010101, jnp.uint32)
    for i in (1, 2, 3):
        words = jnp.where(number == i, jnp.uint32(int(values[i]) * 0x01010101), words)
    return pltpu.bitcast(words, jnp.int8)
