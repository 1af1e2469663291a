"""Rules for products with a weight: each becomes a quantized primitive.

The table `PRODUCTS` of the rewriter. Codes stay codes; what happens to the other operand is the
weight's own business (`QTensor.act`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives
from jaxquant.core.qtensor import QTensor
from jaxquant.core.structure import Unstructured
from jaxquant.core.turns import UnmetInputError
from jaxquant.pallas_kernels.dot_axes import Side
from jaxquant.passes.events import report_quantized
from jaxquant.passes.interpreter import Context, Rule, Weight, is_weight, register

PRODUCTS: dict[Primitive, Rule] = {}


@register(PRODUCTS, jp.dot_general_p)
def _dot_general(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight, side = dot_operands(ctx, ins)
    w, dims = rounding(weight.value, ctx, "dot_general"), ctx.params["dimension_numbers"]
    kept = ("precision", "preferred_element_type", "out_sharding")
    options = {name: ctx.params[name] for name in kept}
    with _input_met():
        out = primitives.quantized_dot_general(x, w, dims, weight_side=side, **options)
    report_quantized(
        ctx, weight, lambda: _told(w, primitives.describe_lowering(x, w, dims, weight_side=side))
    )
    return [_as(out, ctx)]


@register(PRODUCTS, jp.conv_general_dilated_p)
def _conv(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight = weight_on_the_right(ins, "the input of a convolution")
    w, dims = rounding(weight.value, ctx, "conv"), ctx.params["dimension_numbers"]
    with _input_met():
        out = primitives.bind_conv(x, w, **ctx.params)
    report_quantized(ctx, weight, lambda: _told(w, primitives.describe_conv(w, dims)))
    return [_as(out, ctx)]


@register(PRODUCTS, _compat.ragged_dot_general_p)
def _ragged_dot(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight, group_sizes = weight_on_the_right(ins, "the left side of a ragged dot")
    w = rounding(weight.value, ctx, "ragged_dot")
    with _input_met():
        out = primitives.bind_ragged_dot(x, w, group_sizes, **ctx.params)
    report_quantized(
        ctx,
        weight,
        lambda: _told(w, primitives.describe_ragged_dot(x, w, group_sizes, ctx.params)),
    )
    return [_as(out, ctx)]


@contextlib.contextmanager
def _input_met() -> Iterator[None]:
    """Where the input cannot be transformed as the weight wants, the weight is dequantized."""
    try:
        yield
    except UnmetInputError as why:
        raise Unstructured(str(why)) from why


def _told(w: QTensor, lowering: tuple[str, str]) -> tuple[str, str]:
    """Name and reason of a lowering, with what is done to the input first."""
    name, reason = lowering
    if w.input_factor is not None:
        reason += "; the input is multiplied by stored factors first"
    if w.input_turn is not None:
        reason += f"; the input is turned first ({w.input_turn})"
    return name, reason


def dot_operands(ctx: Context, ins: list[Any]) -> tuple[Any, Weight, Side]:
    """The input, the weight, and its side; of two weights the one that was looked up is the input.

    Raises:
      Unstructured: the input is not floating point.
    """
    lhs, rhs = ins
    if is_weight(lhs) and is_weight(rhs):
        reason = "the other operand of the product is a weight too"
        if rhs.gathered and not lhs.gathered:
            rhs = ctx.float(rhs, reason)
        else:
            lhs = ctx.float(lhs, reason)
    side: Side = "lhs" if is_weight(lhs) else "rhs"
    weight, x = (lhs, rhs) if side == "lhs" else (rhs, lhs)
    _require_float(x)
    return x, weight, side


def weight_on_the_right(ins: list[Any], otherwise: str) -> list[Any]:
    """The operands of a product that has a quantized form with the weight as its second one.

    Args:
      ins: the operands.
      otherwise: what a weight is that is the first one.

    Raises:
      Unstructured: the weight is not the second one, or the first is not floating point.
    """
    x, weight, *_ = ins
    if is_weight(x) or not is_weight(weight):
        raise Unstructured(f"a weight is {otherwise}")
    _require_float(x)
    return ins


def rounding(w: QTensor, ctx: Context, op: str) -> QTensor:
    """The weight, with ``act`` if this product quantizes its input.

    A cotangent is no input: it passes as it would in a gradient taken from outside.

    Args:
      w: the weight.
      ctx: context of the product.
      op: its name in `QTensor.act_ops`.
    """
    named = w.act_ops is None or op in w.act_ops
    return w.replace(act=None if ctx.backward or not named else w.act, act_ops=None)


def _require_float(x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Unstructured(f"the other operand is {x.dtype}, not floating point")


def _as(out: Any, ctx: Context) -> Any:
    dtype = ctx.eqn.outvars[0].aval.dtype
    return out if out.dtype == dtype else out.astype(dtype)
