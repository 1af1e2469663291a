"""The table of rules that say how per-channel factors pass through operations.

A rule looks at one operation some of whose values carry factors, and states what the others must
carry so that the operation still gives what it gave, up to those factors. Factors are positive.
What has no rule commutes with nothing. The rules are in `channel_elementwise`, `channel_products`
and `channel_structure`; `channel_flow` gives the table to the solver. A new primitive is one more
rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from jax.extend.core import Primitive

from jaxquant.passes import registry
from jaxquant.passes.channel_graph import Node, Value
from jaxquant.passes.channel_labels import Array
from jaxquant.passes.channel_solver import ONCE, Flow, Reason, Rule

RULES: dict[Primitive | str, Rule] = {}

Map = Callable[[Array], Array]


def register(*kinds: Primitive | str) -> Callable[[Rule], Rule]:
    """Decorator that enters a rule for operations; a second rule for one is an error."""
    return registry.register(RULES, *kinds)


def link(
    flow: Flow, node: Node, a: Value, b: Value, forward: Map, backward: Map, why: str,
    power: Fraction = ONCE,
) -> None:  # fmt: skip
    """Two values whose factors determine each other; b's are this power of a's."""
    for known, other, move, own in ((b, a, backward, 1 / power), (a, b, forward, power)):
        layout = flow.get(known)
        if layout is None or (known is b and flow.get(a) is not None):
            continue
        before = flow.free
        moved = move(layout)
        shared = "; channels that it repeats share one factor" if flow.free < before else ""
        flow.assign(other, moved, Reason(node, known, why + shared, own))


def equal(flow: Flow, node: Node, values: Sequence[Value], why: str) -> None:
    """Values that carry the same factors."""
    known = next((v for v in values if flow.get(v) is not None), None)
    if known is not None:
        for value in values:
            flow.assign(value, flow.layouts[known], Reason(node, known, why))


def only(flow: Flow, node: Node, carrier: int) -> None:
    """Sees to it that the operand of a product that is no carrier carries no factors."""
    other = node.ins[1 - carrier]
    layout = flow.get(other)
    if layout is not None:
        flow.forbid(layout, node, "both operands of a product would carry factors")


def carrier_of(flow: Flow, node: Node, values: Sequence[Value]) -> int | None:
    """Which of two operands carries factors; None if none does, or it is still open."""
    if node not in flow.carriers:
        known = [i for i, v in enumerate(values) if flow.get(v) is not None]
        able = [i for i, v in enumerate(values) if v.literal is None and v.is_float]
        if not known and flow.get(node.outs[0]) is None:
            return None
        if not known and len(able) > 1:
            flow.choose(node, able)
            return None
        flow.carriers[node] = (known or able or [0])[0]
    return flow.carriers[node]
