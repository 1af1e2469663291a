"""Reshape: how blocks follow when axes are merged and split.

The flattened index is read as a number in mixed radix. Every old axis of n elements and s scales
is two digits, (s, n / s); a scale depends on the first and not on the second. Cutting all digits
at the borders of the new axes shows, for each new axis, on which of its digits the scale depends:
the trailing ones it does not depend on are the new block, and if there are such digits further
to the left, the scale is repeated along them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxquant.core.layout import MeshLayout
from jaxquant.core.qtensor import QTensor
from jaxquant.core.structure.basic import (
    Part,
    Unstructured,
    broadcast_in_dim,
    check_growth,
    kept_turn,
    map_parts,
    moved_layout,
    on_part,
    unpacked,
)


def reshape(w: QTensor, shape: Sequence[int]) -> QTensor:
    """As `lax.reshape`.

    Raises:
      Unstructured: scales would have to be repeated so often that nothing is saved.
    """
    old, new = w.shape, tuple(shape)
    if old == new:
        return w
    if 0 in old:
        raise Unstructured("it is empty")
    plans = {
        tuple(part.shape): _plan(old, tuple(part.shape), new)
        for part in (w.scale, w.zero_point, w.input_scale, w.input_factor)
        if part is not None
    }
    check_growth(w.scale.size, math.prod(plans[tuple(w.scale.shape)].result), w.size)
    if w.input_scale is not None:
        result = plans[tuple(w.input_scale.shape)].result
        if any(s not in (1, n) for s, n in zip(result, new, strict=True)):
            raise Unstructured("its static input scale would be split")
    kept = _kept_axis(old, new, w)
    if kept is None:
        w = unpacked(w)
        held = new
    else:
        held = (*new[:kept], w.codes.shape[w.packed_axis], *new[kept + 1 :])
    return map_parts(
        w,
        lambda part: _reshape_part(part, plans[tuple(part.shape)]),
        lax.reshape(w.codes, held),
        packed_axis=None if kept is None else kept - len(new),
        mesh_layout=_moved_layout(w, new),
        **_kept_turn(w, new),
    )


def _kept_turn(w: QTensor, new: Sequence[int]) -> dict[str, Any]:
    """`map_parts`'s static argument where the turned axis stays an axis of its own."""
    if w.input_turn is None:
        return {}
    turned = w.input_turn.axis + w.ndim
    for ins, outs in _groups(w.shape, new):
        large = [j for j in outs if new[j] > 1]
        if [i for i in ins if w.shape[i] > 1] == [turned] and len(large) == 1:
            place = large[0] - len(new)
            return kept_turn(w, lambda _, place=place: place)  # type: ignore[misc]
    return {}


def _moved_layout(w: QTensor, new: Sequence[int]) -> MeshLayout | None:
    """How the weight lies then: what splits axes goes to the first axis that is made of them.

    None where only a later one of several merged axes is split: no axis is then.
    """
    if w.mesh_layout is None:
        return None
    sources: list[int | None] = [None] * len(new)
    names = w.mesh_layout.of_weight(w.ndim)
    for ins, outs in _groups(w.shape, new):
        split = [i for i in ins if names[i]]
        large = [i for i in ins if w.shape[i] > 1]
        if split and split != large[:1]:
            return None
        if split:
            sources[next(j for j in outs if new[j] > 1)] = split[0]
    return moved_layout(w, sources)


