"""Activations quantized in one launch: what the interpreter makes of it, and the compilers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu_aot import Job, available, measure
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


@pytest.mark.skipif(
    not available(),
    reason="JAX'S CUDA COMPILERS ARE NOT INSTALLED (pip install jax[cuda13]): NOTHING WAS COMPILED",
)
def test_it_compiles_and_a_product_of_floats_starts_with_it():
    jobs = {
        f"{dtype} {floats} {k}": Job(
            f"{dtype} {floats} {k}",
            "benchmarks.gpu_cases:rows",
            {"m": 64, "k": k, "dtype": dtype, "floats": floats},
        )
        for dtype, floats, k in [
            ("int8", "bfloat16", 4096),
            ("int8", "bfloat16", 640),
            ("int8", "float32", 32768),
            ("float8_e4m3fn", "bfloat16", 28672),
            ("float8_e5m2", "bfloat16", 5504),
        ]
    }
    shape = {"m": 16, "k": 1024, "n": 512}
    for form in ("w4a8 g128", "w4a16 g128", "w8a8"):
        jobs[form] = Job(form, "benchmarks.gpu_cases:product", {"form": form, **shape})
    got = measure(list(jobs.values()))
    for name, static in got.items():
        assert static.error is None, static
        assert all(kernel.spills == kernel.stack == 0 for kernel in static.kernels), static
        # x is quantized in a launch of its own; without groups XLA does all of it.
        count = {"w4a8 g128": 2, "w8a8": 0}.get(name, 1)
        assert len(static.kernels) == count, name
        assert static.custom_calls.get("mosaic_gpu_v2", 0) == count, static.custom_calls
