from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxquant.pallas_kernels import packing
from jaxquant.pallas_kernels.packing import packed_size

pack = jax.jit(packing.pack, static_argnums=(1, 2))  # one compilation instead of ten
unpack = jax.jit(packing.unpack, static_argnums=(1, 2, 3))

GRIDS = {3: range(-4, 4), 2: (-3, -1, 1, 3), 1: (-1, 1)}
bits_of = st.sampled_from(list(GRIDS))


def random_codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(GRIDS[bits], np.int8), shape)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of a one-dimensional array, by Python integers."""
    low, step = min(GRIDS[bits]), 1 if bits == 3 else 2
    number = sum(((int(c) - low) // step) << (bits * i) for i, c in enumerate(codes))
    return np.frombuffer(number.to_bytes(packed_size(len(codes), bits), "little"), np.uint8)


@settings(max_examples=12)
@given(bits_of, st.sampled_from([1, 7, 8, 29]))
def test_layout_is_a_little_endian_bit_stream(bits: int, length: int) -> None:
    codes = random_codes(bits, (length,), seed=length)
    np.testing.assert_array_equal(pack(jnp.asarray(codes), bits, 0), stream(codes, bits))


@settings(max_examples=12)
@given(bits_of, st.sampled_from([(3, 16), (17, 2, 3)]), st.data())
def test_round_trip_along_any_axis(bits: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    codes = random_codes(bits, shape)
    packed = pack(jnp.asarray(codes), bits, axis)
    assert packed.dtype == jnp.uint8
    assert packed.shape[axis] == packed_size(shape[axis], bits)
    np.testing.assert_array_equal(unpack(packed, bits, axis, shape[axis]), codes)


@pytest.mark.parametrize("bits", GRIDS)
def test_aligned_slices_of_bytes_are_slices_of_codes(bits: int) -> None:
    codes = random_codes(bits, (32, 4))
    packed = pack(jnp.asarray(codes), bits, 0)
    np.testing.assert_array_equal(unpack(packed[bits : 3 * bits], bits, 0, 16), codes[8:24])


@pytest.mark.parametrize("bits", GRIDS)
def test_works_under_jit_and_vmap(bits: int) -> None:
    codes = random_codes(bits, (3, 24, 5))
    packed = jax.jit(jax.vmap(lambda c: pack(c, bits, -2)))(codes)
    np.testing.assert_array_equal(packed, pack(jnp.asarray(codes), bits, 1))
    back = jax.jit(jax.vmap(lambda p: unpack(p, bits, 0, 24), in_axes=1, out_axes=1))
    np.testing.assert_array_equal(back(packed.swapaxes(0, 1)).swapaxes(0, 1), codes)


def test_errors() -> None:
    with pytest.raises(ValueError, match="not 4"):
        pack(jnp.zeros(8, jnp.int8), 4, 0)
    with pytest.raises(ValueError, match="axis 0 has 3 bytes; 17 codes of 3 bits take 9"):
        unpack(jnp.zeros(3, jnp.uint8), 3, 0, 17)
