"""Cuts: where a rotation needs an explicit operation, and the graph of a program with such cuts.

Behind a cut a value is rotated, or rotated back, by an operation of its own; so what is in front of
it and what is behind it need not rotate alike. Called by `find_turns`; `rotate` inserts the
operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from jax.extend.core import primitives as jp

from jaxquant.passes.channel_graph import Graph, Node, Value
from jaxquant.passes.channel_proof import proof_step
from jaxquant.passes.interpreter import Site
from jaxquant.passes.rotation_flow import Conflict, Turn


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where an explicit rotation goes.

    Attributes:
      kind: "operand" number ``index`` of an equation, its "result", or "input" or "output" number
        ``index`` of the program.
      site: place of the equation; () for inputs and outputs.
      index: see ``kind``.
      back: whether it is rotated back, by the transpose.
      place: the operation, for reports.
    """

    kind: Literal["operand", "result", "input", "output"]
    site: Site
    index: int
    back: bool
    place: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        """What the explicit operation does, and where."""
        what = "rotated back" if self.back else "rotated"
        where = f"{self.kind} {self.index}" if self.kind != "result" else "the result"
        return f"{where} of {self.place or 'the function'} is {what}"


def place_of(node: Node) -> str:
    """Names an operation, for reports."""
    step = proof_step(node, "")
    return f"{step.op} ({step.module}{' ' if step.module else ''}at {step.source})"


def ways_round(conflict: Conflict, turn: Turn, graph: Graph) -> list[Cut]:
    """Explicit operations that may remove an obstacle."""
    value = conflict.value
    if value is not None and value.is_result:
        return [Cut("output", (), i, True) for i, v in enumerate(graph.results) if v is value]
    if value is not None and value.is_input:
        return [Cut("input", (), graph.inputs.index(value), False)]
    return [
        Cut("result", n.site, 0, False, place_of(n))
        for n in graph.nodes
        if n.kind is jp.gather_p and n.outs[0] in turn.spots and n.ins[0].params
    ]


def apply_cuts(graph: Graph, cuts: Iterable[Cut]) -> tuple[Graph, dict[Cut, Value]]:
    """The graph with cuts, and for each the value whose spot is that of the explicit operation."""
    nodes = {n.site: n for n in graph.nodes if not isinstance(n.kind, str)}
    rotated: dict[Cut, Value] = {}
    for cut in cuts:
        if cut.kind == "input":
            value = graph.inputs[cut.index]
            value.is_input, value.explicit = False, "free"
            rotated[cut] = value
        elif cut.kind == "output":
            value = graph.results[cut.index]
            value.is_result = False
            rotated[cut] = value
        elif cut.kind == "result":
            node = nodes[cut.site]
            old = node.outs[0]
            old.producer, old.explicit = None, "free"
            node.outs[0] = dataclasses.replace(old, explicit="fixed", users=[], producer=node)
            rotated[cut] = old
        else:
            node = nodes[cut.site]
            old = node.ins[cut.index]
            new = dataclasses.replace(old, users=[node], producer=None)
            new.explicit = "fixed" if cut.back else "free"
            node.ins[cut.index] = new
            if old not in node.ins:
                old.users.remove(node)
            rotated[cut] = old if cut.back else new
    return graph, rotated