def _kept_axis(old: Sequence[int], new: Sequence[int], w: QTensor) -> int | None:
    """The new axis that is the packed axis unchanged, if there is one."""
    if w.packed_axis is None:
        return None
    packed = w.packed_axis + len(old)
    before = math.prod(old[:packed])
    for axis, n in enumerate(new):
        if n == old[packed] and math.prod(new[:axis]) == before:
            return axis
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Steps that reshape a part: repeat to `full`, split to `digits`, widen, merge to `result`.

    Attributes:
      full: sizes to spread the part to first (axes whose digits have no common cut).
      digits: sizes of the digits a scale depends on.
      wide: sizes of these and of the digits along which it is repeated.
      places: where each of `digits` is in `wide`.
      result: the part's new shape.
    """

    full: tuple[int, ...]
    digits: tuple[int, ...]
    wide: tuple[int, ...]
    places: tuple[int, ...]
    result: tuple[int, ...]


def _plan(old: Sequence[int], part: Sequence[int], new: Sequence[int]) -> _Plan:
    full = list(part)
    digits: list[int] = []
    wide: list[int] = []
    places: list[int] = []
    result = [1] * len(new)
    for ins, outs in _groups(old, new):
        cut = _digits([old[i] for i in ins], [part[i] for i in ins], [new[j] for j in outs])
        if cut is None:  # no common cut: every element gets a scale of its own
            for i in ins:
                full[i] = old[i]
            cut = _digits([old[i] for i in ins], [old[i] for i in ins], [new[j] for j in outs])
        if cut is None:  # one digit for all of the group's axes
            size = math.prod(old[i] for i in ins)
            places.append(len(wide))
            digits.append(size)
            wide.append(size)
            for j in outs:
                result[j] = new[j]
            continue
        for j, axis_digits in zip(outs, cut, strict=True):
            while axis_digits and not axis_digits[-1][1]:
                axis_digits.pop()
            for size, depends in axis_digits:
                result[j] *= size
                if depends:
                    places.append(len(wide))
                    digits.append(size)
                wide.append(size)
    return _Plan(tuple(full), tuple(digits), tuple(wide), tuple(places), tuple(result))


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest runs of old and new axes with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        ins: list[int] = []
        outs: list[int] = []
        left = right = 1
        while not (ins or outs) or left != right:
            if left <= right and i < len(old):
                ins.append(i)
                left *= old[i]
                i += 1
            else:
                outs.append(j)
                right *= new[j]
                j += 1
        groups.append((ins, outs))
    return groups


def _digits(
    old: Sequence[int], part: Sequence[int], new: Sequence[int]
) -> list[list[tuple[int, bool]]] | None:
    """Digits (size, whether the scale depends on it) of every new axis, or None.

    None means that the borders of old axes, blocks and new axes cut no common digits.
    """
    borders: list[tuple[int, bool]] = []  # (product of all to the right, dependence left of it)
    weight = 1
    for n, s in zip(reversed(old), reversed(part), strict=True):
        borders += [(weight, False), (weight * (n // s), True)]
        weight *= n
    new_borders = [math.prod(new[j:]) for j in range(len(new) + 1)]
    cuts = sorted({b for b, _ in borders} | set(new_borders) | {weight})
    if any(b % a for a, b in zip(cuts, cuts[1:], strict=False)):
        return None
    result: list[list[tuple[int, bool]]] = []
    for j in range(len(new)):
        inside = [c for c in cuts if new_borders[j + 1] <= c <= new_borders[j]]
        axis_digits = [
            (high // low, _depends(borders, low))
            for low, high in zip(inside, inside[1:], strict=False)
        ]
        result.append(axis_digits[::-1])
    return result


def _depends(borders: Sequence[tuple[int, bool]], low: int) -> bool:
    """Whether a scale depends on the digit just left of `low`."""
    return [depends for border, depends in borders if border <= low][-1]


def _reshape_part(part: Part, plan: _Plan) -> Part:
    if tuple(part.shape) != plan.full:
        part = part.dequantize() if isinstance(part, QTensor) else part
        for axis, size in enumerate(plan.full):
            part = jnp.repeat(part, size // part.shape[axis], axis=axis)
    part = on_part(part, reshape, lax.reshape, plan.digits)
    part = on_part(part, broadcast_in_dim, lax.broadcast_in_dim, plan.wide, plan.places)
    return on_part(part, reshape, lax.reshape, plan.result)
