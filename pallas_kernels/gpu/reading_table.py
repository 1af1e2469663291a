"""4-bit indices become pairs of bfloat16 table values, looked up in shared memory.

Called by `gpu.reading` and, for the table, `gpu.matmul`. A byte is two indices, so an entry of the
table of 256 bytes is a register of wgmma's operand: two values. Each lane of a warp has a copy of
its own in its own bank of shared memory (32 KiB in all): lookups never collide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from jaxquant.pallas_kernels.gpu.layouts import WORDS

ENTRIES, BANKS = 256, 32
# Where a byte of a word, shifted, is the number of a row of the table seen as flat: rows are 2^5.
_ROW = 5
ROW_MASK = (ENTRIES - 1) << _ROW


def pairs(table: Sequence[float]) -> jax.Array:
    """The table as kernels take it: int32 [256, 32], a pair of bfloat16 values a byte.

    Args:
      table: 16 values, by code + 8.

    Raises:
      ValueError: there are not 16.
    """
    if len(table) != 16:
        raise ValueError(f"a table of 4-bit codes has 16 values, not {len(table)}")
    by_code = jnp.asarray(table, jnp.bfloat16)[np.arange(16) ^ 8]  # by a code's four bits
    byte = np.arange(ENTRIES)
    both = jnp.stack([by_code[byte & 15], by_code[byte >> 4]], axis=-1)
    words = lax.bitcast_convert_type(both, jnp.int32)
    return jnp.broadcast_to(words[:, None], (ENTRIES, BANKS))


def planes(words: jax.Array, table: Any, interpret: bool) -> list[jax.Array]:
    """What `reading.assemble` takes: plane i is the values of byte i of each word.

    Args:
      words: int32 [rows, w] of eight codes each, in the layout `WORDS`.
      table: reference to `pairs` in shared memory.
      interpret: compute it without registers.

    Returns:
      Four int32 arrays [rows, w].
    """
    if interpret:
        entries = table[...][:, 0]
        byte = [lax.shift_right_logical(words, jnp.int32(8 * i)) & 255 for i in range(4)]
        return [jnp.take(entries, b, axis=0, mode="clip") for b in byte]

    @plgpu.inline_mgpu(
        arg_types=(WORDS, plgpu.RefType()),
        return_type=[plgpu.ShapeDtypeStruct(words.shape, jnp.dtype("int32"), layout=WORDS)] * 4,
    )
    def look_up(context: Any, array: Any, entries: Any) -> Any:
        bank = _bank()
        parts = []
        for i in range(4):
            registers = np.empty(array.registers.shape, dtype=object)
            for at, word in np.ndenumerate(array.registers):
                registers[at] = _entry(entries, word, i, bank)
            parts.append(
                mgpu.FragmentedArray(
                    _registers=registers, _layout=array.layout, _is_signed=array.is_signed
                )
            )
        return parts

    return look_up(words, table)


def _bank() -> Any:
    """The lane's number, with a zero that compilers cannot know: it then is computed only once."""
    i32 = ir.IntegerType.get_signless(32)
    zero = arith.shrui(mgpu.warpgroup_idx(sync=True), mgpu.c(20, i32))
    return arith.addi(arith.remui(mgpu.thread_idx(), mgpu.c(BANKS, i32)), zero)


def row_shift(byte: int) -> int:
    """How far right (negative: left) a word is shifted for `ROW_MASK` to leave the byte's row."""
    return 8 * byte - _ROW


def _entry(entries: Any, word: Any, byte: int, bank: Any) -> Any:
    """vector<1xi32> at [byte of the word, bank], of the table seen as flat."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    value = vector.extract(word, [], [0])
    shift = row_shift(byte)
    if shift > 0:
        value = arith.shrui(value, mgpu.c(shift, i32))
    else:
        value = arith.shli(value, mgpu.c(-shift, i32))
    at = arith.ori(arith.andi(value, mgpu.c(ROW_MASK, i32)), bank)
    flat = mgpu.memref_fold(entries, 0, 2)
    loaded = memref.load(flat, [arith.index_castui(index, at)])
    return vector.broadcast(ir.VectorType.get((1,), i32), loaded)
