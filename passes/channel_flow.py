"""`find_channel_groups`: who can absorb a factor per channel, found by dataflow and proved.

SmoothQuant, AWQ and rotations multiply the input channels of some weights by factors and divide
whatever feeds them. Which norm, linear or bias that is, torch libraries write down by hand for each
architecture. Here every group of products that contract the same input is asked in turn: let that
input be divided by unknown factors; which other values of the program must then carry which
factors, for the function to stay the same? The rules of `channel_rules` answer for each operation.
What is left at the end are parameters. A norm's gain, the columns of a preceding kernel, the heads
of a value projection all come out of the same few rules, and so does what is impossible.

Called by `fold_transforms` and `jaxquant.smooth`. Nothing is executed and no name is looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from jaxquant.core import _compat
from jaxquant.passes import channel_elementwise as channel_elementwise  # enters its rules
from jaxquant.passes import channel_structure as channel_structure  # enters its rules
from jaxquant.passes.channel_graph import Graph, Node, Value, build_graph
from jaxquant.passes.channel_labels import Array
from jaxquant.passes.channel_moves import project
from jaxquant.passes.channel_products import contracted_axes, product_names, shared_axes
from jaxquant.passes.channel_proof import ProofStep, proof_step
from jaxquant.passes.channel_rules import RULES
from jaxquant.passes.channel_solver import CONTRACT, ONCE, SAME, Flow, Obstacle, Reason
from jaxquant.passes.interpreter import Site
from jaxquant.passes.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Absorber:
    """A parameter that takes factors of a group.

    Attributes:
      path: its path.
      factors: int array of the parameter's rank whose axes are the parameter's or of size one: c
        where the element is multiplied by factor number c, -c where it is divided by it, 0 where
        it stays.
      steps: the operations between the parameter and the group's input, in that order.
      power: the power of the factor that it is: 1/2 in front of a square.
    """

    path: str
    factors: Array
    steps: tuple[ProofStep, ...]
    power: Fraction = ONCE


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Products that contract one input, and the parameters that can scale its channels.

    Attributes:
      consumers: paths of the weights whose channels are multiplied.
      readers: sites of the products that read the input itself.
      channels: int array of factor numbers, 0 for a channel that must keep the factor one. Axes:
        one for each scan around the products, then those of the input; size one where the factor
        does not depend on them.
      count: how many independent factors there are, numbered from 1.
      producers: the parameters that are divided (and any others on the way).
      weights: what becomes of the consumers.
      obstacles: why channels must keep the factor one; empty if none must.
      explicit: for a group that cannot be folded: the same with an explicit division of the input
        in front of the readers, so that only the weights absorb; None if that is impossible too,
        or not needed.
      signed: whether factors may be negative: nothing on the way asks for a sign.
    """

    consumers: tuple[str, ...]
    readers: tuple[Site, ...]
    channels: Array
    count: int
    producers: tuple[Absorber, ...]
    weights: tuple[Absorber, ...]
    obstacles: tuple[str, ...]
    explicit: ChannelGroup | None = None
    signed: bool = False

    @property
    def foldable(self) -> bool:
        """Whether parameters can absorb a factor of at least one channel."""
        return self.count > 0

    @property
    def name(self) -> str:
        """What errors and reports call the group: its first weight, and how many more."""
        more = len(self.consumers) - 1
        return self.consumers[0] + (f" (+{more})" if more else "")

    def proof(self) -> str:
        """The ways of the factors as text, one paragraph a producer."""
        width = int(np.prod(self.channels.shape))
        free = int(np.count_nonzero(self.channels))
        lines = [f"{', '.join(self.consumers)}: {width} channels"]
        if not self.foldable:
            return "\n".join([*lines, *(f"  not foldable: {why}" for why in self.obstacles)])
        shared = "" if free == self.count else f", {self.count} independent factors"
        fixed = "" if free == width else f", {width - free} must keep factor 1"
        lines[0] += shared + fixed
        for verb, absorbers in (("divided", self.producers), ("multiplied", self.weights)):
            for absorber in absorbers:
                by = "" if absorber.power == 1 else f" by the power {absorber.power} of the factors"
                lines.append(f"  {absorber.path} {_axes(absorber)} is {verb}{by}")
                lines += [f"    {step}" for step in absorber.steps]
        lines += [f"  factor 1: {why}" for why in self.obstacles]
        return "\n".join(lines)


