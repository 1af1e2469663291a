"""Codes in a platform's order: what moves, and how a prepared weight passes into a scan."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxquant.core import prepared, structure
from jaxquant.core.quantize_array import quantize_array

DEVICES = jax.devices()[:4]
# qtype and group; int4 and nf4 codes travel as bytes.
KINDS = [("int8", None), ("int4", 2), ("nf4", 2), ("int2", None), ("float8_e4m3", None)]


def weight(shape, contracted, qtype="int4", group=None):
    """Random; one scale for all contracted values, or groups along the last contracted axis."""
    axes = sorted(axis % len(shape) for axis in contracted)
    block = [n if i in axes else 1 for i, n in enumerate(shape)]
    if group is not None:
        block = [group if i == axes[-1] else 1 for i in range(len(shape))]
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    packed = axes[-1] - len(shape) if qtype in ("int2", "int3") else None
    w = quantize_array(values, qtype, block, packed_axis=packed)
    return w.replace(contracted=tuple(axis - len(shape) for axis in axes))


def order_in_memory(codes):
    return tuple(codes.format.layout.major_to_minor)


@pytest.mark.parametrize(
    ("shape", "contracted", "order"),
    [
        ((6, 4), (-2,), (1, 0)),
        ((6, 4), (-1,), (0, 1)),
        ((3, 6, 4), (-2,), (0, 2, 1)),
        ((2, 4, 6), (-3, -2), (2, 0, 1)),
        ((3, 2, 4, 6), (-3, -2), (0, 3, 1, 2)),
        ((4, 2, 6), (-3,), (1, 2, 0)),
    ],
)
def test_contracted_axes_come_last_on_cuda(shape, contracted, order):
    w = weight(shape, contracted, group=2)
    assert prepared.memory_order(w, "cuda") == order
    for platform in ("cpu", "tpu", "rocm"):
        assert prepared.memory_order(w, platform) == tuple(range(len(shape)))
    laid = prepared.lay_out(w, "cuda")
    assert order_in_memory(laid.codes) == order
    assert laid.shape == shape and laid.prepared == "cuda"
    np.testing.assert_array_equal(laid.dequantize(), w.dequantize())


def test_axes_that_share_scales_stand_in_for_what_is_not_noted():
    w = weight((3, 8, 4), (-2,), group=4).replace(contracted=None)
    assert prepared.contracted_axes(w) == (-2,)
    assert prepared.lay_out(w, "cuda").contracted == (-2,)
    known = weight((3, 8, 4), (-3, -2), group=4)  # blocks alone would say (-2,)
    assert prepared.contracted_axes(known) == (-3, -2)


@pytest.mark.parametrize(("qtype", "group"), KINDS)
def test_what_lies_right_is_not_moved(qtype, group):
    w = weight((8, 4), (-2,), qtype, group)
    laid = prepared.lay_out(w, "cuda")
    assert prepared.lay_out(laid, "cuda") is laid
    assert prepared.lay_out(w, "cpu") is w
    back = prepared.lay_out(laid, "tpu")
    assert order_in_memory(back.codes) == (0, 1) and back.prepared is None
    np.testing.assert_array_equal(back.codes, w.codes)


def test_donated_codes_are_given_up():
    w = weight((8, 4), (-2,))
    want = np.asarray(w.dequantize())
    laid = prepared.lay_out(w, "cuda", donate=True)
    np.testing.assert_array_equal(laid.dequantize(), want)


def test_shapes_get_a_layout_where_they_have_a_place():
    w = weight((8, 4), (-2,))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for placed in (None, sharding):
        shapes = jax.tree.map(
            lambda a, s=placed: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), w
        )
        codes = prepared.lay_out(shapes, "cuda").codes
        want = Format(None if placed is None else Layout((1, 0)), placed)
        assert codes.format == want and codes.shape == (8, 4)
        again = prepared.lay_out(prepared.lay_out(shapes, "cuda"), "cuda")
        assert again.codes.format == want


def test_numpy_codes_go_to_the_default_device():
    w = jax.device_get(weight((8, 4), (-2,)))
    laid = prepared.lay_out(w, "cuda")
    assert order_in_memory(laid.codes) == (1, 0)
    np.testing.assert_array_equal(laid.codes, w.codes)


def test_sharded_weights_stay_where_they_are():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=DEVICES)
    w = weight((8, 4), (-2,), group=2)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    w = jax.device_put(w, sharding)
    laid = prepared.lay_out(w, "cuda")
    assert laid.codes.sharding == sharding and order_in_memory(laid.codes) == (1, 0)
    np.testing.assert_array_equal(laid.codes, w.codes)
    double = jax.jit(lambda w: w.dequantize() * 2)
    np.testing.assert_array_equal(double(laid), double(w))


@pytest.mark.parametrize("spec", [(None, "a", "b"), (None, "a", None), (None, None, "b")])
def test_layers_on_an_explicit_mesh_enter_a_scan_as_they_are_split(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=DEVICES)
    plain = weight((3, 8, 4), (-2,), group=2)
    w = jax.device_put(plain, NamedSharding(mesh, PartitionSpec(*spec)))

    @jax.jit
    def values(w):
        entering, back = prepared.into_scan(w)

        def layer(_, part):
            codes = back(part).codes
            assert jax.typeof(codes).sharding.spec == PartitionSpec(*spec[1:])
            return None, codes.astype(jnp.int8)

        return lax.scan(layer, None, entering)[1]

    with jax.set_mesh(mesh):
        got = values(prepared.lay_out(w, "cuda"))
    np.testing.assert_array_equal(got, plain.codes.astype(jnp.int8))
    assert got.sharding.spec == PartitionSpec(*spec)


def test_tracers_have_no_layout():
    with pytest.raises(TypeError, match="prepared outside of jit"):
        jax.jit(lambda w: prepared.lay_out(w, "cuda"))(weight((8, 4), (-2,)))


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(KINDS),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_slice_of_what_enters_a_scan_is_the_layer(sizes, kind, data):
    qtype, group = kind
    shape = tuple(2 * n for n in sizes)  # groups of two
    ndim = len(shape)
    axes = data.draw(st.sets(st.integers(1 - ndim, -1), min_size=1))
    w = weight(shape, sorted(axes), qtype, group)
    entering, back = prepared.into_scan(prepared.lay_out(w, "cuda"))
    for layer in range(shape[0]):
        part = jax.tree.map(lambda a, i=layer: a[i], entering)
        np.testing.assert_array_equal(back(part).codes, w.codes[layer])
    if prepared.memory_order(w, "cuda") == tuple(range(ndim)):
        assert entering.codes.shape == w.codes.shape
    else:  # what is sliced is laid out in its own order
        last = w.codes.shape[max(a % ndim for a in axes)]
        halved = qtype in ("int4", "nf4")
        assert entering.codes.shape[-1] == (last // 2 if halved else last)


def test_an_odd_number_of_four_bit_codes_stays_as_it_is():
    w = prepared.lay_out(weight((3, 5, 4), (-2,)), "cuda")
    entering, back = prepared.into_scan(w)
    assert entering.codes.dtype == jnp.int4 and entering.codes.shape == (3, 4, 5)
    part = jax.tree.map(lambda a: a[1], entering)
    np.testing.assert_array_equal(back(part).codes, w.codes[1])


def test_weights_that_are_not_prepared_enter_as_they_are():
    w = weight((3, 6, 4), (-2,))
    assert prepared.into_scan(w)[0] is w
    experts = prepared.lay_out(weight((4, 6), (-2,)), "cuda")
    assert prepared.into_scan(experts)[0] is experts  # it would slice the contracted axis


def test_moved_axes_are_followed_or_forgotten():
    w = prepared.lay_out(weight((2, 3, 4, 6), (-2,)), "cuda")  # axis of length 4
    for moved in (
        structure.transpose(w, (2, 0, 3, 1)),
        structure.expand_dims(w, (1, 5)),
        structure.slice(w, (1, 0, 0, 0), (2, 3, 4, 6)),
        structure.squeeze(structure.slice(w, (1, 0, 0, 0), (2, 3, 4, 6)), (0,)),
        structure.dynamic_slice(w, (1, 0, 0, 0), (1, 3, 4, 6)),
        structure.squeeze(structure.expand_dims(w, (4,)), (4,)),
    ):
        assert [moved.shape[axis] for axis in moved.contracted] == [4], moved
        assert moved.prepared == "cuda"
    joined = structure.concatenate([w, w], 0)
    reshaped = structure.reshape(w, (6, 4, 6))
    for unknown in (joined, reshaped):
        assert unknown.contracted is None and unknown.prepared is None


def test_a_loop_of_prepared_layers_computes_the_same():
    w = weight((3, 6, 6), (-2,), group=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)

    @jax.jit
    def run(w, x):
        entering, back = prepared.into_scan(w)
        return lax.scan(lambda x, part: (x @ back(part).dequantize(), None), x, entering)[0]

    np.testing.assert_array_equal(run(prepared.lay_out(w, "cuda"), x), run(w, x))
