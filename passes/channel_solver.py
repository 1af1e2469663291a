"""Works out what must be scaled with what: the engine behind `channel_flow`.

One value is asked to carry unknown factors along its channels. Every operation that touches it has
a rule (`channel_rules`) that says which other values must then carry which factors; those are
asked in turn, forwards to all readers and backwards to the maker, until nothing new follows. Where
an operation leaves a choice (which operand of a product carries the factor?) each is tried, and
the one that leaves most channels free is taken. What cannot carry a factor makes it one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes.channel_graph import Node, Value
from jaxquant.passes.channel_labels import ONE, Array, Labels, inverse

#: How a product passes factors on: by its operand 0 or 1, or the operands cancel each other.
Carrier = int
CONTRACT = -1

#: Operations that keep every element where it is, up to rounding.
SAME = (
    jp.convert_element_type_p, jp.copy_p, jp.name_p, jp.reduce_precision_p,
    jp.sharding_constraint_p, jp.stop_gradient_p, _compat.reshard_p, _compat.pvary_p,
)  # fmt: skip


ONCE = Fraction(1)


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a value carries factors: an operation, the value on its other side, and the argument.

    Attributes:
      node: the operation.
      before: the value.
      why: the argument.
      power: the power of that value's factors which this one carries: 2 behind a square.
    """

    node: Node | None
    before: Value | None
    why: str
    power: Fraction = ONCE


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A factor that had to be one, and why."""

    node: Node | None
    why: str


class Flow:
    """Values, the labels of their factors, and what is still to be looked at.

    Labels of a value have one leading axis for each scan around it; an axis along which factors
    are equal may have size one. A value without labels has the factor one.

    Attributes:
      labels: what is known about labels.
      layouts: labels of each value that carries factors.
      powers: the power of the labels' factors that the value carries, positive.
      carriers: how each product passes factors on.
      reasons: why a value got its labels.
      obstacles: what made factors one.
      sharing: what made channels share a factor, by summing over them.
      positive: whether an operation commutes only because factors are positive.

    Args:
      rules: rules by kind of operation; what has none does not commute with a factor.
      cut: operations that are taken care of otherwise, and ask for nothing.
    """

    def __init__(
        self, rules: Mapping[Primitive | str, Rule], cut: Collection[Node] = ()
    ) -> None:
        self.labels = Labels()
        self.layouts: dict[Value, Array] = {}
        self.powers: dict[Value, Fraction] = {}
        self.carriers: dict[Node, Carrier] = {}
        self.reasons: dict[Value, Reason] = {}
        self.obstacles: list[Obstacle] = []
        self.sharing: list[Obstacle] = []
        self.positive = False
        self._rules, self._cut = rules, frozenset(cut)
        self._todo: deque[Node] = deque()
        self._open: dict[Node, tuple[Carrier, ...]] = {}
        self._target: Array = np.zeros(0, np.int64)
        self._bound = 0

    def solve(self, value: Value, sizes: Sequence[int]) -> Array:
        """Asks that ``value`` be divided by factors; see what follows in the attributes.

        Args:
          value: the value.
          sizes: shape of the labels: of the scans around it, then its own or ones.

        Returns:
          The labels of the factors (the value carries their inverses).
        """
        target = self.target(sizes)
        self.assign(value, inverse(target), Reason(None, None, "is divided by the factors"))
        self.run()
        return target

    def target(self, sizes: Sequence[int]) -> Array:
        """New labels, and the ones that count: choices are made to keep them free."""
        self._target = self.labels.fresh(sizes)
        return self._target

    def assign(self, value: Value, layout: Array, reason: Reason) -> None:
        """States the factors of a value; contradictions become factors of one."""
        power = reason.power * (ONCE if reason.before is None else self.powers[reason.before])
        if value in self.layouts and self.powers[value] == power:
            self.labels.merge(self.layouts[value], layout)
        elif value in self.layouts:
            why = f"it would carry the powers {self.powers[value]} and {power} of a factor"
            self.forbid(self.layouts[value], reason.node, why)
            self.forbid(layout, reason.node, why)
        elif not self.labels.is_one(layout) and constant(value) not in _INVARIANT:
            self.layouts[value], self.reasons[value] = layout, reason
            self.powers[value] = power
            blocked = _blocked(value)
            if blocked:
                self.forbid(layout, reason.node, blocked)
            nodes = [*value.users, *([value.producer] if value.producer else [])]
            self._todo.extend(nodes)

    def get(self, value: Value) -> Array | None:
        """The labels of a value, or None where its factor is one."""
        layout = self.layouts.get(value)
        return None if layout is None or self.labels.is_one(layout) else layout

    def forbid(self, layout: Array, node: Node | None, why: str) -> None:
        """Makes all factors of a layout one."""
        before = self.free
        self.labels.merge(layout, ONE)
        if self.free < before:  # a factor that was asked for, and not one of somebody else's
            self.obstacles.append(Obstacle(node, why))

    def choose(self, node: Node, candidates: Sequence[Carrier]) -> None:
        """Leaves open which operand carries the factor; decided when all else has been seen."""
        self._open.setdefault(node, tuple(candidates))

    @property
    def free(self) -> int:
        """How many of the factors asked for are still free."""
        roots = self.labels.find(self._target) >> 1
        return len(np.unique(roots[roots != ONE]))

    def run(self) -> None:
        """Follows all that was asked for to the end."""
        while self._todo or self._open:
            if not self._todo:
                self._decide()
                return
            node = self._todo.popleft()
            if node in self._cut:
                continue
            seen = len(self.obstacles)
            self._rules.get(node.kind, _opaque)(self, node)
            if len(self.obstacles) > seen and self.free <= self._bound:
                return

    def _decide(self) -> None:
        """Tries the candidates of one open choice to the end, and becomes the best of them."""
        node, candidates = next(iter(self._open.items()))
        del self._open[node]
        if node in self.carriers:
            self.run()
            return
        ordered = sorted(candidates, key=lambda i: _distance(node.ins[i]))
        before, bound, best = self.free, self._bound, None
        met: list[Obstacle] = []
        for carrier in ordered:
            trial = self._copy()
            trial.carriers[node] = carrier
            trial._todo.append(node)
            trial._bound = self._bound if best is None else max(self._bound, best.free)
            trial.run()
            met += trial.obstacles[len(self.obstacles) :]
            if best is None or trial.free > best.free:
                best = trial
            if best.free == before:
                break
        assert best is not None
        if not best.free:
            best.obstacles = [*self.obstacles, *met]
        vars(self).update(vars(best))
        self._bound = bound

    def _copy(self) -> Flow:
        other = Flow(self._rules)
        for name, value in vars(self).items():
            copied = value.copy() if hasattr(value, "copy") else value
            setattr(other, name, value if name in ("_rules", "_cut", "_target") else copied)
        return other


Rule = Callable[[Flow, Node], None]

_INVARIANT = (0.0, np.inf, -np.inf)


def constant(value: Value) -> float | None:
    """The number that all elements of a value are known to be, or None."""
    if value.literal is not None:
        return float(value.literal) if np.ndim(value.literal) == 0 else None
    node = value.producer
    moves = (jp.broadcast_in_dim_p, jp.reshape_p, jp.squeeze_p, *SAME, "repeat")
    if node is None or node.kind not in moves:
        return None
    return constant(node.ins[0])


def _blocked(value: Value) -> str:
    """Why a value cannot carry factors whatever happens around it; "" if it may."""
    if not value.is_float:
        return "it holds no floating point numbers"
    if value.is_result:
        return "it is a result of the function"
    if value.is_input:
        return "it is an input of the function that is no parameter"
    if value.producer is None and value.path is None:
        return "it is a constant of the program"
    return ""


def _opaque(flow: Flow, node: Node) -> None:
    """What does not commute with a factor, or is not known to."""
    for value in node.values:
        layout = flow.get(value)
        if layout is not None:
            flow.forbid(layout, node, f"{node.kind} does not commute with a factor per channel")


def _distance(value: Value) -> int:
    """How many operations lie between a value and the nearest parameter it is made of."""
    near, distance, seen = [value], 0, {value}
    while near:
        if any(v.path is not None and v.is_float for v in near):
            return distance
        above: list[Any] = [v for x in near if x.producer for v in x.producer.ins if v.params]
        near = [v for v in dict.fromkeys(above) if v not in seen]
        seen.update(near)
        distance += 1
    return distance + len(seen)
