"""Convolution, ragged dot and dequantize with quantized weights, against float operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.core.primitives import (
    dequantize,
    describe_conv,
    describe_ragged_dot,
    quantized_conv_general_dilated,
    quantized_ragged_dot,
)
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from tests.pallas_kernels import dot_oracle as oracle


def random(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def close(got, want, tolerance=2e-5):
    assert got.dtype == want.dtype
    oracle.assert_close(got, np.asarray(want.astype(jnp.float32), np.float64), tolerance)


# name: x shape, kernel shape, options
CONVS = {
    "same": ((2, 7, 6, 4), (3, 3, 4, 8), {"padding": "SAME"}),
    "dilated": (
        (2, 7, 6, 4),
        (3, 2, 4, 8),
        {"padding": [(2, 1), (0, 0)], "lhs_dilation": (2, 1), "rhs_dilation": (1, 2)},
    ),
    "strided": ((2, 9, 9, 4), (3, 3, 4, 8), {"padding": "VALID", "window_strides": (2, 3)}),
    "depthwise": ((2, 7, 6, 4), (3, 3, 1, 8), {"padding": "SAME", "feature_group_count": 4}),
    "batch groups": ((4, 7, 6, 4), (3, 3, 4, 8), {"padding": "SAME", "batch_group_count": 2}),
    "channels first": (
        (2, 4, 7, 6),
        (8, 4, 3, 3),
        {"padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ),
}


def _conv(name):
    x_shape, w_shape, options = CONVS[name]
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    out_axis = options["dimension_numbers"][1].index("O")
    block = tuple(1 if i == out_axis else n for i, n in enumerate(w_shape))
    return random(0, *x_shape), random(1, *w_shape), block, options


@pytest.mark.parametrize("name", CONVS)
def test_conv(name):
    x, kernel, block, options = _conv(name)
    w = quantize_array(kernel, "int8", block)
    floats = dequantize(w)
    fn = jax.jit(lambda x, w: quantized_conv_general_dilated(x, w, **options))
    want_fn = functools.partial(lax.conv_general_dilated, rhs=floats, **options)
    close(fn(x, w), want_fn(x))
    names = [
        e.primitive.name
        for e in jax.make_jaxpr(lambda x: quantized_conv_general_dilated(x, w, **options))(x).eqns
    ]
    assert names == ["quantized_conv_general_dilated"]
    got = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(fn(x, w)))))(x)
    close(got, jax.grad(lambda x: jnp.sum(jnp.sin(want_fn(x))))(x), 1e-4)


@pytest.mark.parametrize("name", ["same", "depthwise", "batch groups", "channels first"])
@pytest.mark.parametrize("batched", ["x", "w", "scale", "xw"])
def test_conv_vmap(name, batched):
    x, kernel, block, options = _conv(name)
    xs = jnp.stack([x, 2 * x, x[::-1]], 1) if "x" in batched else x
    w = quantize_array(kernel, "int8", block)
    scales = jnp.stack([w.scale, 3 * w.scale, -w.scale])
    codes = jnp.stack([w.codes, -w.codes, w.codes[::-1]]) if "w" in batched else w.codes
    scales = scales if batched in ("w", "scale", "xw") else w.scale
    axes = (
        1 if "x" in batched else None,
        0 if "w" in batched else None,
        0 if scales.ndim > w.ndim else None,
    )

    def quantized(x, codes, scale):
        return quantized_conv_general_dilated(x, w.replace(codes=codes, scale=scale), **options)

    def floats(x, codes, scale):
        return lax.conv_general_dilated(
            x, w.replace(codes=codes, scale=scale).dequantize(), **options
        )

    close(
        jax.jit(jax.vmap(quantized, axes))(xs, codes, scales),
        jax.vmap(floats, axes)(xs, codes, scales),
    )


def test_conv_with_scales_over_what_is_summed():
    x, kernel, _, options = _conv("same")
    w = quantize_array(kernel, "int4", (1, 3, 2, 1), symmetric=False)
    got = quantized_conv_general_dilated(x, w, **options)
    close(got, lax.conv_general_dilated(x, w.dequantize(), **options))
    assert (
        describe_conv(
            w, lax.conv_dimension_numbers(x.shape, w.shape, options["dimension_numbers"])
        )[0]
        == "xla: dequantize, then float conv"
    )


def test_conv_bfloat16():
    x, kernel, block, options = _conv("same")
    w = quantize_array(kernel.astype(jnp.bfloat16), "int8", block)
    x = x.astype(jnp.bfloat16)
    close(
        quantized_conv_general_dilated(x, w, **options),
        lax.conv_general_dilated(x, w.dequantize(), **options),
        2e-2,
    )


@pytest.mark.parametrize("block", [(1, 8, 1), (2, 8, 3), (1, 4, 1), (1, 8, 6)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 0, 2, 5), (1, 2, 3, 0)])
def test_ragged_dot(block, sizes):
    x, experts = random(0, 10, 8), random(1, 4, 8, 6)
    w = quantize_array(experts, "int4", block, symmetric=False)
    sizes = jnp.asarray(sizes, jnp.int32)
    fn = jax.jit(lambda x: quantized_ragged_dot(x, w, sizes))
    want = lambda x: lax.ragged_dot(x, w.dequantize(), sizes)  # noqa: E731
    close(fn(x), want(x))
    close(jax.grad(lambda x: fn(x).sum())(x), jax.grad(lambda x: want(x).sum())(x))
    xs = jnp.stack([x, -2 * x])
    close(jax.jit(jax.vmap(fn))(xs), jnp.stack([want(x), -2 * want(x)]))
    on_codes = block[1] == 8
    params = jax.make_jaxpr(lambda x: quantized_ragged_dot(x, w, sizes))(x).eqns[-1].params
    assert ("on codes" in describe_ragged_dot(x, w, sizes, params)[0]) == on_codes


@pytest.mark.parametrize("qtype", ["int8", "int3", "nf4", "nvfp4", "float8_e4m3"])
def test_dequantize(qtype):
    block = {"nvfp4": (16, 1), "nf4": (32, 1)}.get(qtype, (64, 1))
    packed = -2 if qtype == "int3" else None
    make = lambda k: quantize_array(random(k, 64, 4), qtype, block, packed_axis=packed)  # noqa: E731
    ws = [make(k) for k in range(3)]
    close(jax.jit(dequantize)(ws[0]), ws[0].dequantize())
    assert [e.primitive.name for e in jax.make_jaxpr(dequantize)(ws[0]).eqns] == ["dequantize"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, -1), *ws)
    got = jax.vmap(dequantize, in_axes=-1)(jax.tree.map(lambda leaf: leaf, stacked))
    close(got, jnp.stack([w.dequantize() for w in ws]))


def test_dequantize_has_no_gradient():
    w = quantize_array(random(0, 8, 4), "int8", (8, 1))
    with pytest.raises(TypeError, match="scale of a quantized weight"):
        jax.grad(lambda s: dequantize(w.replace(scale=s)).sum())(w.scale)


# --- quantized inputs ----------------------------------------------------------------------------


def rounded(x, axes, limit=127):
    """What int8 (int4: limit 7) makes of x, with one scale over these axes, in float64."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=axes, keepdims=True) / limit
    return np.round(x / scale) * scale


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_conv_of_integer_inputs(name, granularity):
    """Integer products: exact but for the scales. "token" is an image."""
    x, kernel, block, options = _conv(name)
    x = x * jnp.arange(1.0, len(x) + 1)[:, None, None, None]
    qtype, limit = ("int4", 7) if name == "same" else ("int8", 127)
    act = ActScheme(qtype, granularity=granularity)
    w = quantize_array(kernel, "int8", block).replace(act=act)
    fn = jax.jit(lambda x: quantized_conv_general_dilated(x, w, **options))
    images = granularity == "token" and "batch_group_count" not in options
    floats = rounded(x, (1, 2, 3) if images else None, limit)
    with jax.enable_x64(True):
        values = np.asarray(w.codes, np.float64) * np.asarray(w.scale, np.float64)
        want = np.asarray(lax.conv_general_dilated(floats, values, **options))
    oracle.assert_close(fn(x), want, 1e-6)
    hlo = fn.lower(x).as_text()
    assert "xi8>" in hlo and "xi32>" in hlo
    without = w.replace(act=None)
    slope = lambda w: jax.grad(  # noqa: E731
        lambda x: (quantized_conv_general_dilated(x, w, **options) * random(7, *want.shape)).sum()
    )
    close(jax.jit(slope(w))(x), slope(without)(x), 1e-5)  # straight through


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_vmap_of_conv_keeps_the_scales_of_each(granularity):
    x, kernel, block, options = _conv("strided")
    w = quantize_array(kernel, "int8", block).replace(act=ActScheme(granularity=granularity))
    fn = lambda x: quantized_conv_general_dilated(x, w, **options)  # noqa: E731
    xs = jnp.stack([x, 30 * x, -x[::-1]], 2)
    got = jax.jit(jax.vmap(fn, 2))(xs)
    np.testing.assert_array_equal(got, jnp.stack([fn(x), fn(30 * x), fn(-x[::-1])]))


