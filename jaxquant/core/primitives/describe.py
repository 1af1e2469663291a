"""What a quantized operation will be on the XLA route, and why: for the plan.

Asks the same functions as the lowering, on shapes and dtypes, so a plan cannot differ from what
runs. Called by `jaxquant.passes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax import lax

from jaxquant.core.primitives.fused import Fused
from jaxquant.core.primitives.kernels import Product, choose_kernel, default_place
from jaxquant.core.primitives.linear import result_dtype
from jaxquant.core.primitives.ragged import choose_ragged_kernel, ragged_act
from jaxquant.core.primitives.weights import act_quant, reference_dtype
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.dispatch import PLATFORMS, Implementation, Place
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers, Side
from jaxquant.pallas_kernels.dot_method import choose_dot
from jaxquant.pallas_kernels.reference_conv import (
    choose_linear,
    conv_scales,
    plain_ragged,
    ragged_scales,
)
from jaxquant.pallas_kernels.siblings import join


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
      place: where the program will run; None for devices of the default kind.

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


def describe_products(
    products: Sequence[Product], place: Place, implementation: Implementation | None = None
) -> list[tuple[str, str]]:
    """As `describe_product`, of products of one x; says so where they are one launch."""
    told = [describe_product(product, place, implementation) for product in products]
    if len(products) > 1 and place.platform in PLATFORMS:
        choices = [choose_kernel(product, place, implementation) for product in products]
        runs = [choice.run for choice in choices]
        joined = join(runs)
        remark = "one launch with its siblings"
        if isinstance(joined, str):
            remark = f"a launch apart from its siblings: {joined}"
        return [
            (name, f"{reason}; {remark}" if run is not None else reason)
            for (name, reason), run in zip(told, runs, strict=True)
        ]
    return told


def describe_fused(
    fused: Fused,
    products: Sequence[Product],
    place: Place,
    implementation: Implementation | None = None,
) -> list[tuple[str, str]]:
    """As `describe_products`, of products that are followed by an epilogue.

    Where they are kernels, the reason says whether the epilogue is in their launch, or why not.
    """
    launch = fused.choose(place, implementation)
    if isinstance(launch, str):
        told = describe_products(products, place, implementation)
        if place.platform not in PLATFORMS or any(name.startswith("xla") for name, _ in told):
            return told
        return [(name, f"{reason}; {fused.epilogue} apart: {launch}") for name, reason in told]
    told = [describe_product(product, place, implementation) for product in products]
    return [(name, f"{reason}; {fused.epilogue} in its launch") for name, reason in told]


def describe_conv(w: QTensor, dimension_numbers: lax.ConvDimensionNumbers) -> tuple[str, str]:
    """Name and reason for `quantized_conv_general_dilated`."""
    features = w.shape[dimension_numbers.rhs_spec[0]]
    scales = conv_scales(tuple(w.scale.shape), dimension_numbers)
    act = w.act and act_quant(w.act, w.ndim, ())
    return _describe_linear("conv", w, w.size // max(features, 1), scales, act)


def describe_ragged_dot(
    x: Any,
    w: QTensor,
    group_sizes: Any,
    params: dict[str, Any],
    *,
    place: Place | None = None,
) -> tuple[str, str]:
    """Name and reason for `quantized_ragged_dot`.

    Args:
      x: the rows or their aval.
      w: the experts; leaves may be avals.
      group_sizes: rows of each expert, or their aval.
      params: of the `ragged_dot_general` equation, or of the quantized one: then with "act", which
        else is the experts' own.
      place: where the program will run; None for one device of the default kind.

    Raises:
      ValueError: a forced implementation does not fit; the message says why.
    """
    place = place or default_place()
    params = {"act": ragged_act(x, w, group_sizes, params), **params}
    act, remark = params["act"], ""
    if place.platform in PLATFORMS or params.get("implementation") is not None:
        dtype = result_dtype(x, w, params["preferred_element_type"])
        choice = choose_ragged_kernel(x, w, group_sizes, place=place, out_dtype=dtype, **params)
        if choice.run is not None:
            return choice.name, choice.reason
        remark = f"; {choice.reason}"
    plain = plain_ragged(x, w, group_sizes, params)
    scales = ragged_scales(tuple(w.scale.shape)) if plain else None
    name, reason = _describe_linear("ragged dot", w, w.shape[1] if plain else w.size, scales, act)
    return name, reason + remark


def _describe_linear(
    op: str, w: QTensor, terms: int, scales: str | None, act: ActQuant | None
) -> tuple[str, str]:
    choice = choose_linear(reference_dtype(w), terms, scales, w.zero_point is not None, act)
    return f"xla: {choice.method.value.format(op)}", choice.reason


def describe_dequantize(w: QTensor) -> tuple[str, str]:
    """Name and reason for `dequantize`."""
    block = math.prod(w.block_shape)
    return "xla: dequantize", f"one scale for {block} values"
