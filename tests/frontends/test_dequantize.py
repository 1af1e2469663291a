"""`jq.dequantize` on trees and NNX models."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxquant as jq
from jaxquant.core.qtensor import is_qtensor

X = jax.random.normal(jax.random.key(0), (3, 64))


def test_variables_with_boxes_and_other_leaves():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = jq.quantize("w4a16_g32")(nn.Dense(8, kernel_init=init, param_dtype=jnp.bfloat16))
    variables = model.init(jax.random.key(1), X)
    quantized = jq.ptq(model, variables, X)
    floats = jq.dequantize(quantized)
    assert jax.tree.structure(floats) == jax.tree.structure(variables)
    assert floats["params"]["bias"] is quantized["params"]["bias"]
    kernel = floats["params"]["kernel"].value
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, quantized["params"]["kernel"].value.dequantize())
    assert jq.ptq(model, floats, X)["params"]["kernel"].value.qtype.name == "int4"


def test_an_nnx_model_runs_in_float_and_the_quantized_one_stays():
    model = jq.quantize("w8a16")(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    quantized = jq.ptq(model, X)
    floats = jq.dequantize(quantized)
    assert is_qtensor(quantized.kernel.get_raw_value())
    assert type(floats) is type(quantized) and isinstance(floats.kernel.get_raw_value(), jax.Array)
    np.testing.assert_allclose(floats(X), quantized(X), rtol=1e-5, atol=1e-5)


def test_a_single_weight():
    weight = jq.quantize_array(X.T, "int8", (64, 1))
    np.testing.assert_array_equal(jq.dequantize(weight), weight.dequantize())
