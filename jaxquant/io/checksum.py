"""A 64-bit checksum of an array's bits that does not depend on where its parts lie.

`save` writes one for every array and `restore` recomputes it, since Orbax and its storage return
altered bytes without a word. Every device hashes the part it holds and the sums are added, so an
array that was saved from one mesh may be checked on another, and nothing is gathered or copied.

The checksum is a pair of sums modulo 2^32 over the 32-bit words of the array (elements narrower
than that count as one word each; wider ones as two or four)::

    h[i] = mix(word[i] ^ mix(i * C + 1))        first sum:  sum of h
    g[i] = mix'(h[i] ^ position key[i])         second sum: sum of g

What it detects. `mix` and `mix'` are bijections of 32-bit words, so any change confined to one
word changes h and g of that word and with them both sums: always detected, whichever bits and
however many. Everything else (words swapped, blocks moved or zeroed, many bits flipped) changes
each sum by a pseudo-random amount and is missed with probability 2^-64. The second key is made of
the axis indices, not of the flat index, so that also words 2^32 positions apart have different
keys. It is no cryptographic digest: who wants to forge a checkpoint can. Shape and dtype are no
part of it; the manifest states and checks them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF
# Below this many words, numpy is faster than compiling a program for one more shape.
_HOST_WORDS = 1 << 16
_CHUNK = 1 << 20  # words hashed at a time on the host, which bounds temporaries


def checksums(arrays: Sequence[Any]) -> list[str]:
    """The checksums of several arrays; devices work on all of them before the first is read.

    Args:
      arrays: `jax.Array`s (no key arrays) or numpy arrays of any shape, dtype and sharding.

    Returns:
      For each array 16 hexadecimal digits. Equal bits in the same shape give equal digits on
      the device, on the host and under every sharding.
    """
    pending = [_start(array) for array in arrays]
    return ["".join(f"{int(lane) & _MASK:08x}" for lane in lanes) for lanes in pending]


def host_checksum(array: np.ndarray) -> tuple[int, int]:
    """Both sums of a numpy array, in bounded memory; the definition that devices must agree with.

    Args:
      array: any shape; any dtype without objects.

    Returns:
      The two sums, each in [0, 2^32).
    """
    words = _host_words(array)
    strides, keys = _position_weights(words.shape)
    flat = words.reshape(-1)
    first = second = 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint64)
        key = np.zeros(part.size, np.uint32)
        for size, stride, weight in zip(words.shape, strides, keys, strict=True):
            coordinate = (index // np.uint64(stride)) % np.uint64(size)
            key += coordinate.astype(np.uint32) * np.uint32(weight)
        h, g = _hash(part, (index & np.uint64(_MASK)).astype(np.uint32), key, np.uint32)
        first += int(h.sum(dtype=np.uint64))
        second += int(g.sum(dtype=np.uint64))
    return first & _MASK, second & _MASK


def _start(array: Any) -> tuple[Any, Any]:
    """Both sums, perhaps still being computed on the devices."""
    if not isinstance(array, jax.Array):
        return host_checksum(np.asarray(array))
    if array.size == 0:
        return 0, 0
    if array.is_fully_addressable and array.size <= _HOST_WORDS:
        return host_checksum(np.asarray(array))
    sharding = array.sharding
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
        mesh: Any = sharding.mesh
        # The mesh of the array, in case the caller works under another one.
        with jax.set_mesh(mesh):
            return _sharded(sharding)(array)
    if sharding.is_fully_replicated:
        array = array.addressable_shards[0].data
        with jax.set_mesh(Mesh(np.array([array.device]), ("device",))):
            return _whole(array)
    return _whole(array)


@jax.jit
def _whole(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    words = _device_words(array)
    return _device_sums(words, [jnp.arange(n, dtype=jnp.uint32) for n in words.shape], words.shape)


@functools.lru_cache(maxsize=256)
def _sharded(sharding: NamedSharding) -> Any:
    """The checksum of arrays with this sharding, each device hashing its own part."""
    mesh = sharding.mesh
    names = [() if s is None else (s if isinstance(s, tuple) else (s,)) for s in sharding.spec]
    axes = tuple(name for along in names for name in along)

    def run(array: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = jax.eval_shape(_device_words, jax.ShapeDtypeStruct(array.shape, array.dtype)).shape

        def local(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            words = _device_words(part)
            coordinates = [jnp.arange(n, dtype=jnp.uint32) for n in words.shape]
            for axis, along in enumerate(names):
                shard = jnp.uint32(0)
                for name in along:
                    position = lax.axis_index(name).astype(jnp.uint32)
                    shard = shard * jnp.uint32(mesh.shape[name]) + position
                coordinates[axis] = coordinates[axis] + shard * jnp.uint32(words.shape[axis])
            first, second = _device_sums(words, coordinates, whole)
            return lax.psum(first, axes), lax.psum(second, axes)

        replicated = (PartitionSpec(), PartitionSpec())
        return jax.shard_map(
            local, mesh=mesh, in_specs=(sharding.spec,), out_specs=replicated, check_vma=False
        )(array)

    return jax.jit(run)


def _device_sums(
    words: jax.Array, coordinates: Sequence[jax.Array], shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Both sums of a part of an array.

    Args:
      words: uint32, the part.
      coordinates: for every axis, the index in the whole array of each row of the part.
      shape: shape of the whole array of words.
    """
    strides, weights = _position_weights(shape)
    index = jnp.zeros((), jnp.uint32)
    key = jnp.zeros((), jnp.uint32)
    for axis, (stride, weight) in enumerate(zip(strides, weights, strict=True)):
        along = coordinates[axis].reshape([-1 if d == axis else 1 for d in range(words.ndim)])
        index = index + along * jnp.uint32(stride & _MASK)
        key = key + along * jnp.uint32(weight)
    h, g = _hash(words, index, key, jnp.uint32)
    # One reduction of both, which XLA fuses with the hash: two sums would store h.
    zero = jnp.uint32(0)
    first, second = lax.reduce(
        (h, jnp.broadcast_to(g, h.shape)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(h.ndim)),
    )
    return first, second


