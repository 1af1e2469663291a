"""How the operations on the way of a factor or a rotation are shown to people.

Called by `channel_flow` and `find_turns`, whose findings print themselves with these lines.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxquant.core.names import innermost_module
from jaxquant.passes.channel_graph import CARRY, EACH, EQUAL, REPEAT, Node


@dataclasses.dataclass(frozen=True)
class ProofStep:
    """One operation on the way of a factor.

    Attributes:
      op: the operation.
      why: why it commutes with the factor.
      module: path of the module it is in, or "".
      source: the user's source line.
    """

    op: str
    why: str
    module: str
    source: str

    def __str__(self) -> str:
        place = " ".join(x for x in (self.module, self.source and f"at {self.source}") if x)
        return f"{self.op}: {self.why}" + (f"   [{place}]" if place else "")


_WORDS: dict[Any, str] = {
    EACH: "scan (a slice for each iteration)",
    REPEAT: "scan (a constant of all iterations)",
    CARRY: "scan (a carried value)",
    EQUAL: "branches or loop",
}


def proof_step(node: Node, why: str) -> ProofStep:
    """An operation, with the argument why it commutes."""
    module = innermost_module(node.names)
    source = node.source.rpartition("/")[2]  # of a long path only the file matters
    op = _WORDS.get(node.kind, str(node.kind))
    return ProofStep(op, why, module[0] if module else "", source)
