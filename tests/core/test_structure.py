"""Structural operations against the same operation on the dequantized array, bit for bit."""

from __future__ import annotations

import functools
import math
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from jaxquant.core import structure
from jaxquant.core.qtensor import QTensor, make_qtensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.structure import Unstructured
from jaxquant.pallas_kernels.packing import pack
from tests.core import oracle

KINDS = {  # qtype, group size (None: the whole axis; 0: one scale for everything)
    "int8 channel": ("int8", None),
    "int4 group": ("int4", 4),
    "int4 tensor": ("int4", 0),
    "int4 asymmetric": ("int4", 8),
    "int3 packed": ("int3", 8),
    "int2 packed": ("int2", 4),
    "fp8": ("float8_e4m3", None),
    "nf4 double": ("nf4", 4),
    "nvfp4": ("nvfp4", 16),
    "mxfp4": ("mxfp4", 32),
}
kinds = st.sampled_from(list(KINDS))


@functools.cache
def weight(kind: str, shape: tuple[int, ...], axis: int, seed: int = 0) -> QTensor:
    """A random weight whose groups lie along `axis` (the whole axis where they do not divide)."""
    name, group = KINDS[kind]
    qtype = get_qtype(name)
    rng = np.random.default_rng(seed)
    groups = [1 if i == axis and group is None else n for i, n in enumerate(shape)]
    if group == 0:
        groups = [1] * len(shape)
    elif group is not None:
        groups[axis] = shape[axis] // group if shape[axis] % group == 0 else 1
    scale = _random_scale(kind, groups, rng)
    zero_point = None
    if kind in ("int4 asymmetric", "int3 packed"):
        zero_point = jnp.asarray(rng.integers(-3, 3, groups), jnp.int8)
    packed = {}
    if qtype.packed:
        levels = 2**qtype.bits
        codes = jnp.asarray(qtype.qmin + qtype.step * rng.integers(levels, size=shape), jnp.int8)
        codes = pack(codes, qtype.bits, axis)
        packed = {"packed_axis": axis, "packed_length": shape[axis]}
    elif qtype.kind == "float":
        codes = jnp.asarray(rng.normal(size=shape), qtype.storage)
    else:
        codes = jnp.asarray(rng.integers(-8, 8, shape).astype(np.int8)).astype(qtype.storage)
    return make_qtensor(codes, scale, zero_point, qtype=qtype, **packed)


