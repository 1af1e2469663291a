"""Rules of `find_weights` for products, and for equations with sub-jaxprs.

A product is where the way of a weight ends well; calls, loops and branches are entered. Entered
into the table `follow.STRUCTURE` on import.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.core.structure import Unstructured
from jaxquant.passes import axes
from jaxquant.passes.axes import Origin, Role
from jaxquant.passes.follow import STRUCTURE, Step, Values, register
from jaxquant.passes.forwarding import forwarded_operands

# --- products -----------------------------------------------------------------------------------


def _product(
    step: Step, ins: Values, primitive: str, roles: tuple[Sequence[Role] | None, Sequence[Role]]
) -> Values:
    """Lists a product; of two weights the one that was looked up counts as the activation."""
    operands = list(ins[:2])
    if all(v is not None for v in operands):
        looked_up = [v is not None and v.gathered for v in operands]
        if not any(looked_up):
            raise Unstructured("is multiplied with another parameter")
        active = 1 if looked_up[1] and not looked_up[0] else 0
        step.end([operands[active]], "")
        operands[active] = None
    side = 0 if operands[0] is not None else 1
    value, x = operands[side], step.eqn.invars[1 - side].aval
    side_roles = roles[side]
    if side_roles is None:
        raise Unstructured(f"is the left operand of {primitive}")
    if value is not None and not jnp.issubdtype(x.dtype, jnp.floating):
        raise Unstructured(f"is multiplied with {x.dtype} values")
    step.walker.product(step, primitive, value, side_roles, side)
    return [None] * len(step.eqn.outvars)


def _roles(ndim: int, contract: Sequence[int], batch: Sequence[int]) -> list[Role]:
    return ["contract" if d in contract else "batch" if d in batch else "free" for d in range(ndim)]


@register(STRUCTURE, jp.dot_general_p)
def _dot_general(step: Step, ins: Values) -> Values:
    contract, batch = step.params["dimension_numbers"]
    ndims = [len(v.aval.shape) for v in step.eqn.invars]
    lhs, rhs = (_roles(n, c, b) for n, c, b in zip(ndims, contract, batch))
    return _product(step, ins, "dot_general", (lhs, rhs))


@register(STRUCTURE, jp.conv_general_dilated_p)
def _conv(step: Step, ins: Values) -> Values:
    out_features = step.params["dimension_numbers"].rhs_spec[0]
    ndim = len(step.eqn.invars[1].aval.shape)
    rhs: list[Role] = ["free" if d == out_features else "contract" for d in range(ndim)]
    return _product(step, ins, "conv", (None, rhs))


@register(STRUCTURE, _compat.ragged_dot_general_p)
def _ragged_dot(step: Step, ins: Values) -> Values:
    numbers = step.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    ndim = len(step.eqn.invars[1].aval.shape)
    rhs = _roles(ndim, contract, (*batch, *numbers.rhs_group_dimensions))
    return _product(step, ins, "ragged_dot", (None, rhs))


# --- calls, loops and branches -------------------------------------------------------------------


@register(STRUCTURE, jp.jit_p, jp.remat_p, jp.closed_call_p, jp.call_p)
def _call(step: Step, ins: Values) -> Values:
    params = step.params
    return step.enter(0, params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"], ins)


@register(STRUCTURE, jp.custom_jvp_call_p, jp.custom_vjp_call_p)
def _custom_derivative(step: Step, ins: Values) -> Values:
    return _leave(step, step.enter(0, step.params["call_jaxpr"], ins))


def _loop(step: Step, sub: int, body: Any, consts: Values, carry: Values, xs: Values) -> Values:
    """Follows a loop's body; what it carries unchanged is a constant of the loop."""
    same = [source is not None for source in forwarded_operands(step.eqn)]
    changes = f"is carried by {step.eqn.primitive} and changed"
    step.end([v for v, s in zip(carry, same) if not s], changes)
    kept = [v if s else None for v, s in zip(carry, same)]
    return _leave(step, step.enter(sub, body, [*consts, *kept, *xs]))


def _leave(step: Step, outs: Values) -> Values:
    """Ends what leaves an equation, but for values that it only hands on."""
    same = forwarded_operands(step.eqn)
    what = f"leaves {step.eqn.primitive} as a value"
    step.end([v for v, source in zip(outs, same) if source is None], what)
    return [None] * len(outs)


def _handed_on(step: Step, ins: Values) -> Values:
    """The operands that an equation hands on, in the place of its outputs."""
    return [None if source is None else ins[source] for source in forwarded_operands(step.eqn)]


@register(STRUCTURE, jp.scan_p)
def _scan(step: Step, ins: Values) -> Values:
    num_consts, num_carry = _compat.scan_arity(step.eqn)
    consts, rest = ins[:num_consts], ins[num_consts:]
    take = functools.partial(axes.remove, dims=(0,), role="layer")
    xs = [v and v.moved(v.shape[1:], take) for v in rest[num_carry:]]
    _loop(step, 0, step.params["jaxpr"], consts, rest[:num_carry], xs)
    return _handed_on(step, ins)


@register(STRUCTURE, jp.while_p)
def _while(step: Step, ins: Values) -> Values:
    p = step.params
    num_cond, num_body = p["cond_nconsts"], p["body_nconsts"]
    carry = ins[num_cond + num_body :]
    _loop(step, 1, p["body_jaxpr"], ins[num_cond : num_cond + num_body], carry, [])
    outs = _handed_on(step, ins)
    step.end(step.enter(0, p["cond_jaxpr"], [*ins[:num_cond], *outs]), "leaves while as a value")
    return outs


@register(STRUCTURE, jp.cond_p)
def _cond(step: Step, ins: Values) -> Values:
    for sub, branch in enumerate(step.params["branches"]):
        _leave(step, step.enter(sub, branch, ins[1:]))
    return _handed_on(step, ins)


@register(STRUCTURE, _compat.shard_map_p)
def _shard_map(step: Step, ins: Values) -> Values:
    jaxpr, _ = _compat.open_jaxpr(step.params["jaxpr"])
    local = []
    for value, var in zip(ins, jaxpr.invars, strict=True):
        shape = var.aval.shape
        if value is not None:
            counts = [n // m if m else 1 for n, m in zip(value.shape, shape)]

            def split(origin: Origin, counts: list[int] = counts) -> Origin:
                for dim, count in enumerate(counts):
                    origin = axes.shard_dim(origin, dim, count)
                return origin

            value = value.moved(shape, split)
        local.append(value)
    step.end(step.enter(0, step.params["jaxpr"], local), "leaves shard_map as a value")
    return [None] * len(step.eqn.outvars)
