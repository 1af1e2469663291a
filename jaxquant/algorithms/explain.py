"""`jq.explain`: what a recipe would make of a model, before anything is spent.

Traces the float model on shapes, applies the recipe and runs the rewriter on avals. No weight is
read and no device memory is used, so a model may be explained from `jax.eval_shape` of its init.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxquant.algorithms.planning import assign, require_quantized, stored_plan
from jaxquant.algorithms.transforms.apply import explain_transforms
from jaxquant.core.primitives.kernels import planned_for
from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.recipe import Recipe, get_recipe
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.marks import recipe_of
from jaxquant.pallas_kernels.dispatch import Place
from jaxquant.passes.insert_observers import Observation, check_rules
from jaxquant.passes.make_plan import make_plan
from jaxquant.passes.observe_rules import observe_rules
from jaxquant.passes.plan import Plan
from jaxquant.passes.program import trace


def explain(
    model: Any,
    *args: Any,
    recipe: str | Recipe | None = None,
    strict: bool = False,
    observers: Any = None,
    place: Place | None = None,
    **kwargs: Any,
) -> Plan:
    """The plan for a model: for every operation what it will be, and why.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      *args: Linen: the variables, then the model's own arguments as the example to trace.
        Function: its parameters, then its other arguments. NNX: the example arguments only.
        Arrays and `jax.ShapeDtypeStruct`s may be mixed.
      recipe: a preset's name or a `Recipe`. When None, the decorator's; without one, "w8a8". A
        quantized tree says itself how it runs: give none with it.
      strict: raise `StrictError` where a product of a parameter would stay float although no rule
        skips it, or a weight would be dequantized before use.
      observers: what `jaxquant.calibrate` would collect (its ``statistics``): the plan then says
        what that takes on the device, to the byte. None for nothing.
      place: where the program will run, e.g. `jaxquant.Place("cuda", "NVIDIA H200")`: the plan
        then names the kernels there, on any machine. None for one device of the default kind.
      **kwargs: keyword arguments of the model, such as ``rngs``, ``mutable``, ``train``.

    Returns:
      The `Plan`: print it, or take its ``rows``, ``totals`` and ``to_json()``.

    Raises:
      ValueError: an unknown preset, a rule that matches nothing, or a group size that does not
        divide (the message says what would do); a recipe for a tree that is quantized already.
    """
    if recipe is not None:
        recipe = get_recipe(recipe)
    if recipe_of(model) is None:
        model = quantize(recipe)(model)
    with planned_for(place):
        return _plan(model, args, kwargs, recipe, strict, observers)


def _plan(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recipe: Recipe | None,
    strict: bool,
    observers: Any,
) -> Plan:
    adapter = describe(model)
    given, rest = ((), args) if adapter.kind == "nnx" else (args[:1], args[1:])
    fn, tree = adapter.pure(*given)
    paths = adapter.param_paths(tree)
    if any(map(is_qtensor, jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor))):
        if recipe is not None:
            raise ValueError(
                "recipe: the tree is quantized already; leave recipe out to see how it runs, or "
                "give the float tree"
            )
        program = trace(fn, tree, rest, kwargs, paths)
        plan = stored_plan(program, program.flatten(tree, *rest, **kwargs), adapter.notes)
    else:
        program, assignment = assign(fn, tree, paths, (rest, kwargs), recipe or adapter.recipe)
        done = explain_transforms(fn, tree, paths, (rest, kwargs), assignment)
        plan = make_plan(program, assignment, adapter.notes, inputs=done.inputs)
        plan = dataclasses.replace(plan, transforms=done.rows)
    if strict:
        require_quantized(plan)
    if observers is not None:
        rules = observe_rules(observers)
        observation = Observation(program, rules)
        check_rules(rules, observation.met)
        plan = dataclasses.replace(plan, observers=observation.sizes())
    return plan
