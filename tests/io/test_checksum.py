"""The checksum: one definition on host and devices, blind to sharding, blind to no change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.io import checksum

DTYPES = (
    *("bool", "int4", "uint4", "int8", "uint8", "int16", "int32", "uint32", "float16", "bfloat16"),
    *("float32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
)


def random_bits(shape, dtype, seed=0):
    """An array of random bits, NaNs and denormals included."""
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if checksum.element_bits(dtype) == 4:
        low = -8 if dtype.name == "int4" else 0
        return rng.integers(low, low + 16, shape).astype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_device_agrees_with_host(dtype):
    # More words than `_HOST_WORDS`, so that the device really computes.
    array = random_bits((17, 4001), dtype)
    assert array.size > checksum._HOST_WORDS
    expected = checksum.host_checksum(array)
    assert expected == tuple(int(s) for s in checksum._whole(jnp.asarray(array)))
    assert checksum.checksums([array]) == checksum.checksums([jnp.asarray(array)])


def test_definition():
    """The formula of the docstring, in Python integers."""

    def mix(h, m, b, n):
        h = ((h ^ (h >> 16)) * m) & 0xFFFFFFFF
        h = ((h ^ (h >> b)) * n) & 0xFFFFFFFF
        return h ^ (h >> 16)

    array = random_bits((3, 5), "float32")
    first = second = 0
    for i, word in enumerate(array.view(np.uint32).reshape(-1).tolist()):
        golden = 0x9E3779B9
        row, column = divmod(i, 5)
        key = row * ((golden * 3) & 0xFFFFFFFF | 1) + column * ((golden * 5) & 0xFFFFFFFF | 1)
        position = mix((i * golden + 1) & 0xFFFFFFFF, 0x85EBCA6B, 13, 0xC2B2AE35)
        h = mix(word ^ position, 0x85EBCA6B, 13, 0xC2B2AE35)
        first += h
        second += mix(h ^ (key & 0xFFFFFFFF), 0x7FEB352D, 15, 0x846CA68B)
    assert checksum.host_checksum(array) == (first % 2**32, second % 2**32)


def test_pinned():
    """Files hold these digits: a change of the formula is a new format version."""
    arrays = [np.arange(7, dtype=np.int8), np.zeros((2, 3), np.float32), np.float64(1.5)]
    assert checksum.checksums(arrays) == PINNED


PINNED = ["fdeaac3aae816efa", "54b04e6fa8f90ed0", "cc8c47be1c0b3a1d"]


@pytest.mark.parametrize(
    ("mesh_shape", "names", "spec"),
    [
        ((8,), ("a",), P("a")),
        ((8,), ("a",), P(None, "a")),
        ((2, 4), ("a", "b"), P("b", "a")),
        ((2, 4), ("a", "b"), P(("a", "b"))),
        ((2, 4), ("a", "b"), P(None, "a")),
        ((2, 4), ("a", "b"), P()),
    ],
)
@pytest.mark.parametrize("dtype", ["int4", "complex64"])
def test_does_not_depend_on_sharding(mesh_shape, names, spec, dtype):
    array = random_bits((64, 2048), dtype)
    expected = checksum.checksums([array])
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh(mesh_shape, names, axis_types=(axis_type,) * len(names))
        placed = jax.device_put(jnp.asarray(array), NamedSharding(mesh, spec))
        assert checksum.checksums([placed]) == expected


def test_works_under_another_mesh():
    array = random_bits((64, 2048), "float32")
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    other = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    placed = jax.device_put(array, NamedSharding(mesh, P("a")))
    single = jax.device_put(array, jax.devices()[3])
    with jax.set_mesh(other):
        assert checksum.checksums([placed, single]) == checksum.checksums([array]) * 2


def test_gathers_nothing_and_stores_nothing():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    sharding = NamedSharding(mesh, P("a", "b"))
    struct = jax.ShapeDtypeStruct((1024, 4096), jnp.int8, sharding=sharding)
    compiled = checksum._sharded(sharding).lower(struct).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in text
    part = 1024 * 4096 // 8
    assert compiled.memory_analysis().temp_size_in_bytes < part // 4


@given(
    st.sampled_from(("int4", "int8", "bfloat16", "float32", "float64", "complex128")),
    st.lists(st.integers(1, 5), min_size=0, max_size=4),
    st.data(),
)
def test_every_single_bit_is_seen(dtype, shape, data):
    array = random_bits(tuple(shape), dtype, seed=len(shape))
    before = checksum.host_checksum(array)
    raw = bytearray(array.tobytes())
    bits = 4 if dtype == "int4" else 8
    where = data.draw(st.integers(0, len(raw) - 1))
    raw[where] ^= 1 << data.draw(st.integers(0, bits - 1))
    changed = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    after = checksum.host_checksum(changed)
    # Elements of at most 32 bits: both sums are sure to differ.
    if array.dtype.itemsize <= 4:
        assert before[0] != after[0] and before[1] != after[1]
    assert before != after


def test_every_swap_of_different_words_is_seen():
    array = random_bits((5, 13), "float32")
    before = checksum.host_checksum(array)
    # The hard case for linear sums: words that differ in the sign bit only.
    array.reshape(-1)[7] = -array.reshape(-1)[3]
    base = checksum.host_checksum(array)
    assert base != before
    flat = array.reshape(-1).view(np.uint32)
    for i in range(flat.size):
        for j in range(i):
            if flat[i] == flat[j]:
                continue
            flat[[i, j]] = flat[[j, i]]
            assert checksum.host_checksum(array) != base
            flat[[i, j]] = flat[[j, i]]


def test_rows_columns_and_shifts_are_seen():
    array = random_bits((32, 64), "int4")
    seen = {checksum.host_checksum(array)}
    changed = [np.roll(array, k, axis) for axis in (0, 1) for k in range(1, 32)]
    changed += [array[::-1], array[:, ::-1], np.zeros_like(array)]
    for other in changed:
        seen.add(checksum.host_checksum(np.ascontiguousarray(other)))
    assert len(seen) == 1 + len(changed)


def test_positions_beyond_32_bits_have_their_own_keys():
    """Two axes of 2^17: flat indices 2^32 apart collide in the first sum, not in the second."""
    strides, weights = checksum._position_weights((1 << 17, 1 << 17))
    (i, j), (k, m) = (0, 5), (1 << 15, 5)
    assert ((i * strides[0] + j) - (k * strides[0] + m)) % 2**32 == 0
    assert (i * weights[0] + j * weights[1] - k * weights[0] - m * weights[1]) % 2**32 != 0
