"""What goes into the bodies of an equation: one operand each, and codes in the place of floats.

`merge_operands`: a body that is handed one value twice reads it once. Stacked weights of one group
come so into a scan: with one input scale, and it has a variable for each.

`wishes` and `granted`: a body that quantizes an operand can be given its codes and scale instead,
by the caller, who may have them already or have them for several bodies; a loop's constant is then
quantized once, and not once an iteration. The body keeps the float operand for derivatives.

Through jit, the constants of scan and of while's body, cond, custom derivatives (whose rules get
what they got before) and shard_map (where no axis with one scale is split: the range of a part is
another one). `body_layout` says how each takes them. Not through remat: all that goes into it is
kept for the backward pass, whatever its policy, so codes would be memory beside the floats, and
what is computed once more would be another thing than the user asked for.

Called by `share_activation_quant`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxquant.core import _compat, primitives
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.passes.activation_moves import (
    WHOLE,
    before,
    canonical,
    replay,
    representatives,
    varying_like,
)
from jaxquant.passes.body_layout import (
    LAYOUTS,
    Pair,
    may_be_quantized_outside,
    passed,
    sources,
    split_axes,
    takes_codes,
    types_inside,
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
        positions = sources(eqn, next(numbers))
        for var, position in zip(body.invars, positions, strict=False):
            if position is None or not is_var(atom := eqn.invars[position]):
                continue
            key = (first.get(atom, atom), var.aval, passed(eqn, position))
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
    if not takes_codes(eqn):
        return {}
    found = [set(_asked(eqn, sub, body)) for sub, body in enumerate(bodies(eqn))]
    found = found[LAYOUTS[eqn.primitive].first :]
    common = set.intersection(*found)
    return {wish: wish in common for own in found for wish in sorted(own, key=repr)}


def granted(eqn: Any, given: Mapping[Wish, tuple[Any, Any]]) -> Any:
    """The equation with codes and scales as further operands, used by its bodies.

    Args:
      eqn: an equation.
      given: some of its wishes, each with variables of codes and scale.
    """
    layout = LAYOUTS[eqn.primitive]
    operands = [var for pair in given.values() for var in pair]
    params = layout.more(eqn.params, [_pair(eqn, wish) for wish in given])
    types = types_inside(eqn, params, [var.aval for var in operands])
    end = layout.end(eqn)
    end_inside = end if layout.end_inside is None else layout.end_inside(eqn)
    numbers = iter(range(len(list(bodies(eqn)))))

    def served(value: Any) -> Any:
        body, _ = _compat.open_jaxpr(value)
        if (sub := next(numbers)) < layout.first:
            return value
        new = list(map(new_var, types))
        pairs = dict(zip(given, zip(new[::2], new[1::2], strict=True), strict=True))
        inner = _served(body, _asked(eqn, sub, body), pairs)
        invars = [*body.invars[:end_inside], *new, *body.invars[end_inside:]]
        inner = inner.replace(invars=invars)
        return inner if value is body else value.replace(jaxpr=inner)

    invars = [*eqn.invars[:end], *operands, *eqn.invars[end:]]
    return with_bodies(eqn.replace(invars=invars, params=params), served)


def _pair(eqn: Any, wish: Wish) -> Pair:
    ndim = len(eqn.invars[wish.position].aval.shape)
    shared = range(ndim) if wish.act.static else wish.act.reduce_axes
    return Pair(wish.position, frozenset(shared))


def _asked(eqn: Any, sub: int, body: Any) -> dict[Wish, int]:
    """The wishes of one body, with the number of the equation that quantizes."""
    fixed = {}
    for var, position in zip(body.invars, sources(eqn, sub), strict=False):
        if position is not None and may_be_quantized_outside(eqn, position):
            fixed[var] = position
    if not fixed:
        return {}
    producers = {var: e for e in body.eqns for var in e.outvars}
    found: dict[Wish, int] = {}
    for index, inner in enumerate(body.eqns):
        if inner.primitive is not primitives.quantize_activation_p:
            continue
        var, act = _chain(inner, producers)[-1]
        if var not in fixed or not split_axes(eqn, fixed[var], var.aval).isdisjoint(
            act.reduce_axes
        ):
            continue
        scale = None
        if len(inner.invars) > 1:
            scale = fixed.get(scale_root(inner.invars[1], producers))
            if scale is None or eqn.invars[scale].aval.size != 1:
                continue
        found.setdefault(Wish(fixed[var], act, inner.params["dtype"], scale), index)
    return found


def _chain(eqn: Any, producers: Mapping[Any, Any]) -> list[tuple[Any, ActQuant]]:
    """From what an equation quantizes back to the value that it is a form of."""
    var, *given = eqn.invars
    scale = scale_root(given[0], producers) if given else None
    chain = [(var, canonical(eqn.params["act"], var.aval.shape))]
    while (producer := producers.get(chain[-1][0])) is not None:
        act, source = before(producer, chain[-1][1], WHOLE, scale), producer.invars[0]
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


def _served(body: Any, asked: Mapping[Wish, int], given: Mapping[Wish, tuple[Any, Any]]) -> Any:
    """A body whose own quantizations make way for codes and scales that it is given."""
    instead = {asked[wish]: pair for wish, pair in given.items() if wish in asked}
    producers = {var: e for e in body.eqns for var in e.outvars}
    names: dict[Any, Any] = {}
    eqns: list[Any] = []
    for index, eqn in enumerate(body.eqns):
        if index not in instead:
            eqns.append(eqn)
            continue
        codes, scale = instead[index]
        new, scale = varying_like(scale, codes, eqn)
        eqns += new
        for var, act in reversed(_chain(eqn, producers)[:-1]):
            new, codes, scale = replay(producers[var], codes, scale, act)
            eqns += new
        names.update(zip(eqn.outvars, (codes, scale), strict=True))
    served = _renamed(replace_eqns(body, eqns), names)
    return drop_unused(served, WHOLE)
