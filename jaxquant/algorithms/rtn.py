"""Round-to-nearest: one weight, one scheme, no data.

Called by ptq for every leaf, and by algorithms that fall back on it. Which axes get scales is
decided before (`jaxquant.passes.assign_recipe`); this composes a range with rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxquant.algorithms.ranges import PercentileRange, RangeFn, absmax_range, mse_range
from jaxquant.core.qtensor import QTensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme, WeightScheme


def quantize_weight(
    w: Any,
    scheme: WeightScheme,
    block_shape: Sequence[int],
    *,
    packed_axis: int | None = None,
    stack_axes: Sequence[int] | None = None,
    act: ActScheme | None = None,
    scale: Any = None,
    name: str = "weight",
) -> QTensor:
    """Quantizes one weight by rounding to nearest.

    Beside the weight and the result it takes memory for a few values a block. It is compiled
    once per shape, scheme and sharding.

    Args:
      w: floats of any shape: array (sharded or not), tracer, or ShapeDtypeStruct, which gives
        a QTensor of ShapeDtypeStructs.
      scheme: how the weight is stored. Its granularity is not read: `block_shape` says it.
      block_shape: neighbours along each axis that share a scale.
      packed_axis: axis to pack 3-, 2- and 1-bit codes along; None chooses
        (`jaxquant.core.quantize_array.choose_packed_axis`).
      stack_axes: axes of layers and experts, where they are known.
      act: what the weight's op does with its input; stored in the result.
      scale: scales that are chosen already, one a block; None for those of the scheme's range.
      name: parameter name for errors.

    Returns:
      QTensor laid out like w, standing for w's shape and dtype.

    Raises:
      ValueError: see `quantize_array`; names the parameter.
    """

    def quantize(w: Any) -> QTensor:
        return quantize_array(
            w,
            scheme.qtype,
            block_shape,
            symmetric=scheme.symmetric,
            range_fn=range_function(scheme),
            scale=scale,
            scale_dtype=scheme.scale_dtype,
            packed_axis=packed_axis,
            double_quant=scheme.double_quant,
            stack_axes=stack_axes,
            name=name,
        )

    result = jax.eval_shape(quantize, w) if isinstance(w, jax.ShapeDtypeStruct) else quantize(w)
    return result.replace(act=act)


def range_function(scheme: WeightScheme) -> RangeFn:
    """The range a scheme names."""
    if scheme.range == "percentile":
        return PercentileRange(scheme.percentile)
    return {"absmax": absmax_range, "mse": mse_range}[scheme.range]
