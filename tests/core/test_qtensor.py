from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxquant.core.qtensor import QTensor, is_qtensor, make_qtensor
from jaxquant.core.qtypes import get_qtype, qtype_names
from jaxquant.core.quantize_array import quantize_array
from tests.core import oracle


def small(**changes) -> QTensor:
    fields = {"codes": jnp.ones((2, 8, 6), jnp.int4), "scale": jnp.full((2, 2, 6), 0.5)}
    return make_qtensor(**(fields | {"qtype": "int4"} | changes))


def test_registry() -> None:
    assert get_qtype("int4").bits == 4
    assert get_qtype(get_qtype("nf4")) is get_qtype("nf4")
    with pytest.raises(ValueError, match="unknown qtype 'int5'; known qtypes: int8, int4, int3"):
        get_qtype("int5")
    assert [get_qtype(name).name for name in qtype_names()] == list(qtype_names())
    assert hash(get_qtype("nf4")) == hash(pickle.loads(pickle.dumps(get_qtype("nf4"))))


def test_fp4_codes_are_the_floats_bits() -> None:
    codes = np.arange(-8, 8).astype(np.int8)
    expected = (codes & 15).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(np.array(get_qtype("mxfp4").table, np.float32), expected)


def test_logical_view() -> None:
    w = small()
    assert (w.shape, w.ndim, w.size, w.dtype) == ((2, 8, 6), 3, 96, jnp.float32)
    assert w.block_shape == (1, 4, 1)
    assert w.nbytes == 48 + 4 * 24  # half a byte a code
    np.testing.assert_array_equal(w.dequantize(), np.full((2, 8, 6), 0.5, np.float32))
    packed = small(codes=jnp.zeros((2, 3, 6), jnp.uint8), qtype="int3", packed_axis=1,
                   packed_length=8)  # fmt: skip
    assert packed.packed_axis == -2
    assert packed.shape == (2, 8, 6)
    assert packed.nbytes == 36 + 96


def test_device_bytes_are_measured() -> None:
    w = small()
    assert w.nbytes_on_device() == sum(x.on_device_size_in_bytes() for x in (w.codes, w.scale))
    abstract = jax.eval_shape(lambda w: w, w)
    assert abstract.nbytes_on_device() == abstract.nbytes == w.nbytes


def test_repr_is_short_and_survives_any_leaves() -> None:
    assert repr(small()) == (
        "QTensor(int4 [2, 8, 6] for float32, blocks [1, 4, 1], scale float32 [2, 2, 6], 144 bytes)"
    )
    w = quantize_array(np.ones((64, 8), np.float32), "nvfp4", (16, 1))
    assert "scale <float8_e4m3 [4, 8], blocks [4, 8]>" in repr(w)
    assert "float32" in repr(jax.eval_shape(lambda: w))
    assert repr(jax.tree.map(lambda _: PartitionSpec("x"), w)).startswith("QTensor(nvfp4, codes=")
    jax.jit(lambda w: [repr(w)] and w.dequantize())(w)


def test_tree_functions() -> None:
    tree = {"k": small(), "b": jnp.zeros(3)}
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["['b']", "['k'].codes", "['k'].scale"]
    assert jax.tree.leaves(tree, is_leaf=is_qtensor)[1] is tree["k"]
    odd = jax.tree.map(lambda _: object(), tree["k"])
    assert isinstance(odd, QTensor) and odd.qtype is tree["k"].qtype
    assert jax.tree.structure(odd) == jax.tree.structure(tree["k"])
    assert jax.tree.structure(tree["k"].replace(act="other")) != jax.tree.structure(tree["k"])


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w + 1,
        lambda w: 2 * w,
        lambda w: jnp.ones((3, 2)) @ w,
        lambda w: np.ones((3, 2)) @ w,
        lambda w: jnp.einsum("a...,a...->...", w, w),
        lambda w: jnp.asarray(w),
        lambda w: np.asarray(w),
        lambda w: jax.jit(jnp.sin)(w),
        lambda w: jnp.exp(w),
        lambda w: w[0],
        lambda w: -w,
        lambda w: [*w],
        lambda w: w > 0,
        lambda w: bool(w),
        lambda w: float(w),
    ],
)
def test_no_arithmetic(operation) -> None:
    with pytest.raises(TypeError, match=r"@jaxquant.quantize.*jaxquant.transform.*dequantize\(\)"):
        operation(small())


