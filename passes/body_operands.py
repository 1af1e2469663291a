"""What goes into the bodies of an equation: one operand each, and codes in the place of floats.

`merge_operands`: a body that is handed one value twice reads it once. Stacked weights of one group
come so into a scan: with one input scale, and it has a variable for each.

`wishes` and `granted`: a body that quantizes an operand can be given its codes and scale instead,
by the caller, who may have them already or have them for several bodies; a loop's constant is then
quantized once, and not once an iteration. The body keeps the float operand for derivatives.

Through jit, the constants of scan and of while's body, and cond. Not through remat, whose operands
are kept for the backward pass, codes as well; custom derivatives, whose rules are functions of the
operands that there are; shard_map, where a range is that of one device's part.

Called by `share_activation_quant`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.passes.activation_moves import (
    WHOLE,
    before,
    canonical,
    replay,
    representatives,
)
from jaxquant.passes.edit_jaxpr import (
    CONTROL_FLOW,
    bodies,
    drop_unused,
    is_var,
    new_var,
    replace_eqns,
    with_bodies,
)


def merge_operands(closed: Any) -> Any:
    """The closed jaxpr with bodies that read what they are handed several times in one variable.

    The operands stay as they are. Returns ``closed`` itself where there was nothing to do.
    """
    inner, _ = _compat.open_jaxpr(closed)
    merged = _merged(inner)
    return closed if merged is inner else closed.replace(jaxpr=merged)


def _merged(jaxpr: Any) -> Any:
    first: dict[Any, Any] | None = None
    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive in CONTROL_FLOW:
            first = representatives(jaxpr) if first is None else first
            eqn = _with_merged_bodies(eqn, first)
        eqns.append(eqn)
    return replace_eqns(jaxpr, eqns)


def _with_merged_bodies(eqn: Any, first: Mapping[Any, Any]) -> Any:
    numbers = iter(range(len(list(bodies(eqn)))))

    def merged(value: Any) -> Any:
        body, _ = _compat.open_jaxpr(value)
        seen: dict[Hashable, Any] = {}
        names: dict[Any, Any] = {}
        sources = _sources(eqn, next(numbers))
        for var, position in zip(body.invars, sources, strict=False):
            if position is None or not is_var(atom := eqn.invars[position]):
                continue
            key = (first.get(atom, atom), var.aval, _passed(eqn, position))
            if seen.setdefault(key, var) is not var:
                names[var] = seen[key]
        inner = _merged(_renamed(body, names))
        if inner is body:
            return value
        return inner if value is body else value.replace(jaxpr=inner)

    return with_bodies(eqn, merged)


def _renamed(body: Any, names: Mapping[Any, Any]) -> Any:
    """The body with some variables read in the place of others; itself if nothing reads those."""

    def atoms(old: Sequence[Any]) -> list[Any]:
        return [names.get(atom, atom) if is_var(atom) else atom for atom in old]

    eqns = []
    for eqn in body.eqns:
        invars = atoms(eqn.invars)
        same = all(new is old for new, old in zip(invars, eqn.invars, strict=True))
        eqns.append(eqn if same else eqn.replace(invars=invars))
    outvars = atoms(body.outvars)
    if outvars != list(body.outvars):
        return body.replace(eqns=eqns, outvars=outvars)
    return replace_eqns(body, eqns)


def _sources(eqn: Any, sub: int) -> list[int | None]:
    """For each input of a body the operand that it always is (or is a slice of), or None."""
    count = len(eqn.invars)
    if eqn.primitive is jp.scan_p:
        consts, carry = _compat.scan_arity(eqn)
        return [None if consts <= i < consts + carry else i for i in range(count)]
    if eqn.primitive is jp.while_p:
        cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        return list(range(cond)) if sub == 0 else list(range(cond, cond + body))
    if eqn.primitive is jp.cond_p:
        return list(range(1, count))
    return list(range(count))


def _passed(eqn: Any, position: int) -> Hashable:
    """How an operand is passed: two that are passed alike are the same inside."""
    params = eqn.params
    if eqn.primitive is jp.scan_p:
        return position < _compat.scan_arity(eqn)[0]
    if eqn.primitive is jp.jit_p:
        donated = params["donated_invars"][position]
        return (params["in_shardings"][position], position if donated else None)
    if eqn.primitive is _compat.shard_map_p:
        return params["in_specs"][position]
    return None


class Wish(NamedTuple):
    """What an equation with bodies could be given beside an operand.

    Attributes:
      position: number of the operand.
      act: how it would be quantized (canonical).
      dtype: dtype of the arithmetic.
      scale: number of the operand that is the given scale, or None.
    """

    position: int
    act: ActQuant
    dtype: np.dtype
    scale: int | None


def wishes(eqn: Any) -> dict[Wish, bool]:
    """What an equation's bodies quantize of its operands.

    Returns:
      For each wish whether it is quantized whenever the equation is executed: not if only some
      branches of a cond do.
    """
    if not _takes_codes(eqn):
        return {}
    found = [set(_asked(eqn, sub, body)) for sub, body in enumerate(bodies(eqn))]
    if eqn.primitive is jp.while_p:
        found = found[1:]
    common = set.intersection(*found)
    return {wish: wish in common for own in found for wish in sorted(own, key=repr)}


def granted(eqn: Any, given: Mapping[Wish, tuple[Any, Any]]) -> Any:
    """The equation with codes and scales as further operands, used by its bodies.

    Args:
      eqn: an equation.
      given: some of its wishes, each with variables of codes and scale.
    """
    numbers = iter(range(len(list(bodies(eqn)))))

    def served(value: Any) -> Any:
        body, _ = _compat.open_jaxpr(value)
        sub = next(numbers)
        if eqn.primitive is jp.while_p and sub == 0:
            return value
        inner = _served(body, _asked(eqn, sub, body), given, _end(eqn, sub))
        return inner if value is body else value.replace(jaxpr=inner)

    new = with_bodies(eqn, served)
    operands = [var for pair in given.values() for var in pair]
    end = _end(eqn, None)
    invars = [*eqn.invars[:end], *operands, *eqn.invars[end:]]
    return new.replace(invars=invars, params=_more(eqn, new.params, len(operands)))


def _takes_codes(eqn: Any) -> bool:
    # Effects on references speak of operands by their number.
    numbered = any(hasattr(effect, "input_index") for effect in eqn.effects)
    return eqn.primitive in (jp.jit_p, jp.scan_p, jp.while_p, jp.cond_p) and not numbered


def _end(eqn: Any, sub: int | None) -> int:
    """Where new operands go; for body ``sub`` where its new inputs go."""
    if eqn.primitive is jp.scan_p:
        return _compat.scan_arity(eqn)[0]
    if eqn.primitive is jp.while_p:
        body = eqn.params["body_nconsts"]
        return body if sub is not None else eqn.params["cond_nconsts"] + body
    if eqn.primitive is jp.cond_p and sub is not None:
        return len(eqn.invars) - 1
    return len(eqn.invars)


def _more(eqn: Any, params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters for ``count`` operands more."""
    if eqn.primitive is jp.scan_p:
        return _compat.scan_with_more_consts(params, count)
    if eqn.primitive is jp.while_p:
        return {**params, "body_nconsts": params["body_nconsts"] + count}
    if eqn.primitive is jp.jit_p:
        return _compat.jit_with_more_operands(params, count)
    return params


