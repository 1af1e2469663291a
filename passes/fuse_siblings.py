"""`fuse_siblings`: products of one input with several weights become one equation.

Query, key and value; gate and up. `quantized_dots` holds the input once and all the weights, which
stay where they are (joined, their bytes would be moved at every step); a kernel can compute it in
one launch, and the XLA route does the same products as before, bit by bit.

Siblings have the same input: the same codes and scale (so `share_activation_quant` comes before),
or the same floats where the input is not quantized; the same dimension numbers; and weights of one
kind: qtype, dtype, zero points or none, as many groups along the contracted axes. They may differ
in how many columns they have (grouped-query attention). The first one's place is where they are
computed; what prepares the weights of the others (slices of stacked weights) moves ahead of it.

Gradients are bit-equal where the input's cotangent is the sum over its siblings. Where it has other
readers, or each sibling converted the input for itself, the terms are the same and are added in
another order (and, behind a conversion, in the narrower type).

Not fused: products in different bodies; one whose weight depends on what a sibling gave; products
that still quantize their own input; convolutions and ragged dots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax

from jaxquant.core import _compat, primitives
from jaxquant.core.names import shown_name
from jaxquant.core.primitives.dot import split_operands
from jaxquant.core.primitives.weights import unflatten
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.passes.activation_moves import representatives
from jaxquant.passes.body_pass import BodyPass
from jaxquant.passes.edit_jaxpr import is_var, new_eqn, replace_eqns


@dataclasses.dataclass(frozen=True)
class FuseSiblings(BodyPass):
    """One `quantized_dots` for products that share an input; see the module's docstring."""

    name: ClassVar[str] = "fuse_siblings"

    def edited(self, jaxpr: Any, notes: list[str]) -> Any:
        """See `BodyPass`."""
        return _fuse(jaxpr, notes)


def _fuse(jaxpr: Any, notes: list[str]) -> Any:
    eqns = jaxpr.eqns
    place = {var: i for i, eqn in enumerate(eqns) for var in eqn.outvars}
    groups = [g for agree in _groups(jaxpr) for g in _independent(eqns, place, agree)]
    if not groups:
        return jaxpr
    leaders = {group[0]: group for group in groups}
    members = {i for group in groups for i in group}
    out: list[Any] = []
    emitted: set[int] = set(members)
    for index, eqn in enumerate(eqns):
        if index in leaders:
            group = leaders[index]
            ahead = {i for member in group for i in _needed(eqns, place, member, index)}
            for i in sorted(ahead - emitted):
                emitted.add(i)
                out.append(eqns[i])
            out.append(_fused([eqns[i] for i in group]))
        elif index not in emitted:
            out.append(eqn)
    for group in groups:
        names = [_name(eqns[i]) for i in group]
        notes.append(f"{len(group)} products of one input in one equation: {', '.join(names)}")
    return replace_eqns(jaxpr, out)


def _groups(jaxpr: Any) -> list[list[int]]:
    """Numbers of the equations that could be fused, in order, by what they must agree in."""
    first = representatives(jaxpr)
    found: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        key = _key(eqn, first)
        if key is not None:
            found.setdefault(key, []).append(index)
    return list(found.values())


def _key(eqn: Any, first: dict[Any, Any]) -> Any:
    if eqn.primitive is not primitives.quantized_dot_general_p:
        return None
    params = eqn.params
    x, quantized, leaves = split_operands(eqn.invars, params["x_quantized"])
    if not is_var(x) or (params["act"] is not None and not quantized):
        return None
    w = unflatten(params["tree"], [leaf.aval for leaf in leaves])
    axes = DotAxes.make(params["dimension_numbers"], x.aval.ndim, w.ndim, params["weight_side"])
    groups = tuple(w.scale.shape[a] for a in axes.w_contract)
    same = ("tree", "act", "dimension_numbers", "weight_side", "precision", "implementation")
    return (
        first.get(x, x),
        *quantized,
        groups,
        params["preferred_element_type"],
        *(params[name] for name in same),
    )


def _independent(
    eqns: Sequence[Any], place: dict[Any, int], agree: list[int]
) -> Iterator[list[int]]:
    """Splits products that agree into groups that can be computed where their first one is."""
    while len(agree) > 1:
        leader, *rest = agree
        group, agree = [leader], []
        for index in rest:
            ahead = [eqns[i] for i in _needed(eqns, place, index, leader)]
            product = primitives.quantized_dot_general_p
            late = any(eqn.effects or eqn.primitive is product for eqn in ahead)
            (agree if late else group).append(index)
        if len(group) > 1:
            yield group


def _needed(eqns: Sequence[Any], place: dict[Any, int], index: int, leader: int) -> Iterator[int]:
    """Numbers of the equations from the leader on that an equation depends on."""
    todo, seen = [index], set()
    while todo:
        for var in eqns[todo.pop()].invars:
            source = place.get(var, -1) if is_var(var) else -1
            if source >= leader and source not in seen:
                seen.add(source)
                todo.append(source)
                yield source


def _fused(siblings: Sequence[Any]) -> Any:
    params = dict(siblings[0].params)
    quantized = params["x_quantized"]
    head = siblings[0].invars[: 3 if quantized else 1]
    parts = [split_operands(eqn.invars, quantized)[2] for eqn in siblings]
    weights = tuple(
        unflatten(eqn.params["tree"], p) for eqn, p in zip(siblings, parts, strict=True)
    )
    leaves, params["tree"] = jax.tree_util.tree_flatten(weights)
    del params["out_sharding"]
    params["out_shardings"] = tuple(eqn.params["out_sharding"] for eqn in siblings)
    outvars = [var for eqn in siblings for var in eqn.outvars]
    return new_eqn(
        [*head, *leaves], outvars, primitives.quantized_dots_p, params, like=siblings[0]
    )


def _name(eqn: Any) -> str:
    return shown_name(_compat.name_stack_names(eqn)) or _compat.source_line(eqn)