def _axes(absorber: Absorber) -> str:
    shape = absorber.factors.shape
    return "[" + ", ".join(":" if n == 1 else f"channels({n})" for n in shape) + "]"


def find_channel_groups(program: Program) -> tuple[ChannelGroup, ...]:
    """The groups of products of parameters that contract one input, in the program's order.

    Args:
      program: a float program.

    Returns:
      One group for each input; those that cannot be folded too, with the reasons. The factors of a
      product in the body of a scan are those of all iterations. What follows from a factor may
      reach further products (a kernel that is used twice): these are in the same group.
    """
    graph = build_graph(program)
    groups: list[ChannelGroup] = []
    seen: set[Node] = set()
    for node in graph.nodes:
        side = weight_side(node)
        if side is None or node in seen or not contracted_axes(node, 1 - side):
            continue
        group, members = _solve(graph, node, side)
        seen |= members
        if group is not None:
            groups.append(group)
    return tuple(groups)


def unseen_weights(program: Program) -> dict[str, str]:
    """Parameters whose products are not looked at, and why.

    In the body of a `shard_map` a value is one device's part: a factor would be that of a channel
    on some devices only, and what the body's collectives exchange would have to be proved too. The
    parameters are the same without it, so they can be folded there.
    """
    why = (
        "it is read inside shard_map, where each device has a part of the channels; fold the same "
        "function without shard_map: its parameters serve both"
    )
    nodes = (n for n in build_graph(program).nodes if n.kind is _compat.shard_map_p)
    return {path: why for node in nodes for value in node.ins for path in sorted(value.params)}


def parameter_group(graph: Graph, path: str) -> ChannelGroup:
    """The group in which a parameter is divided by factors, one for each of its elements.

    Used to make a norm's gain one: its `channels` have the parameter's shape.
    """
    flow = Flow(RULES)
    value = graph.params[path]
    target = flow.solve(value, value.shape)
    members = {n for n, carrier in flow.carriers.items() if carrier == CONTRACT}
    return _group(graph, flow, target, set(), members)


def weight_side(node: Node) -> int | None:
    """Which operand of a product is made of parameters alone."""
    if product_names(node) is None or not all(v.is_float for v in node.ins[:2]):
        return None
    sides = [
        i for i in (0, 1)
        if node.ins[i].params and not node.ins[i].from_input and node.ins[1 - i].from_input
    ]  # fmt: skip
    return sides[0] if sides else None


def _solve(graph: Graph, node: Node, side: int) -> tuple[ChannelGroup | None, set[Node]]:
    value = node.ins[1 - side]
    dims = contracted_axes(node, 1 - side)
    shared = shared_axes(node, 1 - side)  # the contracted axes, and batch axes: of experts
    sizes = [n if d in shared else 1 for d, n in enumerate(value.shape)]
    if all(value.shape[d] == 1 for d in dims):
        return None, {node}
    while value.producer is not None and value.producer.kind in SAME:
        value = value.producer.ins[0]
    flow = Flow(RULES)
    target = flow.solve(value, (*value.loops, *sizes))
    readers = _readers(value, dims)
    members = readers | {n for n, carrier in flow.carriers.items() if carrier == CONTRACT}
    group = _group(graph, flow, target, readers, members)
    if not group.foldable:
        alone = Flow(RULES, cut=readers)
        weights = _operands(alone, readers, value.loops, sizes)
        explicit = _group(graph, alone, weights, readers, readers)
        group = dataclasses.replace(group, explicit=explicit if explicit.foldable else None)
    return group, members


