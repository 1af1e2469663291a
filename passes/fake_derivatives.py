"""custom_jvp and custom_vjp calls that a fake-quantized weight goes into.

The function itself runs fake-quantized; its derivative stays the user's own rule, which is given
the dequantized weight and whose gradient goes on to the float weight. Used by `fake_products`.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes.custom_derivatives import instantiate
from jaxquant.passes.interpreter import Context, Rule, is_weight, register

CONTROL: dict[Primitive, Rule] = {}


def _split(ctx: Context, ins: list[Any]) -> tuple[list[Any], list[Any], Any]:
    """Plain arrays for all inputs, and the inputs' leaves and tree without gradients."""
    values = [ctx.float(x, "a derivative rule of the user's own gets it") for x in ins]
    weights = [x if is_weight(x) else None for x in ins]
    leaves, tree = jax.tree_util.tree_flatten(weights)
    return values, [jax.lax.stop_gradient(leaf) for leaf in leaves], tree


def _run(ctx: Context, values: Any, leaves: Any, tree: Any) -> list[Any]:
    weights = tree.unflatten(leaves)
    mixed = [v if w is None else w for v, w in zip(values, weights, strict=True)]
    outs = ctx.run(0, ctx.params["call_jaxpr"], mixed)
    return [ctx.float(x, "a custom derivative returns it") for x in outs]


@register(CONTROL, jp.custom_jvp_call_p)
def _custom_jvp(ctx: Context, ins: list[Any]) -> list[Any]:
    values, leaves, tree = _split(ctx, ins)
    _, user_jvp = _compat.custom_rule(ctx.eqn)
    symbolic = ctx.params["symbolic_zeros"]

    @jax.custom_jvp
    def call(values: Any, leaves: Any) -> list[Any]:
        return _run(ctx, values, leaves, tree)

    def jvp(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        dots = tangents[0] if symbolic else [instantiate(t) for t in tangents[0]]
        outs = list(user_jvp.call_wrapped(*primals[0], *dots))
        return call(*primals), [instantiate(t) for t in outs[len(outs) // 2 :]]

    call.defjvp(jvp, symbolic_zeros=True)
    return call(values, leaves)


@register(CONTROL, jp.custom_vjp_call_p)
def _custom_vjp(ctx: Context, ins: list[Any]) -> list[Any]:
    values, leaves, tree = _split(ctx, ins)
    _, user_fwd, user_bwd = _compat.custom_rule(ctx.eqn)

    @jax.custom_vjp
    def call(values: Any, leaves: Any) -> list[Any]:
        return _run(ctx, values, leaves, tree)

    def fwd(values: Any, leaves: Any) -> tuple[list[Any], Any]:
        _, residuals = _compat.run_fwd(ctx.eqn, user_fwd, values)
        return _run(ctx, values, leaves, tree), residuals

    def bwd(residuals: Any, cotangents: Any) -> tuple[Any, Any]:
        return list(_compat.call_bwd(user_bwd, residuals, cotangents)), [None] * len(leaves)

    call.defvjp(fwd, bwd)
    return call(values, leaves)
