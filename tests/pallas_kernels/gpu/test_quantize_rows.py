"""Activations quantized in one launch: what the interpreter makes of it, and that it lowers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("THIS JAX HAS NO MOSAIC GPU INTERPRETER (0.11 HAS)", allow_module_level=True)

from jaxquant.pallas_kernels.gpu.quantize_rows import fits, quantize_rows  # noqa: E402


@pytest.mark.parametrize("k", [128, 640, 4096, 128 * 43])  # one part, ragged, whole, several
@pytest.mark.parametrize("floats", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_codes_and_scales_are_those_of_the_reference(dtype, floats, k):
    x = np.random.default_rng(0).normal(size=(3, k)) * [[1e-3], [1.0], [1e4]]
    x[1, k // 2 :] = 0
    x = jnp.asarray(np.vstack([x, np.zeros((1, k))]), floats)
    run = jax.jit(lambda x: quantize_rows(x, dtype, interpret=plgpu.InterpretGPUParams()))
    codes, scale = run(x)
    want_codes, want_scale = jax.jit(lambda x: quantize_activation(x, ActQuant(dtype, (1,))))(x)
    assert codes.dtype == want_codes.dtype and scale.shape == (4, 1)
    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_array_equal(
        np.asarray(codes).view(np.uint8), np.asarray(want_codes).view(np.uint8)
    )


def test_what_it_takes():
    assert [fits(k) for k in (128, 4096, 28672, 32768)] == [True] * 4
    assert [fits(k) for k in (64, 100, 4000, 128 * 257)] == [False] * 4
    with pytest.raises(ValueError, match="k = 100 is no multiple of 128"):
        quantize_rows(jnp.ones((2, 100)), "int8")
    with pytest.raises(ValueError, match="not 'int4'"):
        quantize_rows(jnp.ones((2, 128)), "int4")