def test_static_inputs_of_conv_and_ragged_dot():
    act = ActScheme(mode="static")
    x, kernel, block, options = _conv("dilated")
    w = quantize_array(kernel, "int8", block).replace(act=act)
    scale = jnp.full((1, 1, 1, 1), 0.01)
    got = quantized_conv_general_dilated(x, w.replace(input_scale=scale), **options)
    clipped = jnp.clip(jnp.round(x / 0.01), -127, 127) * 0.01
    close(got, lax.conv_general_dilated(clipped, dequantize(w), **options))
    with pytest.raises(ValueError, match="no input_scale"):
        quantized_conv_general_dilated(x, w, **options)
    many = w.replace(input_scale=jnp.ones((1, 1, 1, 8)))
    with pytest.raises(ValueError, match="one static scale"):
        quantized_conv_general_dilated(x, many, **options)

    rows, sizes = random(0, 10, 8), jnp.array([3, 0, 5], jnp.int32)
    experts = quantize_array(random(1, 3, 8, 6), "int8", (1, 8, 1)).replace(act=act)
    got = quantized_ragged_dot(rows, experts.replace(input_scale=scale[0]), sizes)
    clipped = jnp.clip(jnp.round(rows / 0.01), -127, 127) * 0.01
    close(got, lax.ragged_dot(clipped, dequantize(experts), sizes))


