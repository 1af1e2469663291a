"""From stored codes to operands of the tensor cores, inside a kernel.

Used by the bodies in this package. Three ways:

* "direct": codes are operands as they are, in shared memory (int8 and float8 on both sides).
* "cast": a warpgroup loads codes into registers in a layout made for it and Mosaic GPU converts
  them to bfloat16; lanes exchange parts of their registers, so that columns keep their order.
* "bits": masks on 32-bit words, and nothing is exchanged (int4, and float8 as bfloat16, for which
  Hopper has no conversion; `reading_packed` for int3 and int2, `reading_table` for tables). A lane
  holds whole words of codes; `assemble` says which columns of the operand its registers are, and
  `arrange` puts x's columns in that order.

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
from jax.extend.mlir.dialects import arith, vector

from jaxquant.pallas_kernels.gpu import reading_packed, reading_table
from jaxquant.pallas_kernels.gpu.config import AXIS, GpuConfig
from jaxquant.pallas_kernels.gpu.layouts import LANES, WORDS, WORDS_BY_THREE, scales_by_lane
from jaxquant.pallas_kernels.problem import PACKED, STORAGE

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
      codes: in a word, or in the words that only together hold whole codes.
      offset: what the operand is larger by than the code.
      factor: what the operand must be multiplied by, once the offset is off, to become the code.
      words: so many hold the `codes`.
    """

    codes: int
    offset: float = 0.0
    factor: float = 1.0
    words: int = 1


# float8 is widened by a shift of its exponent and mantissa; the factor is the biases' difference.
WORDS_OF = {
    ("int4", "bfloat16"): Words(8, offset=136.0),
    ("int4", "int8"): Words(8, factor=1 / 16),
    ("float8_e4m3fn", "bfloat16"): Words(4, factor=2.0**120),
    ("float8_e5m2", "bfloat16"): Words(4, factor=2.0**112),
    ("int3", "bfloat16"): Words(32, words=3),
    ("int2", "bfloat16"): Words(16),
    ("table4", "bfloat16"): Words(8),
}


def words_of(codes: str, config: GpuConfig) -> Words:
    """What is special about the operands that "bits" makes; nothing for other readings."""
    return WORDS_OF[codes, config.operand] if config.reading == "bits" else Words(1)


