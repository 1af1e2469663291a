"""`BodyPass`: a pass over a quantized program that edits one body at a time.

What `share_activation_quant`, `elide_roundtrips` and `fuse_siblings` have in common: every body is
visited, innermost first; where nothing changed the program itself is returned.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from jaxquant.passes.edit_jaxpr import edit
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Program


class BodyPass(Pass):
    """Implement `edited`; the rest of `Pass` is here."""

    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`."""
        notes: list[str] = []
        closed = edit(program.jaxpr, lambda jaxpr, _: self.edited(jaxpr, notes))
        if closed is program.jaxpr:
            return PassResult(program)
        return PassResult(program.with_jaxpr(closed), tuple(notes))

    @abc.abstractmethod
    def edited(self, jaxpr: Any, notes: list[str]) -> Any:
        """The open jaxpr after the pass, itself where there is nothing to do; adds notes."""
