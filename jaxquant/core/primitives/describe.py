"""What a quantized operation will be on the XLA route, and why: for the plan.

Asks the same functions as the lowering, on shapes and dtypes, so a plan cannot differ from what
runs. Called by `jaxquant.passes`.
"""

from __future__ import annotations

import math
from typing import Any

from jax import lax

from jaxquant.core.primitives.kernels import Product, choose_kernel, default_place
from jaxquant.core.primitives.weights import act_quant, reference_dtype
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.dispatch import PLATFORMS, Implementation, Place
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers, Side
from jaxquant.pallas_kernels.dot_method import choose_dot
from jaxquant.pallas_kernels.reference_conv import choose_linear, conv_scales, ragged_scales


def describe_lowering(
    x: Any,
    w: QTensor,
    dimension_numbers: DotDimensionNumbers,
    *,
    weight_side: Side = "rhs",
    place: Place | None = None,
) -> tuple[str, str]:
    """Name of the lowering of `quantized_dot_general` and the reason for it.

    Args:
      x: the activation or its aval.
      w: the weight; its leaves may be avals.
      dimension_numbers: as for `quantized_dot_general`.
      weight_side: likewise.
      place: where the program will run; None for one device of the default kind.

    Returns:
      E.g. `("xla: int8 dot", "integer codes on both sides, int32 sums")`. On TPU and
      GPU the reason says as well why no kernel fits, if none does.
    """
    axes = DotAxes.make(dimension_numbers, len(x.shape), w.ndim, weight_side)
    act = w.act and act_quant(w.act, len(x.shape), axes.x_contract)
    return describe_product(Product(x, w, axes, act, x.dtype), place or default_place())


def describe_product(
    product: Product, place: Place, implementation: Implementation | None = None
) -> tuple[str, str]:
    """As `describe_lowering`, of a product whose input's scheme is given.

    Args:
      product: what is multiplied.
      place: where the program will run.
      implementation: forces one.

    Raises:
      ValueError: the forced one does not fit; the message says why.
    """
    remark = ""
    if place.platform in PLATFORMS or implementation is not None:
        kernel = choose_kernel(product, place, implementation)
        if kernel.run is not None:
            return kernel.name, kernel.reason
        remark = f"; {kernel.reason}"
    x, w = product.x, product.w
    choice = choose_dot(
        tuple(x.shape),
        w.shape,
        reference_dtype(w),
        tuple(w.scale.shape),
        product.axes,
        product.act,
    )
    return f"xla: {choice.method.value}", f"{choice.reason}{remark}"


def describe_conv(w: QTensor, dimension_numbers: lax.ConvDimensionNumbers) -> tuple[str, str]:
    """Name and reason for `quantized_conv_general_dilated`."""
    features = w.shape[dimension_numbers.rhs_spec[0]]
    scales = conv_scales(tuple(w.scale.shape), dimension_numbers)
    return _describe_linear("conv", w, w.size // max(features, 1), scales)


def describe_ragged_dot(w: QTensor) -> tuple[str, str]:
    """Name and reason for `quantized_ragged_dot` in its plain form."""
    return _describe_linear("ragged dot", w, w.shape[1], ragged_scales(tuple(w.scale.shape)))


def _describe_linear(op: str, w: QTensor, terms: int, scales: str | None) -> tuple[str, str]:
    act = w.act and act_quant(w.act, w.ndim, ())
    choice = choose_linear(reference_dtype(w), terms, scales, w.zero_point is not None, act)
    return f"xla: {choice.method.value.format(op)}", choice.reason


def describe_dequantize(w: QTensor) -> tuple[str, str]:
    """Name and reason for `dequantize`."""
    block = math.prod(w.block_shape)
    return "xla: dequantize", f"one scale for {block} values"
