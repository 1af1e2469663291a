"""From a float function and a recipe to what becomes of each parameter.

The steps that `explain` and `ptq` share: trace, find the weights, let the recipe decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.recipe import Recipe
from jaxquant.passes.analyses import AssignRecipe, FindWeights
from jaxquant.passes.assign_recipe import Assignment
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.make_plan import make_plan
from jaxquant.passes.pass_manager import PassManager
from jaxquant.passes.plan import Plan, PlanRow
from jaxquant.passes.program import Program, trace
from jaxquant.passes.rewrite import StrictError
from jaxquant.passes.stored_scheme import stored_assignment

Example = tuple[Sequence[Any], Mapping[str, Any]]


def assign(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    example: Example,
    recipe: Recipe,
) -> tuple[Program, Assignment]:
    """Traces ``fn(tree, *args, **kwargs)`` and applies the recipe; computes nothing.

    Args:
      fn: the float function.
      tree: its parameters and other state: arrays or `jax.ShapeDtypeStruct`s.
      paths: for each leaf of ``tree`` its parameter path, or None.
      example: positional and keyword arguments to trace with.
      recipe: the recipe.

    Raises:
      ValueError: a rule matches nothing, or a group size does not divide.
    """
    args, kwargs = example
    program = trace(fn, tree, args, kwargs, paths)
    program = PassManager([FindWeights(), AssignRecipe(recipe)], title=recipe.name).run(program)
    return program, program.facts["assignment"]


def stored_plan(program: Program, arguments: Sequence[Any], notes: Sequence[str] = ()) -> Plan:
    """The plan of a call whose weights are quantized already.

    Args:
      program: the float program of the call.
      arguments: what ``program.flatten`` gives for it.
      notes: remarks that the plan should carry.
    """
    weights = {
        known.path: value
        for known, value in zip(program.inputs, arguments, strict=True)
        if known.path is not None and is_qtensor(value)
    }
    abstract = {path: jax.tree.map(_struct, weight) for path, weight in weights.items()}
    assignment = stored_assignment(find_weights(program), program.parameters, abstract)
    return make_plan(program, assignment, notes, abstract)


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def require_quantized(plan: Plan) -> None:
    """Refuses a plan that leaves work in float which no rule skips: ``strict=True``.

    Raises:
      StrictError: some product of a parameter stays float without a rule that skips it, or some
        weight is dequantized before it is used. All of them are listed with their reasons.
    """
    loose = [row for row in plan.rows if _is_loose(row)]
    if loose:
        lines = [f"  {row.param} ({row.kind}): {row.status}: {row.reason}" for row in loose]
        raise StrictError(
            f"strict=True: under recipe {plan.recipe!r} {len(loose)} operations would not run "
            "quantized; name them in a rule with skip=True to leave them float:\n"
            + "\n".join(lines)
        )


def _is_loose(row: PlanRow) -> bool:
    if row.param is None or row.status == "quantized":
        return False
    return row.status == "dequantized" or (row.kind != "other" and "skip=True" not in row.rule)
