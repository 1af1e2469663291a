"""Per-channel factors through products that sum: dots, convolutions; see `channel_rules`.

`product_names` is the one description of such a product that this and `channel_flow` share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes import channel_moves as moves
from jaxquant.passes.channel_graph import Node
from jaxquant.passes.channel_labels import inverse
from jaxquant.passes.channel_rules import carrier_of, link, only, register
from jaxquant.passes.channel_solver import CONTRACT, Flow, Reason

Names = tuple[tuple[Hashable, ...], tuple[Hashable, ...], tuple[Hashable, ...]]


def product_names(node: Node) -> Names | None:
    """Names of the dimensions of lhs, rhs and result of a product that sums.

    Shared names of the operands that the result lacks are contracted. None where the operation is
    no such product.
    """
    params = node.params
    if node.kind is jp.dot_general_p:
        return _dot_names(node, params["dimension_numbers"], ())
    if node.kind is _compat.ragged_dot_general_p:
        numbers = params["ragged_dot_dimension_numbers"]
        (contract, _), _ = numbers.dot_dimension_numbers
        if set(numbers.lhs_ragged_dimensions) & set(contract):
            return None
        return _dot_names(node, numbers.dot_dimension_numbers, numbers.rhs_group_dimensions)
    if node.kind is jp.conv_general_dilated_p:
        return _conv_names(node)
    return None


def _dot_names(node: Node, numbers: Any, grouped: Sequence[int]) -> Names:
    (contract_l, contract_r), (batch_l, batch_r) = numbers
    lhs: list[Hashable] = [("lhs", i) for i in range(len(node.ins[0].shape))]
    rhs: list[Hashable] = [("rhs", i) for i in range(len(node.ins[1].shape))]
    for kind, left, right in (("k", contract_l, contract_r), ("b", batch_l, batch_r)):
        for number, (i, j) in enumerate(zip(left, right, strict=True)):
            lhs[i] = rhs[j] = (kind, number)
    batch = [("b", i) for i in range(len(batch_l))]
    free_l = [n for n in lhs if n in [("lhs", i) for i in range(len(lhs))]]
    free_r = [("rhs", i) for i in range(len(rhs)) if ("rhs", i) in rhs and i not in grouped]
    return tuple(lhs), tuple(rhs), (*batch, *free_l, *free_r)


def _conv_names(node: Node) -> Names | None:
    params, numbers = node.params, node.params["dimension_numbers"]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None

    def named(spec: Sequence[int], first: str, second: str, rest: str) -> tuple[Hashable, ...]:
        names: list[Hashable] = [None] * len(spec)
        for number, dim in enumerate(spec):
            names[dim] = (first, second)[number] if number < 2 else (rest, number)
        return tuple(names)

    return (
        named(numbers.lhs_spec, "n", "k", "x"),
        named(numbers.rhs_spec, "o", "k", "w"),
        named(numbers.out_spec, "n", "o", "y"),
    )


def contracted_axes(node: Node, side: int) -> tuple[int, ...]:
    """Dimensions of an operand that a product contracts with the other operand."""
    names = product_names(node)
    if names is None:
        return ()
    other, out = names[1 - side], names[2]
    return tuple(i for i, n in enumerate(names[side]) if n in other and n not in out)


def shared_axes(node: Node, side: int) -> tuple[int, ...]:
    """Dimensions of an operand that the other operand has too: contracted, or a batch."""
    names = product_names(node)
    if names is None:
        return ()
    return tuple(i for i, n in enumerate(names[side]) if n in names[1 - side])


@register(jp.dot_general_p, _compat.ragged_dot_general_p, jp.conv_general_dilated_p)
def _contraction(flow: Flow, node: Node) -> None:
    names = product_names(node)
    if names is None:
        for value in node.values:
            if (layout := flow.get(value)) is not None:
                flow.forbid(layout, node, f"{node.kind} in groups has no rule")
        return
    operands, depth = node.ins[:2], node.outs[0].depth
    if node not in flow.carriers:
        for side, value in enumerate(operands):
            layout = flow.get(value)
            axes = [depth + i for i in contracted_axes(node, side)]
            if layout is not None and flow.labels.varies(layout, axes):
                flow.carriers[node] = CONTRACT
    carrier = carrier_of(flow, node, operands)
    if carrier == CONTRACT:
        _cancel(flow, node, names)
    elif carrier is not None:
        operand, out = operands[carrier], node.outs[0]
        link(
            flow, node, operand, out,
            lambda x: moves.project(flow.labels, x, depth, names[carrier], names[2]),
            lambda x: moves.project(flow.labels, x, depth, names[2], names[carrier]),
            "sums over other axes only, with the same factor in every term",
        )  # fmt: skip
        only(flow, node, carrier)


def _cancel(flow: Flow, node: Node, names: Names) -> None:
    """Factors along contracted axes: the operands carry inverse ones, the result none."""
    depth = node.outs[0].depth
    shared = [n for n in names[0] if n in names[1]]
    for side in (0, 1):
        layout = flow.get(node.ins[side])
        if layout is not None:
            there = moves.project(
                flow.labels, layout, depth, names[side], names[1 - side], keep=shared
            )
            why = "is summed over the channels with it, so it takes the inverse factors"
            reason = Reason(node, node.ins[side], why)
            flow.assign(node.ins[1 - side], inverse(there), reason)
    out = flow.get(node.outs[0])
    if out is not None:
        flow.forbid(out, node, "the operands of a product cancel each other's factors already")
