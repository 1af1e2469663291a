"""Per-channel factors through elementwise operations and around loops; see `channel_rules`."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes import channel_moves as moves
from jaxquant.passes.channel_graph import CARRY, EACH, EQUAL, REPEAT, Node, Value
from jaxquant.passes.channel_labels import Array, inverse
from jaxquant.passes.channel_rules import carrier_of, equal, link, only, register
from jaxquant.passes.channel_solver import SAME, Flow, Reason, constant

# --- elements stay where they are -------------------------------------------------------------


@register(jp.abs_p)
def _magnitude(flow: Flow, node: Node) -> None:
    flow.positive = True
    equal(flow, node, list(node.values), "a magnitude keeps a positive factor")


@register(*SAME, jp.neg_p, jp.real_p, EQUAL, EACH)
def _same(flow: Flow, node: Node) -> None:
    equal(flow, node, list(node.values), "each element keeps its factor")


@register(_compat.optimization_barrier_p)
def _pairs(flow: Flow, node: Node) -> None:
    for pair in zip(node.ins, node.outs, strict=True):
        equal(flow, node, pair, "each element keeps its factor")


@register(REPEAT)
def _repeat(flow: Flow, node: Node) -> None:
    outer, inner = node.ins[0], node.outs[0]
    axis = outer.depth
    link(
        flow, node, outer, inner,
        lambda x: np.expand_dims(x, axis),
        lambda x: flow.labels.collapse(x, [axis]).squeeze(axis),
        "all iterations of the scan see the same value, so they share the factor",
    )  # fmt: skip


@register(CARRY)
def _carry(flow: Flow, node: Node) -> None:
    (start, result), (incoming, final) = node.ins, node.outs
    axis, why = start.depth, "the scan hands it from iteration to iteration"
    for outer, inner in ((start, incoming), (start, result), (final, incoming)):
        link(
            flow, node, outer, inner,
            lambda x: np.expand_dims(x, axis),
            lambda x: flow.labels.collapse(x, [axis]).squeeze(axis),
            why,
        )  # fmt: skip
    equal(flow, node, [start, final], why)


# --- elementwise arithmetic -------------------------------------------------------------------


def _terms(flow: Flow, node: Node, terms: Sequence[Value], why: str) -> None:
    """Terms and result share their factors, except terms that no positive factor changes."""
    out = node.outs[0]
    depth, rank = out.depth, len(out.shape)
    terms = [t for t in terms if constant(t) not in (0.0, np.inf, -np.inf)]
    if flow.get(out) is None:
        known = next((t for t in terms if flow.get(t) is not None), None)
        if known is None:
            return
        lifted = moves.lift(flow.layouts[known], depth, rank)
        flow.assign(out, lifted, Reason(node, known, why))
    for term in terms:
        layout = flow.layouts.get(out)
        if layout is not None:
            fitted = moves.fit(flow.labels, layout, depth, term.shape)
            flow.assign(term, fitted, Reason(node, out, why))


@register(jp.add_p, jp.sub_p, jp.add_jaxvals_p)
def _sum(flow: Flow, node: Node) -> None:
    _terms(flow, node, node.ins, "the terms of a sum share the factor")


@register(jp.max_p, jp.min_p)
def _extremum(flow: Flow, node: Node) -> None:
    flow.positive = True
    why = "the larger (smaller) of two numbers, or of one and zero, keeps a positive factor"
    _terms(flow, node, node.ins, why)


@register(jp.select_n_p)
def _select(flow: Flow, node: Node) -> None:
    _terms(flow, node, node.ins[1:], "whichever is selected, the factor is the same")


@register(jp.sign_p, jp.iota_p)
def _unchanged(flow: Flow, node: Node) -> None:
    """A positive factor changes nothing."""
    flow.positive = True


@register(jp.gt_p, jp.ge_p, jp.lt_p, jp.le_p, jp.eq_p, jp.ne_p)
def _compare(flow: Flow, node: Node) -> None:
    flow.positive = True
    if not any(constant(v) == 0 for v in node.ins):
        for value in node.ins:
            layout = flow.get(value)
            if layout is not None:
                flow.forbid(layout, node, f"{node.kind} compares it with something not zero")


@register(jp.square_p, jp.integer_pow_p, jp.sqrt_p, jp.rsqrt_p)
def _power(flow: Flow, node: Node) -> None:
    """Powers of a product are products of powers: relu(s x)^2 = s^2 relu(x)^2."""
    own = {jp.square_p: Fraction(2), jp.sqrt_p: Fraction(1, 2), jp.rsqrt_p: Fraction(-1, 2)}
    _raised(flow, node, own[node.kind] if node.kind in own else Fraction(node.params["y"]))


def _raised(flow: Flow, node: Node, power: Fraction) -> None:
    if power == 0:
        for value in node.values:
            if (layout := flow.get(value)) is not None:
                flow.forbid(layout, node, f"{node.kind} with exponent 0 is one")
        return
    flow.positive = True
    flips = power < 0

    def move(layout: Array) -> Array:
        return inverse(layout) if flips else layout

    why = f"the factor to the power {power} is the factor of the power"
    link(flow, node, node.ins[0], node.outs[0], move, move, why, abs(power))


@register(jp.mul_p, jp.div_p)
def _product(flow: Flow, node: Node) -> None:
    if node.kind is jp.mul_p and node.ins[0] is node.ins[1]:
        _raised(flow, node, Fraction(2))
        return
    carrier = carrier_of(flow, node, node.ins)
    if carrier is None:
        return
    operand, out = node.ins[carrier], node.outs[0]
    depth, rank = out.depth, len(out.shape)
    flips = node.kind is jp.div_p and carrier == 1

    def forward(layout: Array) -> Array:
        lifted = moves.lift(layout, depth, rank)
        return inverse(lifted) if flips else lifted

    def backward(layout: Array) -> Array:
        fitted = moves.fit(flow.labels, layout, depth, operand.shape)
        return inverse(fitted) if flips else fitted

    why = (
        "a factor of the divisor is the inverse factor of the quotient"
        if flips
        else "a factor of one operand is a factor of the product, whatever the other is"
    )
    link(flow, node, operand, out, forward, backward, why)
    only(flow, node, carrier)
