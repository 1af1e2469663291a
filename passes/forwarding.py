"""Which outputs of a jaxpr are inputs handed through, also through jit, remat, loops and branches.

`nnx.remat` and `nnx.jit` return a module's whole state, so a parameter that nobody changed comes
back as the output of a call. `jaxquant.frontends.function` asks here, and gives the user back the
QTensor that went in instead of a float copy of it. Reads only; a primitive without a rule forwards
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal, Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat

Origins = list[int | None]
ForwardingRule = Callable[[Any], Origins]


def forwarded_inputs(jaxpr: Any) -> Origins:
    """For each output of an open jaxpr the position of the input it is, or None."""
    origin: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        rule = RULES.get(eqn.primitive)
        if rule is None or not any(_origin(v, origin) is not None for v in eqn.invars):
            continue
        for out, operand in zip(eqn.outvars, rule(eqn), strict=True):
            found = None if operand is None else _origin(eqn.invars[operand], origin)
            if found is not None:
                origin[out] = found
    return [_origin(v, origin) for v in jaxpr.outvars]


def forwarded_operands(eqn: Any) -> Origins:
    """For each output of an equation with sub-jaxprs the operand that it is, or None."""
    rule = RULES.get(eqn.primitive)
    return [None] * len(eqn.outvars) if rule is None else rule(eqn)


def _origin(var: Any, origin: dict[Any, int]) -> int | None:
    return None if isinstance(var, Literal) else origin.get(var)


def _call(eqn: Any) -> Origins:
    body = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return forwarded_inputs(_compat.open_jaxpr(body)[0])


def _scan(eqn: Any) -> Origins:
    """A carry that stays, and a stacked input that is stacked again as it was."""
    num_consts, num_carry = _compat.scan_arity(eqn)
    body = _compat.open_jaxpr(eqn.params["jaxpr"])[0]
    return [
        source if _same_place(i, source, num_consts, num_carry) else None
        for i, source in enumerate(forwarded_inputs(body))
    ]


def _same_place(out: int, source: int | None, num_consts: int, num_carry: int) -> bool:
    if source is None:
        return False
    if out < num_carry:
        return source == num_consts + out
    return source >= num_consts + num_carry


def _while(eqn: Any) -> Origins:
    skipped = eqn.params["cond_nconsts"]
    first = eqn.params["body_nconsts"]
    body = _compat.open_jaxpr(eqn.params["body_jaxpr"])[0]
    return [
        skipped + source if source == first + i else None
        for i, source in enumerate(forwarded_inputs(body))
    ]


def _cond(eqn: Any) -> Origins:
    branches = [forwarded_inputs(_compat.open_jaxpr(b)[0]) for b in eqn.params["branches"]]
    return [_agreed(sources) for sources in zip(*branches, strict=True)]


def _agreed(sources: Sequence[int | None]) -> int | None:
    first = sources[0]
    return first + 1 if first is not None and len(set(sources)) == 1 else None


RULES: dict[Primitive, ForwardingRule] = {
    jp.jit_p: _call,
    jp.remat_p: _call,
    jp.custom_jvp_call_p: _call,
    jp.custom_vjp_call_p: _call,
    **dict.fromkeys(_compat.call_primitives, _call),
    jp.scan_p: _scan,
    jp.while_p: _while,
    jp.cond_p: _cond,
}
