"""Quantized operations as JAX primitives: the names that the floors above use."""

from jaxquant.core.primitives import dot_rules as _dot_rules  # noqa: F401  (registers its rules)
from jaxquant.core.primitives.activation import quantize_activation, quantize_activation_p
from jaxquant.core.primitives.attention import quantized_attention_dot
from jaxquant.core.primitives.conv import (
    bind_conv,
    quantized_conv_general_dilated,
    quantized_conv_general_dilated_p,
)
from jaxquant.core.primitives.dequantize import dequantize, dequantize_p
from jaxquant.core.primitives.describe import (
    describe_conv,
    describe_dequantize,
    describe_lowering,
    describe_product,
    describe_products,
    describe_ragged_dot,
)
from jaxquant.core.primitives.dot import quantized_dot_general, quantized_dot_general_p
from jaxquant.core.primitives.dots import quantized_dots_p
from jaxquant.core.primitives.fused import fused_epilogue_p
from jaxquant.core.primitives.ragged import (
    bind_ragged_dot,
    quantized_ragged_dot,
    quantized_ragged_dot_p,
)

__all__ = [
    "bind_conv",
    "bind_ragged_dot",
    "dequantize",
    "dequantize_p",
    "describe_conv",
    "describe_dequantize",
    "describe_lowering",
    "describe_product",
    "describe_products",
    "describe_ragged_dot",
    "fused_epilogue_p",
    "quantize_activation",
    "quantize_activation_p",
    "quantized_attention_dot",
    "quantized_conv_general_dilated",
    "quantized_conv_general_dilated_p",
    "quantized_dot_general",
    "quantized_dot_general_p",
    "quantized_dots_p",
    "quantized_ragged_dot",
    "quantized_ragged_dot_p",
]