def _asked(eqn: Any, sub: int, body: Any) -> dict[Wish, int]:
    """The wishes of one body, with the number of the equation that quantizes."""
    fixed = {}
    for var, position in zip(body.invars, _sources(eqn, sub), strict=False):
        if position is not None and _may_be_quantized_outside(eqn, position):
            fixed[var] = position
    if not fixed:
        return {}
    producers = {var: e for e in body.eqns for var in e.outvars}
    found: dict[Wish, int] = {}
    for index, inner in enumerate(body.eqns):
        if inner.primitive is not primitives.quantize_activation_p:
            continue
        var, act = _chain(inner, producers)[-1]
        scale = None
        if len(inner.invars) > 1:
            scale = fixed.get(scale_root(inner.invars[1], producers))
        if var in fixed and (scale is None) == (len(inner.invars) == 1):
            wish = Wish(fixed[var], act, inner.params["dtype"], scale)
            found.setdefault(wish, index)
    return found


def _may_be_quantized_outside(eqn: Any, position: int) -> bool:
    if eqn.primitive is jp.scan_p:
        return position < _compat.scan_arity(eqn)[0]
    if eqn.primitive is jp.jit_p:
        return _compat.is_unspecified(eqn.params["in_shardings"][position])
    return True


def _chain(eqn: Any, producers: Mapping[Any, Any]) -> list[tuple[Any, ActQuant]]:
    """From what an equation quantizes back to the value that it is a form of."""
    var = eqn.invars[0]
    chain = [(var, canonical(eqn.params["act"], var.aval.shape))]
    while (producer := producers.get(chain[-1][0])) is not None:
        act, source = before(producer, chain[-1][1], WHOLE), producer.invars[0]
        if act is None or not is_var(source):
            break
        chain.append((source, act))
    return chain


def scale_root(var: Any, producers: Mapping[Any, Any]) -> Any:
    """The variable of one element that a given scale is, in whatever shape."""
    while (producer := producers.get(var)) is not None and producer.primitive in WHOLE:
        source = producer.invars[0]
        if not is_var(source) or source.aval.size != 1 or source.aval.dtype != var.aval.dtype:
            break
        var = source
    return var


def _served(
    body: Any, asked: Mapping[Wish, int], given: Mapping[Wish, tuple[Any, Any]], end: int
) -> Any:
    """A body with inputs for all that is given, which its own quantizations make way for."""
    inputs = {wish: tuple(new_var(v.aval) for v in pair) for wish, pair in given.items()}
    instead = {asked[wish]: inputs[wish] for wish in given if wish in asked}
    producers = {var: e for e in body.eqns for var in e.outvars}
    names: dict[Any, Any] = {}
    eqns: list[Any] = []
    for index, eqn in enumerate(body.eqns):
        if index not in instead:
            eqns.append(eqn)
            continue
        codes, scale = instead[index]
        for var, act in reversed(_chain(eqn, producers)[:-1]):
            new, codes, scale = replay(producers[var], codes, scale, act)
            eqns += new
        names.update(zip(eqn.outvars, (codes, scale), strict=True))
    more = [var for pair in inputs.values() for var in pair]
    invars = [*body.invars[:end], *more, *body.invars[end:]]
    served = _renamed(replace_eqns(body, eqns), names)
    return drop_unused(served, WHOLE).replace(invars=invars)