def stored(array: jax.Array, codes: str, config: GpuConfig) -> jax.Array:
    """Codes [n, ...] as the kernel takes them; for "bits" as int32 words, which is a bitcast."""
    if words_of(codes, config).codes == 1:
        return array
    n, size = array.shape
    per = 8 if array.dtype == jnp.int4 else 4
    return lax.bitcast_convert_type(array.reshape(n, size // per, per), jnp.int32)


def elements(values: int, codes: str, config: GpuConfig) -> int:
    """How many elements of what `stored` returns hold so many codes of a row."""
    words = words_of(codes, config)
    return values * words.words // words.codes


def arrange(x: jax.Array, codes: str, config: GpuConfig) -> jax.Array:
    """X [m, k] with its columns in the operand's order; k is a multiple of 4 words of codes.

    Plane i has every code whose place in the word is i, modulo the number of planes; `assemble`
    puts planes after each other in every four words. So the columns of four words are a matrix of
    which the transposed one is wanted. Of a table, plane i has the two codes of byte i.
    """
    per = words_of(codes, config).codes
    if per == 1:
        return x
    m, k = x.shape
    if codes == "table4":
        return x.reshape(m, k // 32, LANES, 4, 2).swapaxes(2, 3).reshape(m, k)
    planes = per * jnp.dtype(config.operand).itemsize // 4
    return x.reshape(m, k // (4 * per), 4 * per // planes, planes).swapaxes(2, 3).reshape(m, k)


def load(ref: Any, codes: str, config: GpuConfig, interpret: bool) -> jax.Array:
    """A warpgroup's codes from shared memory into registers.

    Args:
      ref: [bn, bk] of codes or [bn, bk / 8] of words.
      codes: how they are stored.
      config: says what becomes of them.
      interpret: there are no registers, and layouts mean nothing.
    """
    if interpret:
        return ref[...]
    if config.reading == "bits":
        by_three = words_of(codes, config).words == 3
        return plgpu.load(ref, layout=WORDS_BY_THREE if by_three else WORDS)
    if ref.dtype == jnp.int4:
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_4X)
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)


def convert(
    array: jax.Array, codes: str, config: GpuConfig, interpret: bool, table: Any = None
) -> jax.Array:
    """An operand [bn, k] from what `load` returned, or from a part of its columns.

    Args:
      array: codes or words.
      codes: how they are stored.
      config: says what becomes of them.
      interpret: compute it without registers.
      table: for "table4" the reference to `reading_table.pairs` in shared memory.

    Returns:
      `config.operand` in the layout that wgmma takes; what `words_of` says is still in it.
    """
    if codes == "table4":
        planes = reading_table.planes(array, table, interpret)
        return assemble(planes, config.operand, interpret)
    if config.reading == "bits":
        # A zero that compilers do not see through: else each mask's xor has a move of the
        # constant in front, since an instruction takes one immediate only.
        zero = 0 if interpret else lax.shift_right_logical(lax.axis_index(AXIS), 20)
        if codes in PACKED:
            bits = STORAGE[codes][1]
            magic: Any = reading_packed.MAGIC | zero
            planes = reading_packed.planes(array, bits, magic, interpret)
            return assemble(planes, config.operand, interpret, reading_packed.affine(bits))
        planes = planes_of(array, codes, config, MAGIC | zero)
        return assemble(planes, config.operand, interpret)
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


def assemble(
    planes: Sequence[jax.Array],
    dtype: Any,
    interpret: bool,
    affine: Sequence[tuple[float, float]] | None = None,
) -> jax.Array:
    """Words as the operand of wgmma without any lane giving another a value.

    Let there be P planes and let lane t (of four that share a row) hold the words 4B + t. Then for
    16-bit types column 8(PB + p) + 2t + j is the half j of plane p of word 4B + t; for 8-bit types
    column 16(PB + p) + 4t + j is the byte j.

    Args:
      planes: int32 [bn, w] each, in the layout `WORDS`.
      dtype: of the operand.
      interpret: compute it without registers.
      affine: for bfloat16, by plane a factor and a summand that are exact on it.

    Returns:
      [bn, 4 / itemsize * P * w] in the layout WGMMA or WGMMA_8BIT.
    """
    dtype = jnp.dtype(dtype)
    rows, width = planes[0].shape
    parts = 4 // dtype.itemsize
    shape = rows, width * len(planes) * parts
    if interpret:
        values = [lax.bitcast_convert_type(p, dtype) for p in planes]
        for p, (factor, summand) in enumerate(affine or ()):
            values[p] = values[p] * jnp.asarray(factor, dtype) + jnp.asarray(summand, dtype)
        stack = jnp.stack(values, axis=1)
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
                value = vector.bitcast(register, word)
                if affine is not None:
                    value = _affine(value, *affine[p])
                registers[place_of(at, p, len(planes))] = value
        signed = True if dtype == jnp.int8 else None
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=signed)

    return regroup(*planes)


def place_of(word: tuple[int, ...], plane: int, planes: int) -> tuple[int, ...]:
    """Where the register of a plane of a word is among the operand's registers.

    Both layouts count 64 rows, then blocks of columns, then the halves of a warp's rows; lanes and
    warps hold the same rows and the same fourth of a block in both.
    """
    return (word[0], word[1] * planes + plane, *word[2:])


def _affine(value: Any, factor: float, summand: float) -> Any:
    """`value * factor + summand`; not as one operation, which would be done in float32."""

    def constant(number: float) -> Any:
        attribute = ir.FloatAttr.get(ir.BF16Type.get(), number)
        splat = ir.DenseElementsAttr.get_splat(value.type, attribute)
        build: Any = arith.constant  # (its types lack the form that takes a type)
        return build(value.type, splat)

    if factor != 1.0:
        value = arith.mulf(value, constant(factor))
    return arith.addf(value, constant(summand))


def spread_by_lane(rows: jax.Array, width: int, interpret: bool) -> jax.Array:
    """Scales of groups that are lanes' as an array of the operand's shape and layout.

    Args:
      rows: bfloat16 [groups, bn] in the layout `scales_by_lane(groups)`.
      width: of the operand.
      interpret: compute it without registers.

    Returns:
      bfloat16 [bn, width]; columns 2t and 2t + 1 of each 8 have lane t's.
    """
    groups, n = rows.shape
    if interpret:
        by_lane = jnp.repeat(rows, LANES // groups, axis=0).T
        shape = (n, width // (2 * LANES), LANES, 2)
        return jnp.broadcast_to(by_lane[:, None, :, None], shape).reshape(n, width)
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(scales_by_lane(groups),),
        return_type=plgpu.ShapeDtypeStruct((n, width), rows.dtype, layout=layout),
    )
    def repeat(context: Any, array: Any) -> Any:
        register = ir.VectorType.get((2,), ir.BF16Type.get())
        target = layout.to_mgpu()
        registers = np.empty(target.registers_shape((n, width)), dtype=object)
        # Both layouts count 64 rows, then (after columns) the halves of a warp's rows.
        own = array.registers.reshape(n // 64, 2)
        for block, half in np.ndindex(own.shape):
            value = vector.broadcast(register, vector.extract(own[block, half], [], [0]))
            registers[block, :, :, :, half] = value
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

    return repeat(rows)


def _element_type(dtype: Any) -> Any:
    if dtype == jnp.bfloat16:
        return ir.BF16Type.get()
    return ir.IntegerType.get_signless(8)
