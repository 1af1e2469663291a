"""Per-channel factors through operations that move, look up or reduce; see `channel_rules`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes import channel_moves as moves
from jaxquant.passes.channel_graph import Node, Value
from jaxquant.passes.channel_labels import Array
from jaxquant.passes.channel_rules import Map, link, register
from jaxquant.passes.channel_solver import Flow, Obstacle, Reason, constant

_MOVES = "moves elements; each keeps its factor"


@register(jp.transpose_p)
def _transpose(flow: Flow, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    permutation = node.params["permutation"]
    back = [int(i) for i in np.argsort(permutation)]
    link(
        flow, node, a, b,
        lambda x: moves.transpose(x, a.depth, permutation),
        lambda x: moves.transpose(x, a.depth, back),
        _MOVES,
    )  # fmt: skip


@register(jp.reshape_p, jp.squeeze_p)
def _reshape(flow: Flow, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    if node.params.get("dimensions") is not None and node.kind is jp.reshape_p:
        for value in (a, b):
            if (layout := flow.get(value)) is not None:
                flow.forbid(layout, node, "a reshape that permutes has no rule")
        return
    link(
        flow, node, a, b,
        lambda x: moves.reshape(x, a.depth, a.shape, b.shape),
        lambda x: moves.reshape(x, a.depth, b.shape, a.shape),
        _MOVES,
    )  # fmt: skip


@register(jp.broadcast_in_dim_p)
def _broadcast(flow: Flow, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    dims = node.params["broadcast_dimensions"]
    old = [int(d) for d in dims]
    every = list(range(len(b.shape)))

    def backward(layout: Array) -> Array:
        there = moves.project(flow.labels, layout, a.depth, every, old)
        return moves.fit(flow.labels, there, a.depth, a.shape)

    link(
        flow, node, a, b,
        lambda x: moves.project(flow.labels, x, a.depth, old, every),
        backward,
        "repeats elements, and their factors with them",
    )  # fmt: skip


@register(jp.rev_p)
def _rev(flow: Flow, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    axes = tuple(a.depth + d for d in node.params["dimensions"])
    link(flow, node, a, b, lambda x: np.flip(x, axes), lambda x: np.flip(x, axes), _MOVES)


@register(jp.slice_p)
def _slice(flow: Flow, node: Node) -> None:
    a, b, p = node.ins[0], node.outs[0], node.params
    strides = p["strides"] or (1,) * len(a.shape)
    cuts = {
        a.depth + d: (n, slice(int(start), int(limit), int(stride)))
        for d, (n, start, limit, stride) in enumerate(
            zip(a.shape, p["start_indices"], p["limit_indices"], strides, strict=True)
        )
        if b.shape[d] != n
    }

    def forward(layout: Array) -> Array:
        for axis, (_, cut) in cuts.items():
            layout = moves.take(layout, axis, cut)
        return layout

    def backward(layout: Array) -> Array:
        for axis, (size, cut) in cuts.items():
            layout = moves.put(flow.labels, layout, axis, size, cut)
        return layout

    link(flow, node, a, b, forward, backward, "takes a part; the rest has factors of its own")


def _parts(
    flow: Flow, node: Node, whole: Value, parts: Sequence[Value], axis: int, sizes: Sequence[int]
) -> None:
    """A value and the parts it is joined of, or split into, along an axis of its labels."""
    if flow.get(whole) is None:
        known = next((part for part in parts if flow.get(part) is not None), None)
        if known is None:
            return
        power = flow.powers[known]
        layouts = [flow.get(p) if flow.powers.get(p) == power else None for p in parts]
        joined = moves.join(flow.labels, layouts, axis, sizes)
        flow.assign(whole, joined, Reason(node, known, _MOVES))
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        layout = flow.layouts.get(whole)
        if layout is not None:
            piece = moves.take(layout, axis, slice(start, start + size))
            flow.assign(part, piece, Reason(node, whole, _MOVES))
        start += size


@register(jp.concatenate_p)
def _concatenate(flow: Flow, node: Node) -> None:
    dim, out = node.params["dimension"], node.outs[0]
    sizes = [v.shape[dim] for v in node.ins]
    _parts(flow, node, out, node.ins, out.depth + dim, sizes)


@register(_compat.split_p)
def _split(flow: Flow, node: Node) -> None:
    sizes = [int(n) for n in node.params["sizes"]]
    whole = node.ins[0]
    _parts(flow, node, whole, node.outs, whole.depth + node.params["axis"], sizes)


def _stacked(flow: Flow, node: Node, whole: Value, parts: Sequence[Value]) -> None:
    axis, size = whole.depth + node.params["axis"], len(parts)
    for number, part in enumerate(parts):
        cut = slice(number, number + 1)

        def forward(layout: Array, cut: slice = cut) -> Array:
            return moves.take(layout, axis, cut).squeeze(axis)

        def backward(layout: Array, cut: slice = cut) -> Array:
            return moves.put(flow.labels, np.expand_dims(layout, axis), axis, size, cut)

        link(flow, node, whole, part, forward, backward, _MOVES)


@register(_compat.stack_p)
def _stack(flow: Flow, node: Node) -> None:
    _stacked(flow, node, node.outs[0], node.ins)


@register(_compat.unstack_p)
def _unstack(flow: Flow, node: Node) -> None:
    _stacked(flow, node, node.ins[0], node.outs)


# --- reductions, lookups and windows ----------------------------------------------------------


@register(jp.reduce_sum_p, jp.reduce_max_p, jp.reduce_min_p)
def _reduce(flow: Flow, node: Node) -> None:
    flow.positive = flow.positive or node.kind is not jp.reduce_sum_p
    a, b = node.ins[0], node.outs[0]
    every = list(range(len(a.shape)))
    left = [d for d in every if d not in {int(x) for x in node.params["axes"]}]
    layout = flow.get(a)
    gone = [a.depth + d for d in every if d not in left]
    if layout is not None and flow.labels.varies(layout, gone):
        why = "reduces over the channels, which must share one factor then"
        flow.sharing.append(Obstacle(node, why))
    link(
        flow, node, a, b,
        lambda x: moves.project(flow.labels, x, a.depth, every, left),
        lambda x: moves.project(flow.labels, x, a.depth, left, every),
        "reduces over other axes only, along which the factor is the same",
    )  # fmt: skip


@register(jp.gather_p)
def _gather(flow: Flow, node: Node) -> None:
    table, out, p = node.ins[0], node.outs[0], node.params
    numbers = p["dimension_numbers"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    names: list[Hashable] = [("row", d) for d in range(len(table.shape))]
    results: list[Hashable] = [("index", d) for d in range(len(out.shape))]
    spread = [d for d in range(len(table.shape)) if d not in dropped]
    for d, where in zip(spread, numbers.offset_dims, strict=True):
        if p["slice_sizes"][d] == table.shape[d]:
            names[d] = results[where] = ("column", d)
    link(
        flow, node, table, out,
        lambda x: moves.project(flow.labels, x, table.depth, names, results),
        lambda x: moves.project(flow.labels, x, table.depth, results, names),
        "looks up whole rows: the factor of a column is the same in all of them",
    )  # fmt: skip


@register(jp.dynamic_slice_p)
def _dynamic_slice(flow: Flow, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    cut = [a.depth + d for d, n in enumerate(b.shape) if n != a.shape[d]]
    same: Map = lambda x: flow.labels.collapse(x, cut)  # noqa: E731
    link(flow, node, a, b, same, same, "cuts axes along which the factor is the same")


@register(jp.dynamic_update_slice_p)
def _dynamic_update_slice(flow: Flow, node: Node) -> None:
    (a, update, *_), out = node.ins, node.outs[0]
    cut = [a.depth + d for d, n in enumerate(update.shape) if n != a.shape[d]]
    same: Map = lambda x: flow.labels.collapse(x, cut)  # noqa: E731
    why = "old and new part of the array share the factor"
    for value in (a, update):
        link(flow, node, value, out, same, same, why)
    link(flow, node, a, update, same, same, why)


@register(jp.cumsum_p, jp.cummax_p, jp.cummin_p)
def _cumulative(flow: Flow, node: Node) -> None:
    flow.positive = flow.positive or node.kind is not jp.cumsum_p
    a, b = node.ins[0], node.outs[0]
    axis = [a.depth + node.params["axis"]]
    same: Map = lambda x: flow.labels.collapse(x, axis)  # noqa: E731
    link(flow, node, a, b, same, same, "runs along another axis")


@register(jp.pad_p)
def _pad(flow: Flow, node: Node) -> None:
    a, b = node.ins[0], node.outs[0]
    if constant(node.ins[1]) != 0:
        for value in (a, b):
            if (layout := flow.get(value)) is not None:
                flow.forbid(layout, node, "is padded with something not zero")
        return
    padding = enumerate(node.params["padding_config"])
    padded = [a.depth + d for d, config in padding if tuple(config) != (0, 0, 0)]
    same: Map = lambda x: flow.labels.collapse(x, padded)  # noqa: E731
    link(flow, node, a, b, same, same, "is padded with zeros along another axis")
