"""Bit-packing of 3-, 2- and 1-bit integer codes into bytes, along one axis.

Called by `jaxquant.core` (QTensor, encode) and by kernels; takes and returns plain arrays.
int4 and wider have native dtypes and must not come here (jnp.int2 exists, but XLA's CPU
compiler aborts on it).

Layout. Eight consecutive codes along the axis become `bits` consecutive bytes, a
little-endian bit stream: code i of the eight occupies bits [i*bits, (i+1)*bits). So a slice or
a shard that starts and ends on multiples of 8 codes is a slice or shard of the bytes. A last
partial eight is padded with zero bits. A code is stored as the unsigned number
(code - lowest) / step:

| bits | codes            | lowest | step |
|------|------------------|--------|------|
| 3    | -4, -3, ..., 3   | -4     | 1    |
| 2    | -3, -1, 1, 3     | -3     | 2    |
| 1    | -1, 1            | -1     | 2    |
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_GRID = {3: (-4, 1), 2: (-3, 2), 1: (-1, 2)}


def packed_size(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits take along the packed axis."""
    return -(-length // 8) * bits


def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Packs int8 codes along `axis`.

    Args:
      codes: int8 codes on the grid of `bits` (see the module's table); others are undefined.
      bits: 3, 2 or 1.
      axis: the axis to pack, negative or not.

    Returns:
      uint8 array; `axis` has `packed_size(codes.shape[axis], bits)` bytes.
    """
    lowest, step = _grid(bits)
    axis = axis % codes.ndim
    length = codes.shape[axis]
    unsigned = ((codes.astype(jnp.int8) - jnp.int8(lowest)) >> (step - 1)).astype(jnp.uint8)
    if length % 8:
        unsigned = jnp.pad(unsigned, _pad_widths(codes.ndim, axis, -length % 8))
    octets = _split(unsigned, axis, 8)
    if bits == 3:
        word = _or_shifted(octets.astype(jnp.uint32), axis + 1, 3)
        parts = [((word >> s) & 0xFF).astype(jnp.uint8) for s in (0, 8, 16)]
    else:
        per_byte = 8 // bits
        parts = [
            _or_shifted(
                jax.lax.slice_in_dim(octets, i * per_byte, (i + 1) * per_byte, axis=axis + 1),
                axis + 1,
                bits,
            )
            for i in range(bits)
        ]
    return _merge(jnp.stack(parts, axis=axis + 1), axis)


def unpack(packed: jax.Array, bits: int, axis: int, length: int) -> jax.Array:
    """Inverse of `pack`.

    Args:
      packed: uint8 bytes.
      bits: 3, 2 or 1.
      axis: the packed axis.
      length: number of codes along it; `packed_size(length, bits)` must be its size.

    Returns:
      int8 codes; `axis` has `length` of them.

    Raises:
      ValueError: the axis does not hold `length` codes.
    """
    lowest, step = _grid(bits)
    axis = axis % packed.ndim
    if packed.shape[axis] != packed_size(length, bits):
        raise ValueError(
            f"axis {axis} has {packed.shape[axis]} bytes; {length} codes of {bits} bits take"
            f" {packed_size(length, bits)}"
        )
    octets = _split(packed, axis, bits)
    shape = [1] * octets.ndim
    if bits == 3:
        b0, b1, b2 = (
            jax.lax.index_in_dim(octets, i, axis + 1).astype(jnp.uint32) for i in range(3)
        )
        word = b0 | (b1 << 8) | (b2 << 16)
        shape[axis + 1] = 8
        shifts = (jnp.arange(8, dtype=jnp.uint32) * 3).reshape(shape)
        unsigned = ((word >> shifts) & 7).astype(jnp.int8)
    else:
        per_byte = 8 // bits
        shape.insert(axis + 2, per_byte)
        shifts = (jnp.arange(per_byte, dtype=jnp.uint8) * bits).reshape(shape)
        digits = (jnp.expand_dims(octets, axis + 2) >> shifts) & jnp.uint8(2**bits - 1)
        unsigned = _merge(digits, axis + 1).astype(jnp.int8)
    codes = _merge(unsigned, axis)
    if codes.shape[axis] != length:
        codes = jax.lax.slice_in_dim(codes, 0, length, axis=axis)
    return codes * jnp.int8(step) + jnp.int8(lowest)


def _grid(bits: int) -> tuple[int, int]:
    if bits not in _GRID:
        raise ValueError(f"only 3, 2 and 1 bits are packed, not {bits}")
    return _GRID[bits]


def _pad_widths(ndim: int, axis: int, after: int) -> list[tuple[int, int]]:
    return [(0, after if i == axis else 0) for i in range(ndim)]


def _split(x: jax.Array, axis: int, inner: int) -> jax.Array:
    """[..., n, ...] -> [..., n / inner, inner, ...]."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // inner, inner, *x.shape[axis + 1 :])


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """[..., a, b, ...] -> [..., a * b, ...]."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _or_shifted(x: jax.Array, axis: int, bits: int) -> jax.Array:
    """Joins the digits along `axis` (which is removed), digit i shifted left by i * bits."""
    word = jax.lax.index_in_dim(x, 0, axis, keepdims=False)
    for i in range(1, x.shape[axis]):
        digit = jax.lax.index_in_dim(x, i, axis, keepdims=False)
        word = word | (digit << jnp.asarray(i * bits, x.dtype))
    return word
