"""From a float function and a recipe to what becomes of each parameter.

The steps that `explain` and `ptq` share: trace, find the weights, let the recipe decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxquant.core.recipe import Recipe
from jaxquant.passes.assign_recipe import Assignment, ParamPlan, assign_recipe
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.program import Program, trace

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
    return program, assign_recipe(find_weights(program), program.parameters, recipe)


def plan_parameters(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    example: Example,
    recipe: Recipe,
) -> list[ParamPlan]:
    """The plans of the parameters that are to be quantized; see `assign`."""
    _, assignment = assign(fn, tree, paths, example, recipe)
    return assignment.quantized
