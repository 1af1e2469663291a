"""Per-channel factors through products that sum: dots, convolutions; see `channel_rules`.

`product_names` is the one description of such a product that this and `channel_flow` share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes import channel_moves as moves
from jaxquant.passes.channel_graph import Node
from jaxquant.passes.channel_labels import Array, inverse
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
    if names is None and node.params.get("batch_group_count") == 1:
        _grouped(flow, node)
        return
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


# --- convolutions in groups of features ----------------------------------------------------------


def _grouped(flow: Flow, node: Node) -> None:
    """Each group of input features makes its own output features, and no others.

    Factors of input features that differ within a group are cancelled by the kernel, group by
    group; others, and those of output features, pass between kernel or input and the result.
    """
    features = _Features(flow, node)
    lhs, rhs = node.ins[:2]
    if node not in flow.carriers and (layout := flow.get(lhs)) is not None:
        per_group = features.of_input(layout)
        if per_group.shape[-1] > 1 and flow.labels.varies(per_group, [per_group.ndim - 1]):
            flow.carriers[node] = CONTRACT
    carrier = carrier_of(flow, node, (lhs, rhs))
    if carrier == CONTRACT:
        features.cancel()
    elif carrier is not None:
        move = (features.input_to_output, features.kernel_to_output)[carrier]
        back = (features.output_to_input, features.output_to_kernel)[carrier]
        why = "sums within a group of features, with the same factor in every term"
        link(flow, node, (lhs, rhs)[carrier], node.outs[0], move, back, why)
        only(flow, node, carrier)


class _Features:
    """Labels of the features of a grouped convolution, moved between its operands and result."""

    def __init__(self, flow: Flow, node: Node) -> None:
        numbers = node.params["dimension_numbers"]
        self._flow, self._node, self._depth = flow, node, node.outs[0].depth
        self._groups = node.params["feature_group_count"]
        self._in, self._out = numbers.lhs_spec[1], numbers.out_spec[1]
        self._kernel_out, self._kernel_in = numbers.rhs_spec[:2]
        self._rank = len(node.outs[0].shape)

    def _features(self, layout: Array, axes: Sequence[int]) -> Array:
        """Labels along these axes only, last; the others are made equal."""
        kept = [self._depth + a for a in axes]
        gone = [a for a in range(self._depth, layout.ndim) if a not in kept]
        layout = self._flow.labels.collapse(layout, gone)
        order = [*range(self._depth), *kept, *gone]
        layout = layout.transpose(order)
        return layout.reshape(layout.shape[: self._depth + len(axes)])

    def _placed(self, labels: Array, axes: Sequence[int]) -> Array:
        """The inverse: labels of features along these axes of an array."""
        shape = [*labels.shape[: self._depth], *[1] * self._rank]
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        lead = range(self._depth)
        labels = labels.transpose(*lead, *(self._depth + i for i in order))
        for axis, n in zip(sorted(axes), labels.shape[self._depth :], strict=True):
            shape[self._depth + axis] = n
        return labels.reshape(shape)

    def _split(self, labels: Array, size: int) -> Array:
        """The last axis, of a size or of one, as (groups, features of a group)."""
        full = np.broadcast_to(labels, (*labels.shape[:-1], size))
        return full.reshape(*labels.shape[:-1], self._groups, size // self._groups)

    def of_input(self, layout: Array) -> Array:
        """Labels of the input's features as (groups, features of a group)."""
        return self._split(
            self._features(layout, [self._in]), self._node.ins[0].shape[self._in]
        )

    def _of_output(self, layout: Array) -> Array:
        size = self._node.outs[0].shape[self._out]
        return self._split(self._features(layout, [self._out]), size)

    def _joined(self, labels: Array, size: int) -> Array:
        """The inverse of `_split`; a group of one label gets `size` equal ones."""
        wide = np.broadcast_to(labels, (*labels.shape[:-1], size // self._groups))
        return wide.reshape(*labels.shape[:-2], size)

    def input_to_output(self, layout: Array) -> Array:
        """Features of a group share their factor, which all the group makes gets."""
        labels = self.of_input(layout)
        labels = self._flow.labels.collapse(labels, [labels.ndim - 1])
        return self._placed(self._joined(labels, self._node.outs[0].shape[self._out]), [self._out])

    def output_to_input(self, layout: Array) -> Array:
        """The way back."""
        labels = self._of_output(layout)
        labels = self._flow.labels.collapse(labels, [labels.ndim - 1])
        return self._placed(self._joined(labels, self._node.ins[0].shape[self._in]), [self._in])

    def kernel_to_output(self, layout: Array) -> Array:
        """Each output feature has a kernel of its own."""
        return self._placed(self._features(layout, [self._kernel_out]), [self._out])

    def output_to_kernel(self, layout: Array) -> Array:
        """The way back."""
        return self._placed(self._features(layout, [self._out]), [self._kernel_out])

    def cancel(self) -> None:
        """The kernel takes the inverse factors of its group's input features."""
        flow, (lhs, rhs) = self._flow, self._node.ins[:2]
        size = rhs.shape[self._kernel_out]
        why = "is summed over the channels of its group with it, so it takes the inverse factors"
        if (layout := flow.get(lhs)) is not None:
            labels = self.of_input(layout)  # groups, features
            wide = np.repeat(labels, size // self._groups, axis=labels.ndim - 2)
            there = self._placed(wide, [self._kernel_out, self._kernel_in])
            flow.assign(rhs, inverse(there), Reason(self._node, lhs, why))
        if (layout := flow.get(rhs)) is not None:
            labels = self._features(layout, [self._kernel_out, self._kernel_in])
            full = np.broadcast_to(labels, (*labels.shape[:-2], size, labels.shape[-1]))
            shape = (*full.shape[:-2], self._groups, size // self._groups, full.shape[-1])
            each = flow.labels.collapse(full.reshape(shape), [len(shape) - 2])
            joined = self._joined(each.squeeze(len(shape) - 2), lhs.shape[self._in])
            there = inverse(self._placed(joined, [self._in]))
            flow.assign(lhs, there, Reason(self._node, rhs, why))
        if (layout := flow.get(self._node.outs[0])) is not None:
            why = "the operands of a product cancel each other's factors already"
            flow.forbid(layout, self._node, why)
