"""`common_inputs`: which weights of a float program multiply the very same values.

Query, key and value; gate and up. Read off the dataflow: the other operand of each product is
followed back through moves of whole values (transposes, reshapes, exact conversions) and into the
calls around it, to the variable that it is. Weights whose products all have the same inputs get the
same statistics from any batch, so a static range is one for all of them. Called by `ptq`, which
writes that into the tree; `insert_scales` reads it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes.activation_moves import WHOLE
from jaxquant.passes.edit_jaxpr import bodies, is_var
from jaxquant.passes.interpreter import Site
from jaxquant.passes.op_use import OpUse
from jaxquant.passes.program import Program

#: The variable that a value is, and the place of the body that it is in.
Root = tuple[Site, Any]

# A broadcast repeats values: their largest is the same, but not how often each occurs.
_MOVES = WHOLE - {jp.broadcast_in_dim_p}


def common_inputs(program: Program, uses: Sequence[OpUse]) -> list[list[str]]:
    """Groups of two or more parameters whose products have the same inputs.

    Args:
      program: the float program.
      uses: what `find_weights` found in it.

    Returns:
      Their paths, in the order of the uses. Products in a gradient that the program takes itself
      do not count: what they multiply is no input.
    """
    operands: dict[Site, list[Root]] = {}
    jaxpr, _ = _compat.open_jaxpr(program.jaxpr)
    _walk(jaxpr, [((), var) for var in jaxpr.invars], (), operands)
    inputs: dict[str, list[Any]] = {}
    for use in uses:
        if use.is_product and use.param is not None and not use.backward:
            side = 1 if use.weight_side == "lhs" else 0
            inputs.setdefault(use.param, []).append((use.primitive, operands[use.site][side]))
    groups: dict[Any, list[str]] = {}
    for path, found in inputs.items():
        groups.setdefault(frozenset((f, found.count(f)) for f in found), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _walk(jaxpr: Any, inputs: Sequence[Root], site: Site, operands: dict[Site, list[Root]]) -> None:
    """Enters the roots of the operands of every equation, by its place."""
    roots = dict(zip(jaxpr.invars, inputs, strict=True))

    def root(atom: Any) -> Root:
        return roots.get(atom, (site, atom)) if is_var(atom) else (site, id(atom))

    for index, eqn in enumerate(jaxpr.eqns):
        place = (*site, index)
        ins = operands[place] = [root(atom) for atom in eqn.invars]
        if _keeps_values(eqn):
            roots[eqn.outvars[0]] = ins[0]
        for sub, body in enumerate(bodies(eqn)):
            inside = (*place, sub)
            own = [(inside, var) for var in body.invars]
            _walk(body, _handed_in(eqn, sub, ins, own), inside, operands)


def _keeps_values(eqn: Any) -> bool:
    if eqn.primitive not in _MOVES or not is_var(eqn.invars[0]):
        return False
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return before == after or bool(jnp.promote_types(before, after) == after)


def _handed_in(eqn: Any, sub: int, ins: list[Root], own: list[Root]) -> list[Root]:
    """Roots of a body's inputs: of what is the same value outside, that; else their own."""
    if eqn.primitive is jp.scan_p:
        first = ins[: _compat.scan_arity(eqn)[0]]
    elif eqn.primitive is jp.while_p:
        cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first = ins[:cond] if sub == 0 else ins[cond : cond + body]
    elif eqn.primitive is jp.cond_p:
        first = ins[1:]
    elif eqn.primitive is _compat.shard_map_p:
        first = []  # a device's part of the value
    else:
        first = ins
    return [*first, *own[len(first) :]]