def _hash(word: Any, index: Any, key: Any, u32: Any) -> tuple[Any, Any]:
    """The h and g of the module's formula, for numpy and jax arrays alike."""
    position = _mix(index * u32(_GOLDEN) + u32(1), 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16, u32)
    h = _mix(word ^ position, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16, u32)
    g = _mix(h ^ key, 16, 0x7FEB352D, 15, 0x846CA68B, 16, u32)
    return h, g


def _mix(h: Any, a: int, m: int, b: int, n: int, c: int, u32: Any) -> Any:
    """A bijection of 32-bit words: xor-shifts and odd factors (MurmurHash3's, lowbias32's)."""
    h = (h ^ (h >> u32(a))) * u32(m)
    h = (h ^ (h >> u32(b))) * u32(n)
    return h ^ (h >> u32(c))


def _position_weights(shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Row-major strides, and an odd weight for every axis."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return strides, [((_GOLDEN * (2 * axis + 3)) & _MASK) | 1 for axis in range(len(shape))]


def _device_words(array: jax.Array) -> jax.Array:
    """The bits as uint32, one trailing axis more where an element has more than 32 of them."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        parts = [_device_words(array.real), _device_words(array.imag)]
        return jnp.stack(parts, -1) if array.dtype.itemsize == 8 else jnp.concatenate(parts, -1)
    bits = element_bits(array.dtype)
    word = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    return lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _host_words(array: np.ndarray) -> np.ndarray:
    """As `_device_words`, in numpy; words of narrow elements stay narrow to save memory."""
    array = np.asarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    bits = element_bits(array.dtype)
    if bits < 8:
        return array.view(np.uint8) & np.uint8((1 << bits) - 1)
    if bits <= 32:
        return array.view(f"u{bits // 8}")
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    return contiguous[..., None].view(np.uint32)


def element_bits(dtype: Any) -> int:
    """Bits of one element: 4 for int4, where numpy's itemsize says a byte."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    if jnp.issubdtype(dtype, jnp.floating):
        return int(jnp.finfo(dtype).bits)
    return dtype.itemsize * 8
