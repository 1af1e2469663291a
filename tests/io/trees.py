"""Helpers of the checkpoint tests: trees of random bits, and equality down to the last bit."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

from jaxquant.core.qtensor import QTensor, make_qtensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.io import checksum
from jaxquant.pallas_kernels import packing

Point = collections.namedtuple("Point", ["x", "y"])


def random_bits(shape, dtype, seed=0) -> np.ndarray:
    """An array of incompressible bits, NaNs and denormals included."""
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if checksum.element_bits(dtype) == 4:
        if not jnp.issubdtype(dtype, jnp.integer):
            return rng.integers(0, 16, shape).astype(np.uint8).view(dtype)
        low = -8 if dtype.name == "int4" else 0
        return rng.integers(low, low + 16, shape).astype(dtype)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


def random_qtensor(qtype: str, shape, block: int, seed: int = 0, **static: Any) -> QTensor:
    """A QTensor of incompressible codes, grouped along axis 0 (and packed along it)."""
    q = get_qtype(qtype)
    groups = (shape[0] // block, *shape[1:])
    rng = np.random.default_rng(seed)
    scale: Any = jnp.asarray(rng.uniform(0.5, 2, groups), q.scale_dtype or jnp.float32)
    if q.scale_qtype is not None:
        codes = jnp.asarray(rng.uniform(1, 2, groups), get_qtype(q.scale_qtype).storage)
        scale = make_qtensor(codes, jnp.ones((1,) * len(shape), jnp.float32), qtype=q.scale_qtype)
    if q.packed:
        rows = packing.packed_size(shape[0], q.bits)
        codes = jnp.asarray(random_bits((rows, *shape[1:]), "uint8", seed))
        static |= {"packed_axis": 0, "packed_length": shape[0]}
    else:
        codes = jnp.asarray(random_bits(shape, q.storage, seed))
    return make_qtensor(codes, scale, qtype=qtype, **static)


def assert_same(got: Any, expected: Any, path: str = "root") -> None:
    """Same types, same static fields, same bits, everywhere."""
    assert type(got) is type(expected), f"{path}: {type(got)} is not {type(expected)}"
    if isinstance(expected, QTensor):
        for name in (
            "qtype", "dtype", "act", "packed_axis", "packed_length", "op_rules", "input_group",
        ):  # fmt: skip
            assert getattr(got, name) == getattr(expected, name), f"{path}.{name}"
        for name in ("codes", "scale", "zero_point", "input_scale"):
            assert_same(getattr(got, name), getattr(expected, name), f"{path}.{name}")
    elif isinstance(expected, jax.Array) and jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        assert got.dtype == expected.dtype, path
        assert_same(jax.random.key_data(got), jax.random.key_data(expected), path)
    elif isinstance(expected, (jax.Array, np.ndarray, np.generic)):
        assert got.dtype == expected.dtype and got.shape == expected.shape, path
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), path
    elif isinstance(expected, meta.Partitioned):
        assert got.names == expected.names, path
        assert getattr(got, "rules", None) == getattr(expected, "rules", None), path
        assert_same(got.value, expected.value, path)
    elif isinstance(expected, nnx.Variable):
        assert got.get_metadata() == expected.get_metadata(), path
        assert_same(got.get_value(), expected.get_value(), path)
    elif isinstance(expected, Mapping):
        if isinstance(expected, nnx.State):
            got, expected = got.raw_mapping, expected.raw_mapping
        assert [*got] == [*expected], f"{path}: keys {[*got]} are not {[*expected]}"
        for key in expected:
            assert_same(got[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), path
        for i, (a, b) in enumerate(zip(got, expected)):
            assert_same(a, b, f"{path}/{i}")
    elif isinstance(expected, (float, complex)):
        assert repr(got) == repr(expected), path  # NaN is itself, -0.0 is not 0.0
    else:
        assert got == expected, path
