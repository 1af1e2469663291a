"""What the rotation of a value asks of the others of an operation; see `rotation_flow`.

A rule looks at an operation some of whose values rotate, and states which others do; or raises
`Conflict`. Entered into the table of `rotation_flow`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes.channel_graph import CARRY, EACH, EQUAL, REPEAT, Node, Value
from jaxquant.passes.channel_products import product_names
from jaxquant.passes.channel_solver import SAME
from jaxquant.passes.rotation_flow import (
    Conflict,
    Form,
    Spot,
    Turn,
    gain_of,
    register,
    uniform,
)

# --- elements keep their place, or the rotated part of a dimension its order ---------------------


def _pass(turn: Turn, node: Node, a: Value, b: Value, move: Callable[[int], int | None]) -> None:
    """Values with the same elements; ``move`` gives the dimension of b for one of a, or None."""
    back = {move(d): d for d in range(len(a.shape)) if move(d) is not None}
    for source, other, there in ((a, b, move), (b, a, back.get)):
        spot = turn.spots.get(source)
        if spot is None:
            continue
        dim = there(spot.dim)
        if dim is None:
            raise Conflict("cuts or drops the rotated axis", node, source)
        form: Form = "squared" if turn.squared(source) else "rotated"
        turn.rotate(other, spot.at(dim), node, source, form)


def _pairs(turn: Turn, node: Node, values: Sequence[Value]) -> None:
    for a, b in zip(values, values[1:], strict=False):
        _pass(turn, node, a, b, lambda d: d)
        _pass(turn, node, values[0], b, lambda d: d)


@register(*SAME, jp.neg_p, EQUAL, REPEAT)
def _same(turn: Turn, node: Node) -> None:
    _pairs(turn, node, list(node.values))


@register(CARRY)
def _carry(turn: Turn, node: Node) -> None:
    values = list(node.values)
    _pairs(turn, node, [v for v in values if v in turn.spots] + values)


@register(_compat.optimization_barrier_p)
def _barrier(turn: Turn, node: Node) -> None:
    for a, b in zip(node.ins, node.outs, strict=True):
        _pass(turn, node, a, b, lambda d: d)


@register(EACH)
def _each(turn: Turn, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    step = len(b.shape) - len(a.shape)  # -1 into the scan, 1 out of it
    _pass(turn, node, a, b, lambda d: d + step if d + step >= 0 else None)


@register(jp.transpose_p)
def _transpose(turn: Turn, node: Node) -> None:
    order = list(node.params["permutation"])
    _pass(turn, node, node.ins[0], node.outs[0], order.index)


@register(jp.broadcast_in_dim_p)
def _broadcast(turn: Turn, node: Node) -> None:
    dims = [int(d) for d in node.params["broadcast_dimensions"]]
    _pass(turn, node, node.ins[0], node.outs[0], lambda d: dims[d])


@register(jp.reshape_p, jp.squeeze_p)
def _reshape(turn: Turn, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    for source, other in ((a, b), (b, a)):
        spot = turn.spots.get(source)
        if spot is not None:
            form: Form = "squared" if turn.squared(source) else "rotated"
            turn.rotate(other, _reshaped(spot, source, other, node), node, source, form)


def _reshaped(spot: Spot, source: Value, other: Value, node: Node) -> Spot:
    stride = spot.inner * int(np.prod(source.shape[spot.dim + 1 :]))
    for dim in reversed(range(len(other.shape))):
        behind = int(np.prod(other.shape[dim + 1 :]))
        inside = stride % behind == 0 and stride >= behind
        if inside and other.shape[dim] % (stride // behind * spot.size) == 0:
            return Spot(dim, spot.size, stride // behind)
    raise Conflict("a reshape cuts the rotated axis", node, source)


@register(jp.slice_p, jp.dynamic_slice_p, jp.rev_p, jp.pad_p)
def _partly(turn: Turn, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    kept = [d for d, n in enumerate(a.shape) if b.shape[d] == n]
    if node.kind is jp.rev_p:
        kept = [d for d in kept if d not in node.params["dimensions"]]
    _pass(turn, node, a, b, lambda d: d if d in kept else None)


@register(jp.concatenate_p, _compat.split_p, jp.dynamic_update_slice_p)
def _joined(turn: Turn, node: Node) -> None:
    cut = node.params.get("dimension", node.params.get("axis"))
    values = [v for v in node.values if v.shape and v.is_float]
    known = next(v for v in values if v in turn.spots)
    for value in values:
        spot = turn.spots[known]
        if spot.dim == cut or value.shape[spot.dim] != known.shape[spot.dim]:
            raise Conflict("cuts the rotated axis", node, value)
        turn.rotate(value, spot, node, known)


@register(_compat.stack_p, _compat.unstack_p)
def _stacked(turn: Turn, node: Node) -> None:
    axis = node.params["axis"]
    (whole,), parts = (
        (node.outs, node.ins) if node.kind is _compat.stack_p else (node.ins, node.outs)
    )
    for _ in range(2):  # once a part turns the whole does, and then all parts do
        for part in parts:
            _pass(turn, node, part, whole, lambda d: d + (d >= axis))


@register(jp.gather_p)
def _gather(turn: Turn, node: Node) -> None:
    table, out, p = node.ins[0], node.outs[0], node.params
    numbers = p["dimension_numbers"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    spread = [d for d in range(len(table.shape)) if d not in dropped]
    columns = {
        d: int(where)
        for d, where in zip(spread, numbers.offset_dims, strict=True)
        if p["slice_sizes"][d] == table.shape[d]
    }
    _pass(turn, node, table, out, columns.get)


# --- arithmetic ---------------------------------------------------------------------------------


@register(jp.add_p, jp.sub_p, jp.add_jaxvals_p, jp.select_n_p)
def _sum(turn: Turn, node: Node) -> None:
    chosen = node.kind is jp.select_n_p
    terms = node.ins[1:] if chosen else node.ins
    values = [*terms, node.outs[0]]
    if any(turn.squared(v) for v in values):
        raise Conflict("adds to single squares of a rotated value", node)
    known = next(v for v in values if v in turn.spots)
    spot = turn.spots[known]
    if chosen and not uniform(node.ins[0], spot.dim):
        raise Conflict("selects channels of a rotated value one by one", node)
    for value in values:
        turn.rotate(value, spot, node, known)
    both = len(terms) == 2 and all(t in turn.spots and t.from_input for t in terms)
    if both and not chosen and node not in turn.joins:
        turn.joins.append(node)


@register(jp.mul_p, jp.div_p)
def _product(turn: Turn, node: Node) -> None:
    (a, b), out = node.ins, node.outs[0]
    known = next(v for v in (out, a, b) if v in turn.spots)
    spot = turn.spots[known]
    form: Form = "squared" if turn.squared(known) else "rotated"
    if a is b and node.kind is jp.mul_p:
        _square(turn, node)
        return
    varying = [i for i, v in enumerate((a, b)) if not uniform(v, spot.dim)]
    if len(varying) == 2 and form == "rotated" and node.kind is jp.mul_p:
        gains = [(i, gain_of(node.ins[i], spot.dim)) for i in varying]
        found = [(1 - i, gain) for i, gain in gains if gain is not None]
        if len(found) == 1:
            turn.gains[node] = found[0]
            varying = [found[0][0]]
    if len(varying) != 1 or (node.kind is jp.div_p and varying == [1]):
        raise Conflict("multiplies channels of a rotated value one by one", node)
    operand, other = node.ins[varying[0]], node.ins[1 - varying[0]]
    if other in turn.spots:
        raise Conflict("multiplies two rotated values", node)
    turn.rotate(operand, spot, node, known, form)
    turn.rotate(out, spot, node, known, form)


@register(jp.square_p, jp.integer_pow_p)
def _square(turn: Turn, node: Node) -> None:
    value, out = node.ins[0], node.outs[0]
    spot = turn.get(value)
    if spot is None or node.params.get("y", 2) != 2:
        raise Conflict("is no square of a rotated value", node)
    turn.rotate(out, spot, node, value, "squared")


@register(jp.reduce_sum_p)
def _reduce(turn: Turn, node: Node) -> None:
    value, out = node.ins[0], node.outs[0]
    axes = {int(a) for a in node.params["axes"]}
    left = [d for d in range(len(value.shape)) if d not in axes]
    spot = turn.spots.get(value)
    if spot is None:
        outer = turn.spots[out]
        turn.rotate(value, outer.at(left[outer.dim]), node, out)
    elif spot.dim not in axes:
        _pass(turn, node, value, out, lambda d: left.index(d) if d in left else None)
    elif out in turn.spots:
        raise Conflict("sums over one of two rotated axes", node)
    elif not turn.squared(value):
        turn.fixes_ones = True  # the sum of all channels is the product with the ones vector


@register(jp.dot_general_p)
def _contraction(turn: Turn, node: Node) -> None:
    names = product_names(node)
    assert names is not None
    for side, value in enumerate(node.ins):
        spot = turn.get(value)
        if turn.squared(value):
            raise Conflict("multiplies single squares of a rotated value", node)
        if spot is None:
            continue
        name = names[side][spot.dim]
        if name in names[1 - side] and name in names[2]:
            raise Conflict("the rotated axis is a batch axis of a product", node)
        if name in names[1 - side]:
            other = node.ins[1 - side]
            turn.rotate(other, spot.at(names[1 - side].index(name)), node, value)
        else:
            turn.rotate(node.outs[0], spot.at(names[2].index(name)), node, value)
    spot = turn.get(node.outs[0])
    if spot is not None:
        _write(turn, node, names, spot)


def _write(
    turn: Turn, node: Node, names: tuple[tuple[Hashable, ...], ...], spot: Spot
) -> None:
    name = names[2][spot.dim]
    sides = [i for i in (0, 1) if name in names[i]]
    if len(sides) != 1:
        raise Conflict("the rotated axis is a batch axis of a product", node)
    where = spot.at(names[sides[0]].index(name))
    turn.rotate(node.ins[sides[0]], where, node, node.outs[0])