def test_attributes_of_arrays_are_refused_like_arithmetic() -> None:
    for name in ("astype", "T", "at", "reshape", "sharding"):
        with pytest.raises(AttributeError, match=rf"\.{name} was read.*@jaxquant.quantize"):
            getattr(small(), name)
    with pytest.raises(AttributeError, match="^'QTensor' object has no attribute 'scales'$"):
        _ = small().scales
    assert not hasattr(small(), "astype")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": jnp.ones((2, 8, 6), jnp.int8)}, "invariant 1: int4 codes must be int4"),
        ({"qtype": "int3"}, "invariant 1: int3 codes must be int8"),
        ({"packed_axis": -1, "packed_length": 6}, "invariant 2: int4 is never packed"),
        ({"packed_length": 6}, "invariant 2: packed_length without packed_axis"),
        ({"scale": jnp.ones((2, 3, 6))}, r"invariant 3: scale shape \(2, 3, 6\) does not divide"),
        ({"scale": jnp.ones((2, 6))}, "invariant 3"),
        ({"zero_point": jnp.ones((2, 1, 6), jnp.int8)}, "invariant 4: zero_point shape"),
        ({"input_scale": jnp.ones(())}, "invariant 5"),
        ({"input_scale": jnp.ones((2, 2, 1))}, "invariant 5"),
        ({"input_group": "q"}, "invariant 7: input_group 'q' without input_scale"),
        ({"dtype": jnp.int32}, "invariant 6: dtype must be floating"),
        ({"scale": jnp.ones((2, 2, 6), jnp.int32)}, "invariant 6: scale must be floating"),
    ],
)
def test_validator(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^layer/kernel: {message}"):
        small(**changes, name="layer/kernel")


@pytest.mark.parametrize(
    ("axis", "length", "message"),
    [(-4, 8, r"\[-3, -1\]"), (-2, None, "without packed_length"), (-2, 9, "has 3 bytes; 9 int3")],
)
def test_validator_of_packing(axis: int, length: int | None, message: str) -> None:
    w = small(codes=jnp.zeros((2, 3, 6), jnp.uint8), qtype="int3", packed_axis=-2, packed_length=8)
    with pytest.raises(ValueError, match=f"invariant 2.*{message}"):
        w.replace(packed_axis=axis, packed_length=length).validate()


def test_zero_point_only_for_integers() -> None:
    w = quantize_array(np.ones((8, 2), np.float32), "nf4", (8, 1))
    with pytest.raises(ValueError, match="invariant 4: nf4 has no zero point"):
        w.replace(zero_point=jnp.zeros((1, 2))).validate()
    assert small(zero_point=jnp.full((2, 2, 6), 0.25)).dequantize()[0, 0, 0] == 0.375


STACKS = {
    "int8": {},
    "int4": {"symmetric": False},
    "int3": {"symmetric": False},
    "int2": {},
    "nf4": {"double_quant": True},
    "nvfp4": {},
    "mxfp4": {},
}


def stacked(name: str, layer_axis: int) -> tuple[QTensor, np.ndarray]:
    """A weight of 3 layers of [32, 8], the layer axis anywhere."""
    shape, blocks = [32, 8], [get_qtype(name).group_size or 8, 1]
    shape.insert(layer_axis, 3)
    blocks.insert(layer_axis, 1)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w = quantize_array(values, name, blocks, stack_axes=(layer_axis,), **STACKS[name]).validate()
    return w, np.moveaxis(oracle.dequantize(w), layer_axis, 0)


@pytest.mark.parametrize("name", STACKS)
def test_stacked_weights_are_sliced_by_scan_vmap_and_indexing(name: str) -> None:
    w, layers = stacked(name, 0)
    _, out = jax.lax.scan(lambda c, w: (c, w.validate().dequantize()), None, w)
    np.testing.assert_array_equal(out, layers)
    np.testing.assert_array_equal(jax.vmap(lambda w: w.dequantize())(w), layers)
    one = jax.tree.map(lambda part: part[1], w).validate()
    np.testing.assert_array_equal(one.dequantize(), layers[1])


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("layer_axis", [1, 2])
def test_layer_axis_that_is_not_first(name: str, layer_axis: int) -> None:
    """Flax' nn.scan moves each leaf's layer axis to the front before it slices."""
    w, layers = stacked(name, layer_axis)
    # No axis lies behind a last layer axis, so nothing can be packed then.
    assert (w.packed_axis is None) == (layer_axis == 2 or not w.qtype.packed)
    moved = jax.tree.map(lambda part: jnp.moveaxis(part, layer_axis, 0), w)
    _, out = jax.lax.scan(lambda c, w: (c, w.validate().dequantize()), None, moved)
    np.testing.assert_array_equal(out, layers)
