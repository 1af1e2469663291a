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
    assert ("on codes" in describe_ragged_dot(w)[0]) == on_codes


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