@pytest.mark.parametrize(
    ("qtype", "options", "lowering"),
    [
        ("int8", {}, "xla: int8 conv"),
        ("int4", {}, "xla: int8 conv"),
        ("int8", {"symmetric": False}, "xla: float conv on codes"),
        ("nf4", {}, "xla: float conv on codes"),
        ("float8_e4m3", {}, "xla: float conv on codes"),
        ("group", {}, "xla: dequantize, then float conv"),
    ],
)
def test_inputs_are_rounded_whatever_the_codes_are(qtype, options, lowering):
    x, kernel, block, params = _conv("same")
    if qtype == "group":
        qtype, block = "int8", (3, 3, 2, 1)
    w = quantize_array(kernel, qtype, block, **options).replace(act=ActScheme())
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, params["dimension_numbers"])
    assert describe_conv(w, numbers)[0] == lowering
    got = quantized_conv_general_dilated(x, w, **params)
    floats = jnp.asarray(rounded(x, (1, 2, 3)), jnp.float32)
    close(got, lax.conv_general_dilated(floats, w.dequantize(), **params))


@pytest.mark.parametrize("sizes", [(3, 0, 2, 5), (1, 2, 3, 0)])
def test_ragged_dot_of_int8_rows(sizes):
    x, experts = random(0, 10, 8) * jnp.arange(1.0, 11)[:, None], random(1, 4, 8, 6)
    w = quantize_array(experts, "int8", (1, 8, 1)).replace(act=ActScheme())
    sizes = jnp.asarray(sizes, jnp.int32)
    fn = jax.jit(lambda x: quantized_ragged_dot(x, w, sizes))
    close(fn(x), lax.ragged_dot(jnp.asarray(rounded(x, (1,)), jnp.float32), dequantize(w), sizes))
    hlo = fn.lower(x).as_text()
    assert "xi8>" in hlo and "xi32>" in hlo
    params = jax.make_jaxpr(lambda x: quantized_ragged_dot(x, w, sizes))(x).eqns[-1].params
    assert describe_ragged_dot(x, w, sizes, params)[0] == "xla: int8 ragged dot"
    plain = lambda x: quantized_ragged_dot(x, w.replace(act=None), sizes).sum()  # noqa: E731
    close(jax.grad(lambda x: fn(x).sum())(x), jax.grad(plain)(x))
    xs = jnp.stack([x, -2 * x])
    close(jax.jit(jax.vmap(fn))(xs), jnp.stack([fn(x), fn(-2 * x)]))
