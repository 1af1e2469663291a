"""From stored codes to operands of the tensor cores, inside a kernel.

Used by the bodies in this package. Three ways:

* "direct": codes are operands as they are, in shared memory (int8 and float8 on both sides).
* "cast": a warpgroup loads codes into registers in a layout made for it and Mosaic GPU converts
  them to bfloat16; lanes exchange parts of their registers, so that columns keep their order.
* "bits": masks on 32-bit words, and nothing is exchanged (int4, and float8 as bfloat16, for which
  Hopper has no conversion). A lane holds whole words of codes; `assemble` says which columns of the
  operand its registers are, and `arrange` puts x's columns in that order.

`load` brings codes into registers, `convert` makes an operand of all or a part of them, and
`words_of` says how the operand differs from the code's value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from jaxquant.pallas_kernels.gpu.config import AXIS, GpuConfig

# Words [64, w] by lanes: a warp has 16 rows, each four lanes two of these, and a lane of the four
# every fourth word. The same lanes have the same rows in the layouts that wgmma reads.
WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# Two bfloat16 numbers 128 + 8: low bits of their mantissas count 1, and xor turns the sign bit of
# two's complement into the 8 of an offset.
MAGIC = 0x43084308
# As signed numbers, the halves' sign bits 0x80008000 and the bytes' upper nibbles 0xF0F0F0F0.
_SIGNS = 0x80008000 - 2**32
_HIGH_NIBBLES = 0xF0F0F0F0 - 2**32


@dataclasses.dataclass(frozen=True)
class Words:
    """How "bits" reads one storage into one operand.

    Attributes:
      codes: in a word.
      offset: what the operand is larger by than the code.
      factor: what the operand must be multiplied by, once the offset is off, to become the code.
    """

    codes: int
    offset: float = 0.0
    factor: float = 1.0


# float8 is widened by a shift of its exponent and mantissa; the factor is the biases' difference.
WORDS_OF = {
    ("int4", "bfloat16"): Words(8, offset=136.0),
    ("int4", "int8"): Words(8, factor=1 / 16),
    ("float8_e4m3fn", "bfloat16"): Words(4, factor=2.0**120),
    ("float8_e5m2", "bfloat16"): Words(4, factor=2.0**112),
}


def words_of(codes: str, config: GpuConfig) -> Words:
    """What is special about the operands that "bits" makes; nothing for other readings."""
    return WORDS_OF[codes, config.operand] if config.reading == "bits" else Words(1)


def stored(array: jax.Array, codes: str, config: GpuConfig) -> jax.Array:
    """Codes [n, k] as the kernel takes them; for "bits" as int32 words, which is a bitcast."""
    per = words_of(codes, config).codes
    if per == 1:
        return array
    n, k = array.shape
    return lax.bitcast_convert_type(array.reshape(n, k // per, per), jnp.int32)


def arrange(x: jax.Array, codes: str, config: GpuConfig) -> jax.Array:
    """X [m, k] with its columns in the operand's order; k is a multiple of 4 words of codes.

    Plane i has every code whose place in the word is i, modulo the number of planes; `assemble`
    puts planes after each other in every four words. So the columns of four words are a matrix of
    which the transposed one is wanted.
    """
    per = words_of(codes, config).codes
    if per == 1:
        return x
    m, k = x.shape
    planes = per * jnp.dtype(config.operand).itemsize // 4
    return x.reshape(m, k // (4 * per), 4 * per // planes, planes).swapaxes(2, 3).reshape(m, k)


def load(ref: Any, config: GpuConfig, interpret: bool) -> jax.Array:
    """A warpgroup's codes from shared memory into registers.

    Args:
      ref: [bn, bk] of codes or [bn, bk / 8] of words.
      config: says what becomes of them.
      interpret: there are no registers, and layouts mean nothing.
    """
    if interpret:
        return ref[...]
    if config.reading == "bits":
        return plgpu.load(ref, layout=WORDS)
    if ref.dtype == jnp.int4:
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_4X)
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)


def convert(array: jax.Array, codes: str, config: GpuConfig, interpret: bool) -> jax.Array:
    """An operand [bn, k] from what `load` returned, or from a part of its columns.

    Returns:
      `config.operand` in the layout that wgmma takes; what `words_of` says is still in it.
    """
    if config.reading == "bits":
        # A sum of zero that compilers do not see through: else each mask's xor has a move of the
        # constant in front, since an instruction takes one immediate only.
        magic: Any = MAGIC
        if not interpret:
            magic = MAGIC | lax.shift_right_logical(lax.axis_index(AXIS), 20)
        return assemble(planes_of(array, codes, config, magic), config.operand, interpret)
    if not interpret:
        array = plgpu.layout_cast(array, plgpu.Layout.WGMMA)
    return array.astype(config.operand)


def planes_of(words: Any, codes: str, config: GpuConfig, magic: Any = MAGIC) -> list[Any]:
    """Planes of int32 words: what `assemble` takes.

    Of int4 for bfloat16, plane i holds the codes i and i + 4, as 136 + code; for int8 the even
    codes, then the odd ones, as 16 * code in a byte. Of float8 plane i holds the codes i and i + 2.
    Works on anything with integers' operators.
    """
    if codes != "int4":
        shift = 4 if codes == "float8_e4m3fn" else 3  # how many more exponent bits bfloat16 has
        high = [words << 8, words]  # codes in the upper bytes of the halves
        return [((w >> shift) & (0x7F007F00 >> shift)) | (w & _SIGNS) for w in high]
    if config.operand == "bfloat16":
        return [((words >> (4 * i)) & 0x000F000F) ^ magic for i in range(4)]
    return [(words << 4) & _HIGH_NIBBLES, words & _HIGH_NIBBLES]


def assemble(planes: Sequence[jax.Array], dtype: Any, interpret: bool) -> jax.Array:
    """Words as the operand of wgmma without any lane giving another a value.

    Let there be P planes and let lane t (of four that share a row) hold the words 4B + t. Then for
    16-bit types column 8(PB + p) + 2t + j is the half j of plane p of word 4B + t; for 8-bit types
    column 16(PB + p) + 4t + j is the byte j.

    Args:
      planes: int32 [bn, w] each, in the layout `WORDS`.
      dtype: of the operand.
      interpret: compute it without registers.

    Returns:
      [bn, 4 / itemsize * P * w] in the layout WGMMA or WGMMA_8BIT.
    """
    dtype = jnp.dtype(dtype)
    rows, width = planes[0].shape
    parts = 4 // dtype.itemsize
    shape = rows, width * len(planes) * parts
    if interpret:
        stack = jnp.stack([lax.bitcast_convert_type(p, dtype) for p in planes], axis=1)
        stack = stack.reshape(rows, len(planes), width // 4, 4, parts)
        return stack.transpose(0, 2, 1, 3, 4).reshape(shape)
    layout = plgpu.Layout.WGMMA if dtype.itemsize == 2 else plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(
        arg_types=(WORDS,) * len(planes),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def regroup(context: Any, *arrays: Any) -> Any:
        element = _element_type(dtype)
        register = ir.VectorType.get((parts,), element)
        target = layout.to_mgpu()
        registers = np.empty(target.registers_shape(shape), dtype=object)
        for p, array in enumerate(arrays):
            for at, word in np.ndenumerate(array.registers):
                registers[place_of(at, p, len(planes))] = vector.bitcast(register, word)
        signed = True if dtype == jnp.int8 else None
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=signed)

    return regroup(*planes)


def place_of(word: tuple[int, ...], plane: int, planes: int) -> tuple[int, ...]:
    """Where the register of a plane of a word is among the operand's registers.

    Both layouts count 64 rows, then blocks of columns, then the halves of a warp's rows; lanes and
    warps hold the same rows and the same fourth of a block in both.
    """
    return (word[0], word[1] * planes + plane, *word[2:])


def _element_type(dtype: Any) -> Any:
    if dtype == jnp.bfloat16:
        return ir.BF16Type.get()
    return ir.IntegerType.get_signless(8)
