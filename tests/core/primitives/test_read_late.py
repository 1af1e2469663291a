"""On CPU weights are read one after another, not all at once when a program starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

ordered = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="jax 0.10 drops the barriers before it orders operations"
)

LAYERS, WIDTH = 6, 128
X = jax.random.normal(jax.random.key(0), (4, WIDTH))
PARAMS = {
    str(i): jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) / WIDTH**0.5 for i in range(LAYERS)
}


def dense(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w)
    return x


def convolved(params, x):
    numbers = ("NWC", "WIO", "NWC")
    for w in params.values():
        x = jnp.tanh(jax.lax.conv_general_dilated(
            x, w[None], (1,), "VALID", dimension_numbers=numbers
        ))  # fmt: skip
    return x


@ordered
@pytest.mark.parametrize("recipe", ["w8a16", "w4a16_g32", "w4a8", "w3a16", "nf4", "fp8"])
def test_no_more_than_two_layers_are_floats_at_once(recipe):
    fn = jq.quantize(recipe)(dense)
    qparams = jq.ptq(fn, PARAMS, X, progress=False)
    compiled = jax.jit(fn).lower(qparams, X).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * WIDTH * WIDTH * 4
    floats = {name: w.dequantize() for name, w in qparams.items()}
    if recipe.endswith("a16"):
        np.testing.assert_allclose(compiled(qparams, X), dense(floats, X), rtol=1e-4, atol=1e-5)


@ordered
def test_nor_kernels_of_convolutions():
    fn, x = jq.quantize("w8a16")(convolved), X[None]
    qparams = jq.ptq(fn, PARAMS, x, progress=False)
    compiled = jax.jit(fn).lower(qparams, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * WIDTH * WIDTH * 4
    floats = {name: w.dequantize() for name, w in qparams.items()}
    np.testing.assert_allclose(compiled(qparams, x), convolved(floats, x), rtol=1e-4, atol=1e-5)


def test_what_is_multiplied_as_it_lies_meets_no_barrier():
    fn = jq.quantize("w8a8")(dense)
    qparams = jq.ptq(fn, PARAMS, X, progress=False)
    assert "optimization_barrier" not in jax.jit(fn).lower(qparams, X).as_text()
