"""How operands get into bodies: which input is which operand, and where further ones go.

What `body_operands` has to know of each primitive with bodies. `LAYOUTS` has an entry for each
through which codes may go; the functions behind it speak of all. Called by `body_operands` alone.

Custom derivatives take what is new in front, as constants: JAX counts those that it hoisted out of
the function, and the user's rules neither get them nor have to give them a derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jax.extend.core import Primitive
from jax.extend.core import primitives as jp
from jax.sharding import PartitionSpec

from jaxquant.core import _compat


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two further operands: codes and scale of an operand that there is.

    Attributes:
      position: number of that operand.
      shared: its axes along which the scale has size 1.
    """

    position: int
    shared: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a primitive takes further operands.

    Attributes:
      end: behind how many operands of the equation they go.
      more: the equation's parameters with them, but for its bodies: from its parameters and the
        pairs in order.
      end_inside: behind how many inputs of a body, where that is another number.
      first: number of the first body that takes them; those behind it do, too.
    """

    end: Callable[[Any], int]
    more: Callable[[dict[str, Any], Sequence[Pair]], dict[str, Any]]
    end_inside: Callable[[Any], int] | None = None
    first: int = 0


def _scan_consts(eqn: Any) -> int:
    return _compat.scan_arity(eqn)[0]


def _while_consts(eqn: Any) -> int:
    return int(eqn.params["cond_nconsts"] + eqn.params["body_nconsts"])


def _hoisted(eqn: Any) -> int:
    return int(eqn.params["num_consts"])


def _all(eqn: Any) -> int:
    return len(eqn.invars)


def _more_of_cond(params: dict[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    return params


def _more_of_custom(params: dict[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    return _compat.custom_with_more_consts(params, 2 * len(pairs))


def _more_of_jit(params: dict[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    return _compat.jit_with_more_operands(params, 2 * len(pairs))


def _more_of_scan(params: dict[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    return _compat.scan_with_more_consts(params, 2 * len(pairs))


def _more_of_while(params: dict[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    return {**params, "body_nconsts": params["body_nconsts"] + 2 * len(pairs)}


def _more_of_shard_map(params: dict[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Codes are split as the values are, scales along the axes that have several."""
    specs: list[PartitionSpec] = []
    for pair in pairs:
        spec = params["in_specs"][pair.position]
        own = (None if i in pair.shared else names for i, names in enumerate(spec))
        specs += [spec, PartitionSpec(*own)]
    return {**params, "in_specs": (*params["in_specs"], *specs)}


LAYOUTS: dict[Primitive, Layout] = {
    jp.cond_p: Layout(_all, _more_of_cond, lambda eqn: len(eqn.invars) - 1),
    jp.custom_jvp_call_p: Layout(_hoisted, _more_of_custom),
    jp.custom_vjp_call_p: Layout(_hoisted, _more_of_custom),
    jp.jit_p: Layout(_all, _more_of_jit),
    jp.scan_p: Layout(_scan_consts, _more_of_scan),
    jp.while_p: Layout(
        _while_consts, _more_of_while, lambda eqn: int(eqn.params["body_nconsts"]), first=1
    ),
    _compat.shard_map_p: Layout(_all, _more_of_shard_map),
}


def takes_codes(eqn: Any) -> bool:
    """Whether the bodies of an equation may be given further operands."""
    # Effects on references speak of operands by their number.
    numbered = any(hasattr(effect, "input_index") for effect in eqn.effects)
    return eqn.primitive in LAYOUTS and not numbered


def may_be_quantized_outside(eqn: Any, position: int) -> bool:
    """Whether the value of an operand, or a part that shard_map makes, is the body's at once.

    Not if the body gets one layer after the other, or gets it at a place that the call names.
    """
    if eqn.primitive is jp.scan_p:
        return position < _scan_consts(eqn)
    if eqn.primitive is jp.jit_p:
        return _compat.is_unspecified(eqn.params["in_shardings"][position])
    return True


def sources(eqn: Any, sub: int) -> list[int | None]:
    """For each input of a body the operand that it always is (or is a part of), or None."""
    count = len(eqn.invars)
    if eqn.primitive is jp.scan_p:
        consts, carry = _compat.scan_arity(eqn)
        return [None if consts <= i < consts + carry else i for i in range(count)]
    if eqn.primitive is jp.while_p:
        cond = eqn.params["cond_nconsts"]
        return list(range(cond)) if sub == 0 else list(range(cond, _while_consts(eqn)))
    if eqn.primitive is jp.cond_p:
        return list(range(1, count))
    return list(range(count))


def passed(eqn: Any, position: int) -> Hashable:
    """How an operand is passed: two that are passed alike are the same inside."""
    params = eqn.params
    if eqn.primitive is jp.scan_p:
        return position < _scan_consts(eqn)
    if eqn.primitive is jp.jit_p:
        donated = params["donated_invars"][position]
        return (params["in_shardings"][position], position if donated else None)
    if eqn.primitive is _compat.shard_map_p:
        return params["in_specs"][position]
    return None


def types_inside(eqn: Any, params: dict[str, Any], avals: Sequence[Any]) -> list[Any]:
    """Types that the last operands of an equation have in its bodies.

    Args:
      eqn: the equation.
      params: its parameters, with those operands.
      avals: their types outside.
    """
    if eqn.primitive is not _compat.shard_map_p:
        return list(avals)
    specs = params["in_specs"][len(params["in_specs"]) - len(avals) :]
    return [_compat.type_in_shard_map(eqn, s, a) for s, a in zip(specs, avals, strict=True)]


def split_axes(eqn: Any, position: int, local: Any) -> frozenset[int]:
    """Axes of an operand of which a body gets a part only, told by the type of what it gets."""
    if eqn.primitive is not _compat.shard_map_p:
        return frozenset()
    whole = eqn.invars[position].aval.shape
    return frozenset(i for i, n in enumerate(local.shape) if n != whole[i])
