"""Products that take the codes of a weight which was dequantized for nothing else.

`insert_scales` dequantizes a weight that leaves a branch of a `cond` as a value, and a weight that
meets an operation without a quantized form. Where only a product reads the result, the product can
have the codes: first the codes and scales leave the branches in its place, then the product becomes
a quantized one. Its input stays float, as it was. Called by `elide_roundtrips`, which states by how
much results may differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives
from jaxquant.passes.activation_moves import PARTS, WHOLE
from jaxquant.passes.edit_jaxpr import (
    apply,
    drop_unused,
    is_var,
    new_eqn,
    new_var,
    replace_eqns,
    with_bodies,
)

_DEQUANTIZE = frozenset({primitives.dequantize_p})
_KEPT = ("dimension_numbers", "precision", "preferred_element_type", "out_sharding")


def products_on_codes(jaxpr: Any, notes: list[str]) -> Any:
    """Dots whose one operand is a dequantized weight become quantized dots.

    The dequantization goes if nothing else reads it; if something does, the floats exist anyway,
    but the product still reads the codes only. Rows that were looked up are activations: left.
    """
    producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    made = {
        eqn.outvars[0]: eqn
        for eqn in jaxpr.eqns
        if eqn.primitive is primitives.dequantize_p and _is_weight(eqn.invars[0], producers)
    }
    if not made:
        return jaxpr
    eqns = []
    for eqn in jaxpr.eqns:
        side = _weight_side(eqn, made)
        if side is None:
            eqns.append(eqn)
            continue
        x, w = eqn.invars if side == "rhs" else eqn.invars[::-1]
        source = made[w]
        params = {name: eqn.params[name] for name in _KEPT}
        params |= {
            "tree": source.params["tree"],
            "act": None,
            "x_quantized": False,
            "weight_side": side,
            "implementation": None,
        }
        invars = [x, *source.invars]
        eqns.append(
            new_eqn(invars, eqn.outvars, primitives.quantized_dot_general_p, params, like=eqn)
        )
        notes.append(f"a product takes the codes of a dequantized weight: {_where(eqn)}")
    edited = replace_eqns(jaxpr, eqns)
    return edited if edited is jaxpr else drop_unused(edited, _DEQUANTIZE)


def _is_weight(codes: Any, producers: dict[Any, Any]) -> bool:
    """Whether codes come, in one piece or as a slice, from outside the body or out of a cond."""
    while (producer := producers.get(codes)) is not None and producer.primitive in WHOLE | PARTS:
        codes = producer.invars[0]
    return producer is None or producer.primitive is jp.cond_p


def _weight_side(eqn: Any, made: dict[Any, Any]) -> str | None:
    """The operand of a dot that is a dequantized weight; of two, the right one."""
    if eqn.primitive is not jp.dot_general_p or not all(map(is_var, eqn.invars)):
        return None
    lhs, rhs = eqn.invars
    for side, w, x in (("rhs", rhs, lhs), ("lhs", lhs, rhs)):
        if w in made and w is not x and jnp.issubdtype(x.aval.dtype, jnp.floating):
            return side
    return None


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """An output of a cond that every branch dequantizes from parts of the same types.

    Attributes:
      index: number of the output.
      sources: the dequantization in each branch.
    """

    index: int
    sources: tuple[Any, ...]


def codes_out_of_branches(jaxpr: Any, notes: list[str]) -> Any:
    """Where all branches of a cond dequantize what they return for products, codes are returned."""
    if not any(eqn.primitive is jp.cond_p for eqn in jaxpr.eqns):
        return jaxpr
    only_products = _read_by_products_only(jaxpr)
    eqns: list[Any] = []
    for eqn in jaxpr.eqns:
        chosen = _chosen(eqn, only_products) if eqn.primitive is jp.cond_p else []
        if not chosen:
            eqns.append(eqn)
            continue
        eqns += _returning_codes(eqn, chosen)
        notes.append(f"{len(chosen)} weights leave a cond as codes: {_where(eqn)}")
    return replace_eqns(jaxpr, eqns)


def _read_by_products_only(jaxpr: Any) -> set[Any]:
    read: set[Any] = set()
    other = {atom for atom in jaxpr.outvars if is_var(atom)}
    for eqn in jaxpr.eqns:
        (read if eqn.primitive is jp.dot_general_p else other).update(filter(is_var, eqn.invars))
    return read - other


def _chosen(eqn: Any, only_products: set[Any]) -> list[_Chosen]:
    branches = [_compat.open_jaxpr(branch)[0] for branch in eqn.params["branches"]]
    makers = [
        {e.outvars[0]: e for e in b.eqns if e.primitive is primitives.dequantize_p}
        for b in branches
    ]
    found = []
    for index, var in enumerate(eqn.outvars):
        outs = [branch.outvars[index] for branch in branches]
        sources = [
            made.get(out) if is_var(out) else None for made, out in zip(makers, outs, strict=True)
        ]
        if var in only_products and None not in sources and _alike(sources):
            found.append(_Chosen(index, tuple(sources)))
    return found


def _alike(sources: Sequence[Any]) -> bool:
    """Whether dequantizations have the same static parts and operands of the same types."""
    kinds = {
        (source.params["tree"], tuple(v.aval.strip_weak_type() for v in source.invars))
        for source in sources
    }
    return len(kinds) == 1 and all(is_var(v) for source in sources for v in source.invars)


def _returning_codes(eqn: Any, chosen: Sequence[_Chosen]) -> list[Any]:
    """The cond that returns parts of weights, and their dequantizations behind it."""
    by_index = {c.index: c for c in chosen}
    number = iter(range(len(eqn.params["branches"])))

    def branch(closed: Any) -> Any:
        which = next(number)
        body, _ = _compat.open_jaxpr(closed)
        outvars: list[Any] = []
        for index, out in enumerate(body.outvars):
            parts = by_index[index].sources[which].invars if index in by_index else [out]
            outvars += parts
        edited = drop_unused(body.replace(outvars=outvars), _DEQUANTIZE)
        return edited if closed is body else closed.replace(jaxpr=edited)

    outvars: list[Any] = []
    behind: list[Any] = []
    for index, var in enumerate(eqn.outvars):
        if index not in by_index:
            outvars.append(var)
            continue
        source = by_index[index].sources[0]
        parts = [new_var(v.aval) for v in source.invars]
        outvars += parts
        made = apply(source.primitive, parts, source.params, like=eqn)
        behind.append(made.replace(outvars=[var]))
    cond = with_bodies(eqn, branch)
    return [cond.replace(outvars=outvars), *behind]


def _where(eqn: Any) -> str:
    return "/".join(_compat.name_stack_names(eqn)) or _compat.source_line(eqn)
