"""float8_e4m3fn codes to operands of the matrix units where the compiler's conversion is slow.

Called by `tpu.body` for the reading "e4m3" (v5e and v5p). A code is a sign, four bits of exponent
and three of mantissa. With these where bfloat16 has them it is the value times 2^-120, but for an
exponent of 0: whether the matrix units take such numbers of bfloat16 for zero is not known. There
the exponent becomes 1, and the bit that it implies goes out through a second operand: the sign,
times 2^-126, where the exponent was 0. So x is laid out twice, times `UP` and times -`UP`, and what
comes out is the product times `DOWN`; nothing is rounded. x beyond 2^67 is too large for that. The
two codes that are no number are read as 480 and -480.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.tpu.reading import permutation, shifted

UP = 2.0**60
DOWN = 2.0**-60  # UP times 2^-120
_ROWS = 8  # of a register of 32-bit words
_EXPONENT, _TOP = 0x78787878, 0x80808080  # of each byte
_SIGN, _REST, _ONE = 0x80008000, 0x07F007F0, 0x00800080  # of each half


def both_orders(size: int) -> jax.Array:
    """float32 [size, 2 size]: x @ it has x's columns as both operands need them."""
    order = permutation("float8_e4m3fn", "e4m3", size) * UP
    return jnp.concatenate([order, -order], axis=1)


def operands(block: jax.Array) -> jax.Array:
    """bfloat16 [2 rows, bn]: values, and below them what they have too much.

    Args:
      block: float8_e4m3fn [rows, bn], whole units of 32.
    """
    words = pltpu.bitcast(block, jnp.uint32)
    values, implied = [], []
    for first in range(0, words.shape[0], _ROWS):
        word = words[first : first + _ROWS, :]
        zero = _u(_TOP) - (word & _u(_EXPONENT))  # the highest bit of a byte: its exponent is 0
        for left in (8, 0):  # codes of even rows, and of odd ones
            sign = shifted(word, left) & _u(_SIGN)
            implied.append(sign | shifted(zero, left - 8) & _u(_ONE))
            values.append(implied[-1] | shifted(word, left - 4) & _u(_REST))
    return jnp.concatenate([pltpu.bitcast(w, jnp.bfloat16) for w in (*values, *implied)], axis=0)


def _u(bits: int) -> jax.Array:
    return jnp.uint32(bits)
