"""Packed int2 and int3 codes, as 32-bit words in registers, become pairs of bfloat16 numbers.

Called by `gpu.reading`. A lane of the four that share a row holds whole words of it, `LANE_CODES`
codes; a mask and an "or" put two of them, half of the lane's codes apart, into the mantissas of two
numbers 128 + 2^p u, u = code - lowest, wherever in the low 7 bits they lie (p). So a word needs few
shifts: 3 for 16 codes of 2 bits; 8 (and 3 to pair the halves of three words) for 32 of 3 bits.
`affine` turns the numbers into codes, exactly. `packing` defines the bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.pallas_kernels.gpu.layouts import WORDS, WORDS_BY_THREE

# bfloat16 128 in both halves of a word; the low 7 bits of its mantissa are units.
MAGIC = 0x43004300

# By plane: right shift of the word (negative: left), and where the code then begins.
_INT2 = ((-1, 1), (-1, 3), (-1, 5), (5, 1), (5, 3), (5, 5), (11, 1), (11, 3))
# By plane: which 16-bit part of the lane's stream, right shift, beginning; and for codes that lie
# across two parts, the left shift of the next part and how many low bits are in the first.
_INT3 = (
    (0, 0, 0, None),
    (0, 0, 3, None),
    (0, 6, 0, None),
    (0, 6, 3, None),
    (0, 12, 0, None),
    (0, 12, 3, (4, 1)),
    (1, 0, 2, None),
    (1, 5, 0, None),
    (1, 5, 3, None),
    (1, 11, 0, None),
    (1, 11, 3, (5, 2)),
    (2, 0, 1, None),
    (2, 0, 4, None),
    (2, 6, 1, None),
    (2, 6, 4, None),
    (2, 12, 1, None),
)


def affine(bits: int) -> list[tuple[float, float]]:
    """By plane, factor and summand that make the code of the plane's number."""
    if bits == 2:  # code = 2u - 3
        return [(2.0 ** (1 - p), -(128 * 2.0 ** (1 - p) + 3)) for _, p in _INT2]
    return [(2.0**-p, -(128 * 2.0**-p + 4)) for _, _, p, _ in _INT3]  # code = u - 4


def planes(words: jax.Array, bits: int, magic: Any, interpret: bool) -> list[jax.Array]:
    """What `reading.assemble` takes: plane i holds the codes i and i + L / 2 of a lane's L.

    Args:
      words: int32 [rows, w] in the layout `WORDS`, or `WORDS_BY_THREE` for 3 bits.
      bits: 2 or 3.
      magic: `MAGIC`, perhaps as a value that the compilers do not know.
      interpret: compute it without registers.

    Returns:
      8 int32 arrays [rows, w], or 16 [rows, w / 3].
    """
    if bits == 2:
        return [_field(words, shift, 3 << p) | magic for shift, p in _INT2]
    first, second, third = deal(words, interpret)
    low, high = jnp.int32(0xFFFF), jnp.int32(-0x10000)
    parts = [
        (first & low) | (second & high),
        lax.shift_right_logical(first, jnp.int32(16)) | lax.shift_left(third, jnp.int32(16)),
        (second & low) | (third & high),
    ]
    made = []
    for part, shift, p, across in _INT3:
        if across is None:
            made.append(_field(parts[part], shift, 7 << p) | magic)
            continue
        left, below = across
        mask = ((1 << below) - 1) << p
        upper = _field(parts[part + 1], -left, (7 << p) & ~mask)
        made.append(_field(parts[part], shift, mask) | (upper | magic))
    return made


def _field(word: jax.Array, shift: int, mask: int) -> jax.Array:
    """The masked bits of both halves of a shifted word."""
    if shift > 0:
        word = lax.shift_right_logical(word, jnp.int32(shift))
    elif shift < 0:
        word = lax.shift_left(word, jnp.int32(-shift))
    return word & jnp.int32(mask * 0x10001)


def deal(words: jax.Array, interpret: bool) -> list[jax.Array]:
    """The first, second and third word of each lane: [rows, 3 w] to three [rows, w]."""
    rows, width = words.shape
    shape = rows, width // 3
    if interpret:
        return [words.reshape(rows, width // 3, 3)[:, :, i] for i in range(3)]

    @plgpu.inline_mgpu(
        arg_types=(WORDS_BY_THREE,),
        return_type=[plgpu.ShapeDtypeStruct(shape, jnp.dtype("int32"), layout=WORDS)] * 3,
    )
    def split(context: Any, array: Any) -> Any:
        target = WORDS.to_mgpu()
        parts = []
        for i in range(3):
            registers = np.empty(target.registers_shape(shape), dtype=object)
            for at in np.ndindex(registers.shape):
                registers[at] = array.registers[(*at[:-1], i, at[-1])]
            parts.append(
                mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=True)
            )
        return parts

    return split(words)
