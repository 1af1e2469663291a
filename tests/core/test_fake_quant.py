"""Fake quantization against its closed form in float64: values, and the gradients of all inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.codes import code_values, encode
from jaxquant.core.fake_quant import Grid, fake_activation, fake_codes, scale_gradient
from jaxquant.core.qtypes import get_qtype, qtype_names
from jaxquant.core.quantize_array import quantize_array
from jaxquant.pallas_kernels.activation import ActQuant

W = jax.random.normal(jax.random.key(0), (64, 6))
CT = jax.random.normal(jax.random.key(1), (64, 6))
BLOCKS = {"mxfp4": (32, 1), "nvfp4": (16, 1), "nf4": (32, 1)}


def spread(part, shape=(64, 6)):
    part = np.asarray(part, np.float64)
    return np.repeat(part, shape[0] // part.shape[0], 0) * np.ones(shape)


@pytest.mark.parametrize("shrink", [1.0, 0.4])
@pytest.mark.parametrize("name", qtype_names())
def test_values_and_gradients(name, shrink):
    """A scale that is too small clips: there the weight has no gradient and the scale has all."""
    qtype = get_qtype(name)
    q = quantize_array(W, name, BLOCKS.get(name, (64, 1)))
    scale = (q.scale if isinstance(q.scale, jax.Array) else q.scale.dequantize()) * shrink
    scale = scale.astype(jnp.float32)

    def weight(w, scale):
        values = fake_codes(Grid(qtype), w, scale)
        return values * jnp.repeat(scale, 64 // scale.shape[0], 0)

    out, pull = jax.vjp(weight, W, scale)
    codes = np.asarray(code_values(encode(W, scale, None, qtype), qtype), np.float64)
    np.testing.assert_allclose(out, codes * spread(scale), rtol=1e-6)
    if shrink == 1.0:
        np.testing.assert_allclose(out, q.dequantize(), rtol=1e-6)
    y = np.asarray(W, np.float64) / spread(scale)
    low, high = Grid(qtype).reach
    inside = (y >= low) & (y <= high)
    dw, ds = pull(CT)
    np.testing.assert_allclose(dw, inside * np.asarray(CT), rtol=1e-5)
    by_weight = np.asarray(CT, np.float64) * (codes - inside * y)
    expected = by_weight.reshape(scale.shape[0], -1, 6).sum(1)
    np.testing.assert_allclose(ds, expected, rtol=2e-4, atol=2e-4)
    if shrink == 1.0 and qtype.bits > 2:
        assert inside.all()
    if shrink != 1.0:
        assert 0 < inside.mean() < 1


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2"])
def test_zero_points(name):
    qtype = get_qtype(name)
    w = W + 0.5
    q = quantize_array(w, name, (64, 1), symmetric=False)
    grid = Grid(qtype, symmetric=False)

    def weight(w):
        return fake_codes(grid, w, q.scale, q.zero_point) * q.scale

    out, pull = jax.vjp(weight, w)
    np.testing.assert_allclose(out, q.dequantize(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pull(CT)[0], CT, rtol=1e-5)
    narrow = jnp.where(jnp.arange(6) < 3, q.scale / 3, q.scale)
    y = np.asarray(w, np.float64) / np.asarray(narrow) + np.asarray(q.zero_point)
    inside = (y >= qtype.qmin - qtype.step / 2) & (y <= qtype.qmax + qtype.step / 2)
    dw = jax.vjp(lambda w: fake_codes(grid, w, narrow, q.zero_point) * narrow, w)[1](CT)[0]
    np.testing.assert_allclose(dw, inside * np.asarray(CT), rtol=1e-5)
    assert not inside.all()


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_activations(dtype):
    x = W.T
    ct = CT.T
    token = ActQuant(dtype, (1,))
    whole = {"int8": 127, "int4": 7}
    limit = whole.get(dtype) or float(jnp.finfo(dtype).max)

    def product(act, *scale):
        def quantized(x, *scale):
            values, by = fake_activation(act, x, *scale)
            return values * by

        return jax.vjp(quantized, x, *scale)

    out, pull = product(token)
    scale = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True) / limit
    exact = np.asarray(x, np.float64) / scale
    if dtype in whole:
        np.testing.assert_allclose(out, np.round(exact) * scale, rtol=1e-5, atol=1e-6)
    assert 0 < np.abs(np.asarray(out) - x).max() <= np.abs(x).max() / 6
    np.testing.assert_allclose(pull(ct)[0], ct, rtol=1e-5)

    static = jnp.full((1, 1), 0.5 * np.abs(x).max() / limit)
    out, pull = product(ActQuant(dtype, (0, 1), static=True), static)
    y = np.asarray(x, np.float64) / float(static[0, 0])
    half = 0.5 if dtype in whole else float(jnp.finfo(dtype).eps) * 2.0 ** int(np.log2(limit)) / 2
    inside = np.abs(y) <= limit + half
    assert 0 < inside.mean() < 1
    dx, ds = pull(ct)
    np.testing.assert_allclose(dx, inside * np.asarray(ct), rtol=1e-5)
    values = np.asarray(out, np.float64) / float(static[0, 0])
    expected = (np.asarray(ct, np.float64) * (values - inside * y)).sum()
    np.testing.assert_allclose(ds, [[expected]], rtol=1e-3)


def test_forward_mode_and_bfloat16():
    scale = jnp.full((1, 6), 0.1)
    grid = Grid(get_qtype("int4"))
    f = lambda w: fake_codes(grid, w, scale) * scale  # noqa: E731
    out, tangent = jax.jvp(f, (W,), (CT,))
    _, pull = jax.vjp(f, W)
    np.testing.assert_allclose(tangent, pull(CT)[0], rtol=1e-6)
    half = W.astype(jnp.bfloat16)
    assert fake_codes(grid, half, scale).dtype == jnp.float32
    assert jax.grad(lambda w: fake_codes(grid, w, scale).sum())(half).dtype == jnp.bfloat16
    many = jax.vmap(f)(jnp.stack([W, W / 2]))
    np.testing.assert_array_equal(many, jnp.stack([out, f(W / 2)]))


def test_a_scale_that_was_trained_to_nothing_gives_no_nan():
    scale = jnp.full((1, 6), jnp.finfo("float32").tiny)
    out, pull = jax.vjp(lambda w, s: fake_codes(Grid(get_qtype("int2")), w, s) * s, W, scale)
    dw, ds = pull(CT)
    assert np.isfinite(out).all()
    assert not np.any(dw)
    sides = np.where(np.asarray(W) > 0, 3, -3)
    np.testing.assert_allclose(ds[0], (sides * np.asarray(CT, np.float64)).sum(0), rtol=1e-4)


def test_the_gradient_scale():
    value, grad = jax.value_and_grad(lambda x: (scale_gradient(x, 0.25) ** 3).sum())(W)
    np.testing.assert_allclose(value, (W**3).sum(), rtol=1e-6)
    np.testing.assert_allclose(grad, 0.75 * W**2, rtol=1e-6)
