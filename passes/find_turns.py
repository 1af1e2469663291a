"""`find_turns`: the residual stream and everything else of a program that can be rotated.

Starts `rotation_flow` searches where they may lead somewhere: at sums that join two values (the
residual stream), at what attention mixes (features of the value heads), and, if explicit operations
are allowed, at the inputs of weights. Where a search fails and explicit operations are allowed, the
program is cut at the obstacle: behind a cut a value is rotated, or rotated back, by an operation of
its own. Called by `rotate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jax.extend.core import primitives as jp

from jaxquant.core.rotations import largest_hadamard
from jaxquant.passes import rotation_rules as rotation_rules  # enters its rules
from jaxquant.passes.channel_flow import ChannelGroup, parameter_group, weight_side
from jaxquant.passes.channel_graph import Graph, Node, Value, build_graph
from jaxquant.passes.channel_products import contracted_axes, product_names
from jaxquant.passes.channel_proof import ProofStep, proof_step
from jaxquant.passes.interpreter import Site
from jaxquant.passes.program import Program
from jaxquant.passes.rotation_flow import Conflict, Spot, Turn
from jaxquant.passes.turn_cuts import Cut, apply_cuts, place_of, ways_round

_MOST_CUTS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class FoundTurn:
    """A rotation that leaves the function as it is.

    Attributes:
      role: "stream", "heads", or "input" of weights.
      size: size of the matrix.
      absorbed: for each parameter to multiply: its path, where, and the operations on the way.
      gains: norm gains that have to be one first, and what takes them.
      explicit: explicit operations, and where their operands are rotated.
      fixes_ones: whether the matrix must leave the vector of ones as it is.
      joins: how many sums join it.
      readers: products that contract a rotated axis.
    """

    role: Literal["stream", "heads", "input"]
    size: int
    absorbed: tuple[tuple[str, Spot, tuple[ProofStep, ...]], ...]
    gains: tuple[tuple[str, ChannelGroup], ...]
    explicit: tuple[tuple[Cut, Spot], ...]
    fixes_ones: bool
    joins: int
    readers: frozenset[Site]

    def proof(self) -> str:
        """What absorbs the matrix and how it gets there, as text."""
        what = {
            "stream": f"residual stream of {self.size} channels, joined by {self.joins} sums",
            "heads": f"heads of {self.size} features",
            "input": f"input of {self.size} channels",
        }[self.role]
        lines = [what + (" (the matrix keeps the ones vector)" if self.fixes_ones else "")]
        for path, group in self.gains:
            lines.append(f"  {path} becomes one, folded into {', '.join(group.consumers)}")
        for path, spot, steps in self.absorbed:
            lines.append(f"  {path} is rotated along axis {spot.dim}")
            lines += [f"    {step}" for step in steps]
        lines += [f"  explicit: {cut}" for cut, _ in self.explicit]
        return "\n".join(lines)


def find_turns(
    program: Program,
    *,
    stream: bool,
    heads: bool,
    online: bool,
    inputs: frozenset[str] | None = None,
    fixed: frozenset[str] = frozenset(),
) -> tuple[tuple[FoundTurn, ...], tuple[str, ...]]:
    """All rotations of a float program.

    Args:
      program: the program.
      stream: look for residual streams.
      heads: look for features that attention passes on.
      online: allow explicit operations, and rotate the inputs of all other weights by them.
      inputs: paths of weights whose inputs may be rotated explicitly, in runs of sizes of which
        there is a Hadamard matrix; nothing else is explicit then. None for what ``online`` says.
      fixed: paths of parameters that must not change.

    Returns:
      The rotations, and one sentence for each thing that could not be rotated.
    """
    finder = _Finder(program, online, inputs, fixed)
    if stream:
        finder.streams()
    if heads:
        finder.heads()
    if online or inputs:
        finder.inputs()
    return tuple(finder.found), tuple(finder.notes)


class _Finder:
    def __init__(
        self, program: Program, online: bool, inputs: frozenset[str] | None, fixed: frozenset[str]
    ) -> None:
        self.found: list[FoundTurn] = []
        self.notes: list[str] = []
        self._program, self._online, self._inputs, self._fixed = program, online, inputs, fixed
        self._graph = build_graph(program)

    def streams(self) -> None:
        seen: set[Site] = set()
        furthest: tuple[int, str] = (-1, "no sum joins two values that depend on the input")
        for node in self._graph.nodes:
            joins = node.kind in (jp.add_p, jp.add_jaxvals_p)
            if not joins or node.site in seen or not all(_joinable(v) for v in node.ins):
                continue
            out = node.outs[0]
            if not out.shape or out.shape[-1] < 2:
                continue
            spot = Spot(len(out.shape) - 1, out.shape[-1])
            turn, found, why = self._search(node.site, spot, self._online)
            seen |= {n.site for v in turn.spots for n in (v.producer, *v.users) if n is not None}
            if found is not None:
                self.found.append(found)
            elif len(turn.spots) > furthest[0]:
                furthest = len(turn.spots), why
        if not any(f.role == "stream" for f in self.found):
            self.notes.append(f"no residual stream can be rotated: {furthest[1]}")

    def heads(self) -> None:
        taken = {r for f in self.found for r in f.readers}
        for node in self._graph.nodes:
            names = product_names(node)
            if names is None or not all(_joinable(v) for v in node.ins[:2]):
                continue
            for side in (0, 1):
                free = [d for d, n in enumerate(names[side]) if n not in names[1 - side]]
                for dim in free:
                    value = node.ins[side]
                    if value.shape[dim] < 2 or taken & {n.site for n in value.users}:
                        continue
                    try:
                        spot = Spot(dim, value.shape[dim])
                        turn = Turn().run([(value, spot)])
                    except Conflict:
                        continue
                    found = self._found("heads", spot.size, self._graph, turn, (), {})
                    if len(found.absorbed) > 1 and not turn.gains and not self._stuck(found):
                        self.found.append(found)
                        taken |= found.readers

    def inputs(self) -> None:
        done = {r for f in self.found for r in f.readers}
        for node in self._graph.nodes:
            side = weight_side(node)
            if side is None or node.site in done or not self._may_be_explicit(node, side):
                continue
            value = node.ins[1 - side]
            dims = contracted_axes(node, 1 - side)
            if not dims:
                continue
            dim = max(dims, key=lambda d: value.shape[d])
            readers = [
                n for n in value.users
                if n.site not in done and dim in _contracted(n, value)
                and self._may_be_explicit(n, 1 - n.ins.index(value))
            ]  # fmt: skip
            done |= {n.site for n in readers}
            channels = value.shape[dim]
            size = channels if self._inputs is None else largest_hadamard(channels)
            if size < 2:
                why = f"no Hadamard matrix fits {channels} channels"
                self.notes.append(f"{_names(node, side)}: its input is not rotated: {why}")
                continue
            cuts = [
                Cut("operand", n.site, n.ins.index(value), False, place_of(n)) for n in readers
            ]
            graph, behind = apply_cuts(build_graph(self._program), cuts)
            spot = Spot(dim, size)
            turn = Turn()
            try:
                turn.run([(behind[c], spot) for c in cuts])
            except Conflict as why:
                self.notes.append(f"{_names(node, side)}: its input is not rotated: {why}")
                continue
            found = self._found("input", spot.size, graph, turn, cuts, behind)
            stuck = "there is a gain on the way" if turn.gains else self._stuck(found)
            if stuck:
                self.notes.append(f"{_names(node, side)}: its input is not rotated: {stuck}")
                continue
            self.found.append(found)

    def _may_be_explicit(self, node: Node, side: int) -> bool:
        return self._inputs is None or node.ins[side].params <= self._inputs

    def _search(
        self, site: Site, spot: Spot, online: bool
    ) -> tuple[Turn, FoundTurn | None, str]:
        """One search; with ``online`` repeated with cuts until there is no obstacle."""
        cuts: list[Cut] = []
        while True:
            fresh = build_graph(self._program) if cuts else self._graph
            graph, behind = apply_cuts(fresh, cuts)
            start = next(n for n in graph.nodes if n.site == site).outs[0]
            turn = Turn()
            more: list[Cut]
            try:
                turn.run([(start, spot)])
                gains, stuck = self._gains(turn)
                why = "; ".join(f"the gain {p} cannot be folded: {w}" for _, p, w in stuck)
                more = [
                    Cut("operand", n.site, turn.gains[n][0], True, place_of(n)) for n, _, _ in stuck
                ]
            except Conflict as conflict:
                gains, why = {}, str(conflict)
                more = ways_round(conflict, turn, graph)
            new = [c for c in more if c not in cuts]
            if not why:
                found = self._found("stream", spot.size, graph, turn, cuts, behind, gains)
                good = bool(turn.joins) and bool(found.absorbed or found.explicit)
                obstacle = self._stuck(found) if good else "nothing absorbs it"
                return turn, None if obstacle else found, obstacle
            if not online or not new or len(cuts) > _MOST_CUTS:
                return turn, None, why
            cuts += new

    def _gains(
        self, turn: Turn
    ) -> tuple[dict[str, ChannelGroup], list[tuple[Node, str, str]]]:
        """Gains that can be made one, and products with others, with the reasons."""
        good: dict[str, ChannelGroup] = {}
        stuck: list[tuple[Node, str, str]] = []
        for node, (_, gain) in turn.gains.items():
            path = next(iter(gain.params))
            group = parameter_group(self._graph, path)
            if len(gain.params) == 1 and group.count == group.channels.size:
                good[path] = group
            else:
                stuck.append((node, path, "; ".join(group.obstacles) or "it is shared"))
        return good, stuck

    def _found(
        self,
        role: Literal["stream", "heads", "input"],
        size: int,
        graph: Graph,
        turn: Turn,
        cuts: Sequence[Cut],
        behind: dict[Cut, Value],
        gains: dict[str, ChannelGroup] | None = None,
    ) -> FoundTurn:
        return FoundTurn(
            role=role,
            size=size,
            absorbed=tuple(
                (path, turn.spots[value], _steps(turn, value))
                for path, value in graph.params.items()
                if value in turn.spots
            ),
            gains=tuple((gains or {}).items()),
            explicit=tuple((c, turn.spots[behind[c]]) for c in cuts if behind[c] in turn.spots),
            fixes_ones=turn.fixes_ones,
            joins=len(turn.joins),
            readers=frozenset(n.site for n in graph.nodes if _reads(turn, n)),
        )

    def _stuck(self, found: FoundTurn) -> str:
        """Why a rotation cannot be beside those before it, or ""."""
        taken = {(path, spot.dim) for f in self.found for path, spot, _ in f.absorbed}
        twice = [path for path, spot, _ in found.absorbed if (path, spot.dim) in taken]
        if twice:
            return f"{twice[0]} is rotated already"
        changed = {path for path, _, _ in found.absorbed}
        for path, group in found.gains:
            changed |= {path, *group.consumers, *(a.path for a in group.producers)}
        kept = sorted(changed & self._fixed)
        return f"{kept[0]} is to stay as it is" if kept else ""


def _joinable(value: Value) -> bool:
    return value.is_float and value.from_input


def _contracted(node: Node, value: Value) -> tuple[int, ...]:
    """The axes of an input that a product with a weight sums over; none of any other operation."""
    return () if weight_side(node) is None else tuple(contracted_axes(node, node.ins.index(value)))


def _reads(turn: Turn, node: Node) -> bool:
    """Whether a product contracts an axis that is rotated."""
    for side, value in enumerate(node.ins[:2]):
        spot = turn.get(value)
        if spot is not None and spot.dim in contracted_axes(node, side):
            return True
    return False


def _names(node: Node, side: int) -> str:
    return ", ".join(sorted(node.ins[side].params))


_WHY: dict[Any, str] = {
    jp.add_p: "the sum of rotated values is the rotated sum",
    jp.sub_p: "nothing, or the same for all channels, is taken from a rotated value",
    jp.mul_p: "all channels are multiplied alike (or by a gain that is made one)",
    jp.div_p: "all channels are divided alike",
    jp.dot_general_p: "is linear: the matrix passes from a weight to the value, or back",
    jp.gather_p: "looks up whole rows",
}


def _steps(turn: Turn, value: Value) -> tuple[ProofStep, ...]:
    steps = []
    at: Value | None = value
    while at is not None:
        node, at = turn.before[at]
        if node is not None:
            steps.append(proof_step(node, _WHY.get(node.kind, "keeps the rotated axis together")))
    return tuple(steps)
