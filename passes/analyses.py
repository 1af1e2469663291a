"""`FindWeights` and `AssignRecipe`: the two analyses, as passes that leave the jaxpr alone.

They put what they find into the program's facts, where the passes after them read it. The work is
in `find_weights` and `assign_recipe`. Called by `explain`, `ptq` and whoever builds a pipeline.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxquant.core.recipe import Recipe
from jaxquant.passes.assign_recipe import assign_recipe
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Program


@dataclasses.dataclass(frozen=True)
class FindWeights(Pass):
    """Fact "uses": which parameter meets which operation (a tuple of `OpUse`)."""

    name: ClassVar[str] = "find_weights"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    ensures: ClassVar[frozenset[str]] = frozenset({"uses"})

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`."""
        uses = find_weights(program)
        notes = tuple(f"{use.param}: {use.kind} {use.module or ''}".rstrip() for use in uses)
        return PassResult(program.with_facts(uses=uses), notes)


@dataclasses.dataclass(frozen=True)
class AssignRecipe(Pass):
    """Fact "assignment": what becomes of each parameter, and why (an `Assignment`).

    Attributes:
      recipe: the recipe; its first rule that matches an operation decides.
    """

    recipe: Recipe

    name: ClassVar[str] = "assign_recipe"
    requires: ClassVar[frozenset[str]] = frozenset({"float", "uses"})
    ensures: ClassVar[frozenset[str]] = frozenset({"assignment"})

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`.

        Raises:
          ValueError: a rule matches nothing, or a group size does not divide.
        """
        assignment = assign_recipe(program.facts["uses"], program.parameters, self.recipe)
        notes = tuple(
            f"{plan.path}: {plan.scheme or f'float, {plan.reason}'}"
            for plan in assignment.params.values()
        )
        return PassResult(program.with_facts(assignment=assignment), notes)
