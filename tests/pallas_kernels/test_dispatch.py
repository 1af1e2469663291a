"""What dispatch picks, what it says when nothing fits, and that what it picks is right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.pallas_kernels import reference
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Choice, Place, choose
from jaxquant.pallas_kernels.dot_axes import DotAxes

V5E = Place("tpu", "TPU v5 lite")
PLAIN = (((1,), (0,)), ((), ()))


def pick(x_shape, weight, dims=PLAIN, side="rhs", act=None, place=V5E, x="bfloat16", **options):
    axes = DotAxes.make(dims, len(x_shape), len(weight.shape), side)
    options = {"out_dtype": jnp.float32} | options
    return choose(x_shape, jnp.dtype(x), weight, axes, act, place, **options)


# x, weight, scale, dimension numbers, side: a plain matrix; heads in two free axes; two contracted
# axes with groups along the inner one; contracted axes in another order; the weight on the left;
# one scale for all columns.
LAYOUTS = [
    ((8, 256), (256, 96), (4, 96), PLAIN, "rhs"),
    ((2, 4, 128), (128, 3, 64), (2, 3, 64), (((2,), (0,)), ((), ())), "rhs"),
    ((5, 4, 64), (4, 64, 32), (4, 2, 32), (((1, 2), (0, 1)), ((), ())), "rhs"),
    ((64, 5, 4), (4, 64, 32), (4, 1, 32), (((0, 2), (1, 0)), ((), ())), "rhs"),
    ((3, 2, 128), (128, 48), (4, 48), (((0,), (2,)), ((), ())), "lhs"),
    ((8, 128), (128, 96), (4, 1), PLAIN, "rhs"),
]


def agrees_with_the_reference(layout, act, zero_point, place):
    """Runs what is picked, interpreted, beside the reference; returns the choice."""
    x_shape, w_shape, scale_shape, dims, side = layout
    axes = DotAxes.make(dims, len(x_shape), len(w_shape), side)
    act = act and dataclasses.replace(act, reduce_axes=tuple(sorted(axes.x_contract)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=x_shape), jnp.bfloat16)
    codes = jnp.asarray(rng.integers(-8, 8, w_shape), jnp.int8).astype(jnp.int4)
    scale = jnp.asarray(rng.uniform(0.5, 2, scale_shape), jnp.float32)
    zero = jnp.asarray(rng.integers(-4, 5, scale_shape), jnp.int8) if zero_point else None
    weight = Weight("int4", w_shape, scale_shape, zero_point)
    choice = pick(x_shape, weight, dims, side, act, place)
    run = jax.jit(functools.partial(choice.run, interpret=True))
    got = run(x, None, codes, scale, zero, None)
    floats = x.astype(jnp.float32)
    product = functools.partial(
        reference.dot_general, dimension_numbers=dims, weight_side=side, act=act
    )
    want = jax.jit(product)(floats, codes, scale, zero)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    if act is not None:  # codes that are at hand are taken
        quantized = jax.jit(quantize_activation, static_argnums=1)(x, act)
        again = run(x, quantized, codes, scale, zero, None)
        np.testing.assert_array_equal(again, got)
    return choice


@pytest.mark.parametrize("act", [None, ActQuant("int8", (1,))], ids=["float", "int8"])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda p: f"{p[1]}-{p[2]}-{p[4]}")
def test_the_kernel_is_the_reference(layout, zero_point, act):
    choice = agrees_with_the_reference(layout, act, zero_point, V5E)
    assert choice.name == "pallas tpu v5e: int4, scale after the dot", choice


def test_a_static_scale():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 128)), jnp.bfloat16)
    codes = jnp.ones((128, 32), jnp.int4)
    scale, given = jnp.ones((2, 32), jnp.float32), jnp.full((1, 1), 0.02, jnp.float32)
    act = ActQuant("int8", (0, 1), static=True)
    choice = pick((8, 128), Weight("int4", (128, 32), (2, 32)), act=act)
    got = choice.run(x, None, codes, scale, None, given, interpret=True)
    want = reference.dot_general(x, codes, scale, None, given, dimension_numbers=PLAIN, act=act)
    np.testing.assert_allclose(got, want, rtol=1e-6)


INT4 = Weight("int4", (256, 128), (4, 128))
REFUSALS = [
    ({"place": Place("cpu", "cpu")}, "the program runs on cpu"),
    ({"place": Place("tpu")}, "generation is not known"),
    ({"place": Place("tpu", "TPU v3")}, "TPU v3 is none of v4, v5e, v5p, v6e, v7x"),
    ({"place": Place("tpu", "TPU v5 lite", 4)}, "4 devices share the program"),
    ({"x": "float16"}, "x is float16"),
    ({"place": Place("tpu", "TPU v4"), "x_shape": (129, 256)}, "spill registers on v4"),
    ({"precision": lax.Precision.HIGHEST}, "more than one bfloat16 pass"),
    ({"weight": Weight("int4", (256, 128), (1, 128))}, "XLA fuses the conversion"),
    ({"weight": Weight("int4", (256, 128), (16, 128))}, "groups of 16 are no multiple of 32"),
    ({"weight": Weight("int4", (256, 128), (4, 32))}, "blocks along free axis 1"),
    ({"weight": Weight("int1", (256, 128), (4, 128))}, "no kernel reads int1 codes"),
    ({"weight": Weight("int2", (256, 128), (4, 128), packed_axis=1)}, "packed along another axis"),
    ({"weight": Weight("int2", (256, 96), (4, 96), packed_axis=0)}, "n (now 96) in multiples"),
    (
        {"weight": Weight("table4", (256, 128), (4, 128)), "place": Place("tpu", "TPU v4")},
        "v4 does not gather within registers",
    ),
    (
        {"weight": Weight("table4", (192, 128), (3, 128)), "x_shape": (8, 192)},
        "4-bit tables need k (now 192)",
    ),
    ({"weight": Weight("int4", (128, 256), (128, 4)), "dims": (((1,), (1,)), ((), ()))}, "copied"),
    ({"x_shape": (0, 256)}, "empty"),
]


@pytest.mark.parametrize(
    ("kind", "rows", "groups", "name", "reason"),
    [
        ("TPU v5 lite", 8, 1, "int4, scale on the output", "one scale a column"),
        ("TPU v5 lite", 8, 2, "int4, scale after the dot", "groups of 128"),
        ("TPU v6 lite", 256, 2, "int4, scale before", "int4 inputs are multiplied as bfloat16"),
        ("TPU7x", 8, 2, "int4, scale after", "int4 inputs are multiplied as float8_e4m3fn"),
        ("TPU7x", 8, 1, "int4, scale on the output", "int4 inputs are multiplied as float8_e4m3fn"),
        ("TPU7x", 65, 1, "xla", "XLA fuses the conversion of codes into its own dot"),
        ("NVIDIA H200", 8, 2, "xla", "pallas cuda: "),  # why depends on JAX's version
    ],
)
def test_int4_inputs(kind, rows, groups, name, reason):
    place = Place("cuda" if "NVIDIA" in kind else "tpu", kind)
    weight = Weight("int4", (256, 128), (groups, 128))
    axes = DotAxes.make((((1,), (0,)), ((), ())), 2, 2, "rhs")
    act = ActQuant("int4", (1,))
    choice = choose((rows, 256), "bfloat16", weight, axes, act, place, out_dtype="bfloat16")
    assert name in choice.name and reason in choice.reason


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[r for _, r in REFUSALS])
def test_why_not(change, reason):
    arguments = {"x_shape": (8, 256), "weight": INT4} | change
    choice = pick(**arguments)
    assert choice.run is None and choice.name == "xla"
    assert reason in choice.reason and choice.run is None
    if "XLA fuses" not in reason and "spill" not in reason:  # those two are a matter of speed
        with pytest.raises(ValueError, match="implementation='pallas', but no kernel fits: pallas"):
            pick(**arguments, implementation="pallas")


def test_blocks_over_two_contracted_axes():
    weight = Weight("int4", (4, 64, 128), (2, 2, 128))
    choice = pick((8, 4, 64), weight, (((1, 2), (0, 1)), ((), ())))
    assert "do not lie in a row" in choice.reason


def test_forced():
    assert pick((8, 256), INT4, implementation="xla") == Choice(
        "xla", "asked for by implementation='xla'"
    )
    channel = Weight("int8", (256, 128), (1, 128))
    assert pick((8, 256), channel).run is None
    assert "scale on the output" in pick((8, 256), channel, implementation="pallas").name
    with pytest.raises(ValueError, match="'xla', 'pallas' or None, not 'triton'"):
        pick((8, 256), INT4, implementation="triton")


def test_rows_decide_when_scales_are_applied():
    assert "after the dot" in pick((16, 256), INT4).name
    assert "before the dot" in pick((1024, 256), INT4).name
    manual = Place("tpu", "TPU v6 lite", 8, manual=True)
    assert pick((16, 256), INT4, place=manual).name.startswith("pallas tpu v6e")


def test_it_lowers_for_tpu():
    """Through Mosaic's own verifier, with neither TPU nor its compiler."""
    choice = pick((16, 512), Weight("int4", (512, 256), (4, 256)))
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    shapes = [((16, 512), "bfloat16"), ((512, 256), "int4"), ((4, 256), "float32")]
    avals = [jax.ShapeDtypeStruct(s, jnp.dtype(d)) for s, d in shapes]
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        fn = jax.jit(lambda x, c, s: choice.run(x, None, c, s, None, None))
        text = fn.trace(*avals).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
