"""Rules for custom_jvp and custom_vjp calls that a weight goes into.

The function itself runs quantized. Its derivative stays the user's own rule, which is given the
dequantized weight; a gradient of codes or scales is refused. Entered into the table of
`control_flow` by being imported from `rewrite`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.core.primitives.weights import refuse_gradient
from jaxquant.passes.control_flow import CONTROL
from jaxquant.passes.interpreter import Context, is_weight, register

_REASON = "the derivative rule of {} gets the dequantized weight"


def _run(ctx: Context, tree: Any, leaves: Any) -> list[Any]:
    args = jax.tree_util.tree_unflatten(tree, leaves)
    outs = ctx.run(0, ctx.params["call_jaxpr"], args)
    return [ctx.float(x, "a custom derivative returns it") for x in outs]


def _dequantized(ctx: Context, tree: Any, leaves: Any) -> list[Any]:
    args = jax.tree_util.tree_unflatten(tree, leaves)
    return [ctx.float(x, _REASON.format(ctx.eqn.primitive)) for x in args]


@register(CONTROL, jp.custom_jvp_call_p)
def custom_jvp_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """Keeps the user's JVP rule."""
    leaves, tree = jax.tree_util.tree_flatten(ins)
    _, user_jvp = _compat.custom_rule(ctx.eqn)
    symbolic = ctx.params["symbolic_zeros"]

    @jax.custom_jvp
    def call(*leaves: Any) -> list[Any]:
        return _run(ctx, tree, leaves)

    def jvp(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        values = _dequantized(ctx, tree, primals)
        dots = []
        for original, value, dot in zip(
            ins, values, jax.tree_util.tree_unflatten(tree, tangents), strict=True
        ):
            if is_weight(original):
                dots_of_parts, parts = jax.tree_util.tree_flatten(dot)
                refuse_gradient(f"custom_jvp with {original.path!r}", parts, dots_of_parts)
                dot = SymbolicZero(jax.typeof(value).to_tangent_aval())
            dots.append(dot if symbolic else instantiate(dot))
        outs = list(user_jvp.call_wrapped(*values, *dots))
        half = len(outs) // 2
        return outs[:half], [instantiate(t) for t in outs[half:]]

    call.defjvp(jvp, symbolic_zeros=True)
    return call(*leaves)


def instantiate(tangent: Any) -> Any:
    """The tangent as an array."""
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent


@register(CONTROL, jp.custom_vjp_call_p)
def custom_vjp_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """Keeps the user's forward and backward rules."""
    leaves, tree = jax.tree_util.tree_flatten(ins)
    _, user_fwd, user_bwd = _compat.custom_rule(ctx.eqn)

    @jax.custom_vjp
    def call(*leaves: Any) -> list[Any]:
        return _run(ctx, tree, leaves)

    def fwd(*leaves: Any) -> tuple[list[Any], Any]:
        outs, residuals = _compat.run_fwd(ctx.eqn, user_fwd, _dequantized(ctx, tree, leaves))
        return outs, residuals

    def bwd(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        cts = _compat.call_bwd(user_bwd, residuals, cotangents)
        per_leaf: list[Any] = []
        for original, ct in zip(ins, cts, strict=True):
            if is_weight(original):
                per_leaf += [None] * len(jax.tree_util.tree_leaves(original))
            else:
                per_leaf.append(ct)
        return tuple(per_leaf)

    call.defvjp(fwd, bwd)
    return call(*leaves)
