"""The QTensor that a plan will make of a parameter, as shapes and dtypes only.

Called by `make_plan`, for sizes and lowerings without any device memory, and by whoever must know
a quantized tree before it exists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.qtensor import QTensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.recipe import Rule
from jaxquant.core.schemes import WeightScheme
from jaxquant.passes.assign_recipe import ParamPlan


def abstract_weight(plan: ParamPlan, op_rules: Sequence[Rule] = ()) -> QTensor:
    """A `QTensor` of `jax.ShapeDtypeStruct`s for a parameter that is to be quantized.

    Args:
      plan: its plan; ``plan.scheme`` is not None.
      op_rules: rules of weightless operations that are saved with the tree.
    """
    assert plan.scheme is not None and plan.block_shape is not None
    shapes = _shapes(
        plan.shape,
        jnp.dtype(plan.dtype).name,
        plan.scheme,
        plan.block_shape,
        plan.packed_axis,
        plan.stack_axes,
    )
    scale = None
    if plan.act is not None and plan.act.mode == "static":
        sizes = [n if axis in plan.layer_axes else 1 for axis, n in enumerate(plan.shape)]
        scale = jax.ShapeDtypeStruct(tuple(sizes), jnp.float32)
    return dataclasses.replace(
        shapes, act=plan.act, act_ops=plan.act_ops, input_scale=scale, op_rules=tuple(op_rules)
    )


@functools.lru_cache(maxsize=512)
def _shapes(
    shape: tuple[int, ...],
    dtype: str,
    scheme: WeightScheme,
    blocks: tuple[int, ...],
    packed_axis: int | None,
    stack_axes: tuple[int, ...],
) -> Any:
    """Cached: the layers of a model repeat a few shapes."""

    def quantize(w: jax.Array) -> QTensor:
        return quantize_array(
            w,
            scheme.qtype,
            blocks,
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
            packed_axis=packed_axis,
            double_quant=scheme.double_quant,
            stack_axes=stack_axes,
        )

    return jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, dtype))
