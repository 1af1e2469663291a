"""`FakeQuantizer`: evaluates a float jaxpr whose weights are values of codes, times scales.

The rules of the rewriter move these QTensors; those here replace its products: the operation stays
the float one, on a dequantized weight and a fake-quantized input. So a weight is dequantized where
it is used, inside a scan's body and under its remat. Called by `insert_fake_quant`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.core.blocks import map_blocks
from jaxquant.core.fake_quant import fake_activation
from jaxquant.core.primitives.conv import conv_act
from jaxquant.core.primitives.weights import act_quant
from jaxquant.core.qtensor import QTensor
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.blocks import spread_axis, spread_blocks
from jaxquant.pallas_kernels.dot_axes import DotAxes, Side
from jaxquant.pallas_kernels.reference_conv import plain_ragged
from jaxquant.passes import fake_derivatives
from jaxquant.passes.control_flow import CONTROL
from jaxquant.passes.interpreter import Context, Rule, Weight, register
from jaxquant.passes.rewrite import Rewriter
from jaxquant.passes.rewrite_moves import MOVES
from jaxquant.passes.rewrite_products import dot_operands, rounding, weight_on_the_right

PRODUCTS: dict[Primitive, Rule] = {}


def dequantized(w: QTensor) -> jax.Array:
    """The float weight; differentiable in values and scale."""
    compute = w.codes.dtype
    product = map_blocks(lambda v, s: v * s, w.codes, w.scale.astype(compute))
    return product.astype(w.dtype)


@register(PRODUCTS, jp.dot_general_p)
def _dot_general(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight, side = dot_operands(ctx, ins)
    w, dims = rounding(weight.value, ctx, "dot_general"), ctx.params["dimension_numbers"]
    if w.act is None:
        return _bind(ctx, side, x, dequantized(w))
    axes = DotAxes.make(dims, x.ndim, w.ndim, side)
    dtype = ctx.eqn.outvars[0].aval.dtype
    return [_quantized_dot(ctx, x, w, axes).astype(dtype)]


def _quantized_dot(ctx: Context, x: jax.Array, w: QTensor, axes: DotAxes) -> jax.Array:
    """The product with a quantized input, in float32 or wider.

    Codes are multiplied first and scaled afterwards, as the quantized product does: rounding the
    next activation would make a large difference of a small one.
    """
    assert w.act is not None
    act = act_quant(w.act, x.ndim, axes.x_contract)
    if act.static:
        for axis in axes.w_free:
            if w.input_scale.shape[axis] != 1:
                return _over_input_scales(ctx, x, w, axes, axis)
    static = axes.w_to_x(w.input_scale) if act.static else None
    values, scale = fake_activation(act, x, static)
    values = values.astype(x.dtype)
    if all(w.scale.shape[a] == 1 for a in axes.w_contract):
        out = _sums(ctx, values, w.codes.astype(x.dtype), axes)
        out = out * axes.w_to_out(spread_blocks(w.scale.astype(out.dtype), w.shape))
    else:
        out = _sums(ctx, values, dequantized(w).astype(x.dtype), axes)
    return out * axes.x_to_out(scale.astype(out.dtype))


def _over_input_scales(
    ctx: Context, x: jax.Array, w: QTensor, axes: DotAxes, axis: int
) -> jax.Array:
    """One product for each static scale along a free axis of the weight (joined parameters)."""
    size = w.shape[axis]
    parts = w.codes, *(spread_axis(p, axis, size) for p in (w.scale, w.input_scale))

    def one(codes: jax.Array, scale: jax.Array, input_scale: jax.Array) -> jax.Array:
        own = w.replace(codes=codes, scale=scale, input_scale=input_scale)
        return _quantized_dot(ctx, x, own, axes.without_w_free(axis))

    return jax.vmap(one, axis, axes.weight_out_axis(axis))(*parts)


def _bind(ctx: Context, side: Side, x: Any, w: Any) -> list[Any]:
    return _compat.bind(ctx.eqn, [w, x] if side == "lhs" else [x, w])


def _sums(ctx: Context, x: jax.Array, w: jax.Array, axes: DotAxes) -> jax.Array:
    """The float product with a result that is float32 or wider."""
    operands = (w, x) if axes.weight_side == "lhs" else (x, w)
    changes = {
        "dimension_numbers": axes.dimension_numbers,
        "preferred_element_type": jnp.promote_types(jnp.float32, x.dtype),
    }
    return jp.dot_general_p.bind(*operands, **{**ctx.params, **changes})


@register(PRODUCTS, jp.conv_general_dilated_p)
def _conv(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight = weight_on_the_right(ins, "the input of a convolution")
    w = rounding(weight.value, ctx, "conv")
    if w.act is not None:
        x = _with_one_scale(conv_act(w.act, x.ndim, **ctx.params), x, w)
    return _compat.bind(ctx.eqn, [x, dequantized(w)])


@register(PRODUCTS, _compat.ragged_dot_general_p)
def _ragged_dot(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight, *rest = weight_on_the_right(ins, "the left side of a ragged dot")
    w = rounding(weight.value, ctx, "ragged_dot")
    if w.act is not None:
        plain = plain_ragged(x, w, rest[0], ctx.params)
        act = act_quant(w.act, x.ndim, (1,) if plain else range(x.ndim))
        x = _with_one_scale(act, x, w)
    return _compat.bind(ctx.eqn, [x, dequantized(w), *rest])


def _with_one_scale(act: ActQuant, x: jax.Array, w: QTensor) -> jax.Array:
    """The input of an operation all of which shares a static scale."""
    if not act.static:
        return _floats(act, x)
    return _floats(act, x, jnp.max(w.input_scale).reshape([1] * x.ndim))


def _floats(act: ActQuant, x: jax.Array, static_scale: Any = None) -> jax.Array:
    values, scale = fake_activation(act, x, static_scale)
    return (values * scale).astype(x.dtype)


class FakeQuantizer(Rewriter):
    """The rewriter for weights whose codes are floats."""

    rules = MOVES | PRODUCTS
    control_rules = {**CONTROL, **fake_derivatives.CONTROL}

    def product(self, ctx: Context, ins: list[Any], act: ActScheme) -> list[Any]:
        """Fake-quantizes both operands."""
        contract, _ = ctx.params["dimension_numbers"]
        operands = [
            _floats(act_quant(act, x.ndim, axes), x)
            for x, axes in zip(ins, contract, strict=True)
        ]
        return _compat.bind(ctx.eqn, operands)

    def to_float(self, ctx: Context, weight: Weight, reason: str) -> Any:
        """The weight as floats."""
        return dequantized(weight.value)

    def returned(self, weight: Weight) -> Any:
        """The weight as floats."""
        return dequantized(weight.value)