def _random_scale(kind: str, shape: list[int], rng: np.random.Generator) -> Any:
    values = rng.uniform(0.5, 2.0, shape).astype(np.float32)
    if kind == "mxfp4":
        return jnp.exp2(jnp.round(values)).astype(jnp.float8_e8m0fnu)
    if kind == "nvfp4":
        codes = jnp.asarray(values, jnp.float8_e4m3fn)
        return make_qtensor(codes, jnp.full([1] * len(shape), 0.3), qtype="float8_e4m3")
    if kind == "nf4 double":
        codes = rng.integers(-128, 127, shape).astype(np.int8)
        outer = [1 if n % 2 else n // 2 for n in shape]
        second = (rng.uniform(0.5, 2.0, outer).astype(np.float32) for _ in range(2))
        return make_qtensor(jnp.asarray(codes), *map(jnp.asarray, second), qtype="int8")
    return jnp.asarray(values)


def check(result: QTensor, expected: Any) -> None:
    result.validate()
    assert result.shape == expected.shape
    np.testing.assert_array_equal(oracle.dequantize(result), np.asarray(expected))


def test_oracle_reads_what_dequantize_reads() -> None:
    for kind in KINDS:
        w = weight(kind, (32, 6), 0)
        np.testing.assert_array_equal(np.asarray(w.dequantize()), oracle.dequantize(w))


SHAPES = [(2, 32, 8), (32, 6), (8, 4, 16), (3, 64), (4, 2, 8, 8)]


@settings(max_examples=14)
@given(kinds, st.sampled_from(SHAPES), st.data())
def test_transpose_and_rev(kind: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    w = weight(kind, shape, data.draw(st.integers(0, len(shape) - 1)))
    order = data.draw(st.permutations(range(len(shape))))
    check(structure.transpose(w, order), np.transpose(oracle.dequantize(w), order))
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    check(structure.rev(w, axes), np.flip(oracle.dequantize(w), axes))


@given(kinds, st.sampled_from(SHAPES), st.data())
def test_reshape(kind: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    w = weight(kind, shape, data.draw(st.integers(0, len(shape) - 1)))
    factors = data.draw(st.permutations(_prime_factors(math.prod(shape))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    edges = [0, *cuts, len(factors)]
    new = [math.prod(factors[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    try:
        result = structure.reshape(w, new)
    except Unstructured as why:
        assert "repeated" in str(why)
        return
    check(result, oracle.dequantize(w).reshape(new))


def _prime_factors(n: int) -> list[int]:
    for p in range(2, n + 1):
        if n % p == 0:
            return [p, *_prime_factors(n // p)]
    return []


@pytest.mark.parametrize(
    ("shape", "blocks", "new", "new_blocks"),
    [
        ((32, 4, 8), (32, 1, 1), (32, 32), (32, 1)),  # DenseGeneral kernel, channel scales
        ((32, 4, 8), (8, 1, 1), (32, 32), (8, 1)),
        ((32, 32), (32, 1), (32, 4, 8), (32, 1, 1)),
        ((4, 8, 32), (4, 8, 1), (32, 32), (32, 1)),  # output projection, two contracted axes
        ((4, 8, 32), (1, 4, 1), (32, 32), (4, 1)),  # blocks lie along the minor axis
        ((32, 32), (16, 1), (4, 8, 32), (2, 8, 1)),  # a block is a multiple of the new axis
        ((32, 32), (4, 1), (4, 8, 32), (1, 4, 1)),  # a block divides the new axis
        ((32, 8), (32, 1), (1, 32, 1, 8), (1, 32, 1, 1)),
        ((2, 16, 8), (1, 16, 1), (2, 1, 16, 8), (1, 1, 16, 1)),
        ((16, 2, 8), (16, 2, 8), (16, 16), (16, 16)),
        ((16, 4, 8), (16, 4, 1), (16, 32), (16, 1)),  # repeated along the merged axis
    ],
)
def test_reshape_keeps_blocks(shape, blocks, new, new_blocks) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w = quantize_array(values, "int4", blocks)
    result = structure.reshape(w, new)
    assert result.block_shape == new_blocks
    check(result, oracle.dequantize(w).reshape(new))


def test_reshape_refuses_to_repeat_scales_for_every_code() -> None:
    w = quantize_array(np.ones((4, 16), np.float32), "int8", (4, 1))
    with pytest.raises(Unstructured, match="16 scales would have to be repeated to 64"):
        structure.reshape(w, (64,))


def test_packed_axis_survives_what_does_not_touch_it() -> None:
    w = weight("int3 packed", (2, 32, 6), 1)
    assert (w.packed_axis, w.packed_length) == (-2, 32)
    assert structure.reshape(w, (2, 32, 3, 2)).packed_axis == -3
    assert structure.transpose(w, (1, 0, 2)).packed_axis == -3
    assert structure.slice(w, (1, 0, 2), (2, 32, 5)).packed_axis == -2
    assert structure.squeeze(structure.slice(w, (1, 0, 0), (2, 32, 6)), (0,)).packed_axis == -2
    assert structure.reshape(w, (64, 6)).packed_axis is None
    assert structure.unpacked(w).codes.dtype == jnp.int8
    check(structure.unpacked(w), oracle.dequantize(w))


@given(kinds, st.sampled_from(SHAPES), st.data())
def test_slice(kind: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    w = weight(kind, shape, data.draw(st.integers(0, len(shape) - 1)))
    starts, limits, strides = [], [], []
    for n in shape:
        start = data.draw(st.integers(0, n - 1))
        starts.append(data.draw(st.sampled_from([0, start, start // 4 * 4])))
        limits.append(data.draw(st.sampled_from([n, min(n, starts[-1] + 4)])))
        strides.append(data.draw(st.sampled_from([1, 1, 1, 2, 4])))
    try:
        result = structure.slice(w, starts, limits, strides)
    except Unstructured as why:
        assert "cuts groups" in str(why)
        return
    check(result, oracle.dequantize(w)[tuple(map(slice, starts, limits, strides))])


def test_slice_on_block_borders() -> None:
    w = weight("int4 group", (16, 6), 0)
    for start, limit, stride, groups in ((4, 12, 1, 2), (5, 7, 1, 1), (0, 16, 4, 4), (1, 16, 8, 2)):
        result = structure.slice(w, (start, 1), (limit, 5), (stride, 2))
        assert result.scale.shape == (groups, 2)
        check(result, w.dequantize()[start:limit:stride, 1:5:2])
    with pytest.raises(Unstructured, match=r"\[2:8:1\] of axis 0 cuts groups of 4"):
        structure.slice(w, (2, 0), (8, 6))


@settings(max_examples=14)
@given(kinds, st.sampled_from([(2, 32, 8), (32, 6)]), st.data())
def test_dynamic_slice(kind: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    w = weight(kind, shape, axis)
    sizes = [data.draw(st.sampled_from([n, 1, min(n, 2)])) for n in shape]
    starts = [data.draw(st.integers(-2, n + 1)) for n in shape]  # out of bounds is clamped

    def sliced(w: QTensor, starts: list[jax.Array]) -> QTensor:
        return structure.dynamic_slice(w, starts, sizes)

    expected = oracle.dequantize(w)
    for i, (start, size, n) in enumerate(zip(starts, sizes, shape, strict=True)):
        expected = expected.take(np.clip(start, 0, n - size) + np.arange(size), axis=i)
    try:
        check(jax.jit(sliced)(w, [jnp.int32(s) for s in starts]), expected)
    except Unstructured as why:
        assert "may cut groups" in str(why) and w.block_shape[axis] not in (1, shape[axis])
    try:
        check(sliced(w, starts), expected)  # known starts: a static slice
    except Unstructured as why:
        assert "cuts groups" in str(why)


@settings(max_examples=14)
@given(kinds, st.sampled_from([(2, 32, 8), (32, 6)]), st.data())
def test_concatenate(kind: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    ws = [weight(kind, shape, axis, seed) for seed in range(3)]
    along = data.draw(st.integers(0, len(shape) - 1))
    check(
        structure.concatenate(ws, along), np.concatenate([oracle.dequantize(w) for w in ws], along)
    )
    stacked = structure.concatenate([structure.expand_dims(w, (0,)) for w in ws], 0)
    check(stacked, np.stack([oracle.dequantize(w) for w in ws]))


def test_concatenate_of_unequal_blocks() -> None:
    values = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    a = quantize_array(values, "int4", (24, 1))
    b = quantize_array(values[:16], "int4", (8, 1))
    result = structure.concatenate([a, b], 0)
    assert result.block_shape == (8, 1)
    check(result, jnp.concatenate([a.dequantize(), b.dequantize()]))
    with pytest.raises(Unstructured, match="qtype is"):
        structure.concatenate([a, quantize_array(values, "int8", (24, 1))], 0)


@settings(max_examples=14)
@given(kinds, st.sampled_from([(2, 32, 8), (32, 6)]), st.data())
def test_broadcast_squeeze_expand(kind: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    w = weight(kind, shape, data.draw(st.integers(0, len(shape) - 1)))
    new = data.draw(st.lists(st.integers(0, len(shape)), unique=True, max_size=2))
    expanded = structure.expand_dims(w, new)
    check(expanded, np.expand_dims(oracle.dequantize(w), new))
    check(structure.squeeze(expanded, new), oracle.dequantize(w))
    dims = [1 + i for i in range(len(shape))]
    wide = structure.broadcast_in_dim(w, (3, *shape), dims)
    assert wide.scale.shape == (1, *w.scale.shape)
    check(wide, np.broadcast_to(oracle.dequantize(w), (3, *shape)))
    widened = structure.broadcast_in_dim(expanded, [5 if n == 1 else n for n in expanded.shape],
                                         range(expanded.ndim))  # fmt: skip
    check(widened, np.broadcast_to(oracle.dequantize(expanded), widened.shape))


def _index_cases(w: QTensor, indices: np.ndarray, axis: int, mode: str | None):
    def take(x, i):
        return jnp.take(x, i, axis=axis, mode=mode)

    def gathered(w: QTensor, i: jax.Array) -> QTensor:
        jaxpr = jax.make_jaxpr(take)(jax.ShapeDtypeStruct(w.shape, w.dtype), i)
        return _interpret(jaxpr, w, i)

    return gathered(w, indices), take(w.dequantize(), indices)


def _interpret(closed, w: QTensor, *rest):
    """Evaluates a jaxpr, gathers of w through `structure.gather`."""
    env = dict(zip(closed.jaxpr.invars, (w, *rest), strict=True))
    env |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    for eqn in closed.jaxpr.eqns:
        ins = [a.val if hasattr(a, "val") else env[a] for a in eqn.invars]
        if "jaxpr" in eqn.params:
            outs = _interpret(eqn.params["jaxpr"], *ins)
            outs = outs if isinstance(outs, list) else [outs]
        elif eqn.primitive.name == "gather" and isinstance(ins[0], QTensor):
            outs = [structure.gather(*ins, **eqn.params)]
        else:
            outs = eqn.primitive.bind(*ins, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env |= dict(zip(eqn.outvars, outs, strict=True))
    results = [a.val if hasattr(a, "val") else env[a] for a in closed.jaxpr.outvars]
    return results[0] if len(results) == 1 else results


@settings(max_examples=14)
@given(kinds, st.sampled_from([(2, 32, 8), (32, 6)]), st.data())
def test_gather_rows(kind: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    w = weight(kind, shape, data.draw(st.integers(0, len(shape) - 1)))
    indices = np.array([[0, 1, shape[axis] - 1], [3, shape[axis] + 5, -1]], np.int32)
    mode = data.draw(st.sampled_from([None, "clip", "fill"]))
    result, expected = _index_cases(w, indices, axis, mode)
    check(result, expected)


def test_gather_reads_only_the_rows_scales() -> None:
    w = weight("int8 channel", (32, 16), 1)  # an embedding: one scale a row
    result, expected = _index_cases(w, np.array([[3, 4], [5, 99]], np.int32), 0, "clip")
    assert result.scale.shape == (2, 2, 1)
    check(result, expected)
    w = weight("int8 channel", (32, 16), 0)  # one scale a column serves all rows
    result, _ = _index_cases(w, np.array([[3, 4], [5, 99]], np.int32), 0, "clip")
    assert result.scale.shape == (1, 1, 16)


def test_gather_fills_like_the_float_gather() -> None:
    w = weight("int4 asymmetric", (32, 16), 1)
    result, expected = _index_cases(w, np.array([1, 40], np.int8), 0, None)
    assert np.isnan(expected[1]).all()
    check(result, expected)
    dn = lax.GatherDimensionNumbers((1,), (0,), (0,))
    args = (np.array([[1], [40]], np.int32), dn, (1, 16))
    zeros = structure.gather(w, *args, mode="fill", fill_value=0)
    check(zeros, lax.gather(w.dequantize(), *args, mode="fill", fill_value=0))
    with pytest.raises(Unstructured, match="filled with 2"):
        structure.gather(w, *args, mode="fill", fill_value=2)


@pytest.mark.parametrize("kind", KINDS)
def test_gather_in_a_batch(kind: str) -> None:
    """Batched gathers (operand batching dimensions) and slices of more than one row."""
    w = weight(kind, (2, 32, 8), 1)
    dn = lax.GatherDimensionNumbers((1,), (1,), (1,), (0,), (0,))
    args = (np.array([[1], [4]], np.int32), dn, (1, 1, 8))
    check(structure.gather(w, *args, mode="clip"), lax.gather(w.dequantize(), *args, mode="clip"))
    dn = lax.GatherDimensionNumbers((1, 2), (0,), (0,))
    args = (np.array([[1], [4], [0]], np.int32), dn, (1, 32, 4))
    check(structure.gather(w, *args, mode="clip"), lax.gather(w.dequantize(), *args, mode="clip"))
    dn = lax.GatherDimensionNumbers((1, 2, 3), (), (0,))
    args = (np.array([[1], [-1]], np.int32), dn, (2, 32, 8))
    check(structure.gather(w, *args, mode="fill"), lax.gather(w.dequantize(), *args, mode="fill"))


def test_input_scale_follows_the_stacked_axis() -> None:
    w = weight("int8 channel", (3, 8, 4), 1)
    w = make_qtensor(w.codes, w.scale, None, jnp.arange(1.0, 4).reshape(3, 1, 1), qtype="int8")
    one = structure.squeeze(structure.dynamic_slice(w, [jnp.int32(1), 0, 0], (1, 8, 4)), (0,))
    assert one.input_scale.shape == (1, 1) and float(one.input_scale[0, 0]) == 2.0
    moved = structure.transpose(w, (1, 0, 2)).validate()
    assert moved.input_scale.shape == (1, 3, 1)
    split = structure.reshape(w, (3, 8, 2, 2)).validate()
    assert split.input_scale.shape == (3, 1, 1, 1)
    with pytest.raises(Unstructured, match="input scale"):
        structure.reshape(w, (24, 4))
    with pytest.raises(Unstructured, match="input scales of their own"):
        structure.concatenate([w, w], 2)
    assert structure.concatenate([w, w], 0).input_scale.shape == (6, 1, 1)


def test_astype_and_scale_by() -> None:
    w = weight("nf4 double", (32, 6), 0)
    narrow = structure.astype(w, jnp.bfloat16).validate()
    assert narrow.dtype == jnp.bfloat16 == narrow.dequantize().dtype
    np.testing.assert_array_equal(narrow.dequantize(), w.dequantize().astype(jnp.bfloat16))
    with pytest.raises(Unstructured, match="int32"):
        structure.astype(w, jnp.int32)
    for kind in KINDS:
        w = weight(kind, (32, 6), 0)
        scaled = structure.scale_by(w, jnp.float32(3)).validate()
        np.testing.assert_allclose(oracle.dequantize(scaled), 3 * oracle.dequantize(w), rtol=1e-6)