def _operands(
    flow: Flow, readers: Sequence[Node] | set[Node], loops: Sequence[int], sizes: Sequence[int]
) -> Array:
    """Asks that the weights of some products be multiplied by factors, and nothing else."""
    target = flow.target((*loops, *sizes))
    for node in readers:
        side, names = weight_side(node), product_names(node)
        assert side is not None and names is not None
        shared = [n for n in names[0] if n in names[1]]
        there = project(
            flow.labels, target, len(loops), names[1 - side], names[side], keep=shared
        )
        flow.assign(node.ins[side], there, Reason(node, None, "is multiplied by the factors"))
    flow.run()
    return target


def _group(
    graph: Graph, flow: Flow, target: Array, readers: set[Node], members: set[Node]
) -> ChannelGroup:
    products = [n for n in graph.nodes if n in members and weight_side(n) is not None]
    numbers = _Numbers(flow, target)
    consumers = tuple(dict.fromkeys(path for n in products for path in sorted(_weights_of(n))))
    absorbers = {}
    for path, value in graph.params.items():
        factors = numbers.of(flow.layouts.get(value, np.zeros(1, np.int64)))
        if factors.any():
            steps = _steps(flow, value)
            absorbers[path] = Absorber(path, factors, steps, flow.powers[value])
    return ChannelGroup(
        consumers=consumers,
        readers=tuple(n.site for n in graph.nodes if n in readers),
        channels=numbers.of(target),
        count=numbers.count,
        producers=tuple(a for path, a in absorbers.items() if path not in consumers),
        weights=tuple(absorbers[path] for path in consumers if path in absorbers),
        obstacles=_obstacles(flow, numbers.count),
        signed=not flow.positive,
    )


def _readers(value: Value, dims: Sequence[int]) -> set[Node]:
    """Products with a weight that contract these dimensions of a value, as it is or converted."""
    found = set()
    for node in value.users:
        side = weight_side(node)
        if node.kind in SAME:
            found |= _readers(node.outs[0], dims)
        elif side is not None and value is node.ins[1 - side]:
            found |= {node} if set(contracted_axes(node, 1 - side)) == set(dims) else set()
    return found


def _weights_of(node: Node) -> frozenset[str]:
    side = weight_side(node)
    return frozenset() if side is None else node.ins[side].params


class _Numbers:
    """Numbers the free factors of a group from 1, in the order of its channels."""

    def __init__(self, flow: Flow, target: Array) -> None:
        self._flow = flow
        roots = flow.labels.find(target).ravel()
        _, first = np.unique(roots >> 1, return_index=True)
        ordered = [int(roots[i]) for i in np.sort(first) if roots[i] > 1]
        self.count = len(ordered)
        size = max([1, *(r | 1 for r in ordered)]) + 1
        self._number = np.zeros(size, np.int64)
        for number, root in enumerate(ordered, 1):
            self._number[root], self._number[root ^ 1] = number, -number

    def of(self, layout: Array) -> Array:
        """Signed numbers of the labels' factors; 0 where it is one."""
        roots = self._flow.labels.find(layout)
        known = roots < len(self._number)
        return np.where(known, self._number[np.where(known, roots, 0)], 0)


def _steps(flow: Flow, value: Value) -> tuple[ProofStep, ...]:
    """From a parameter to the group's input."""
    steps = []
    at: Value | None = value
    while at is not None:
        reason = flow.reasons[at]
        if reason.node is not None:
            steps.append(proof_step(reason.node, reason.why))
        at = reason.before
    return tuple(steps)


def _obstacles(flow: Flow, count: int) -> tuple[str, ...]:
    told = tuple(dict.fromkeys(map(_told, flow.obstacles)))
    if not told and not count:
        shared = tuple(dict.fromkeys(map(_told, flow.sharing)))
        told = (*shared, "what the operations ask for leaves no factors but one")
    return told


def _told(obstacle: Obstacle) -> str:
    if obstacle.node is None:
        return obstacle.why
    step = proof_step(obstacle.node, obstacle.why)
    return str(step)


