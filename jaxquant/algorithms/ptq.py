"""`jq.ptq`: post-training quantization of a whole model.

Trace the float model, find its weights, let the recipe decide, transform the float weights as it
says, calibrate what is static, quantize leaf by leaf. The steps are the passes' and the
algorithms'; this file only puts them in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxquant.algorithms import static_ranges
from jaxquant.algorithms.calibrate import batch_calls, chain
from jaxquant.algorithms.planning import assign, require_quantized
from jaxquant.algorithms.progress import track
from jaxquant.algorithms.rtn import quantize_weight
from jaxquant.algorithms.transforms.apply import (
    explain_transforms,
    refuse_transforms,
    transform_model,
)
from jaxquant.core import placement
from jaxquant.core.names import group_names
from jaxquant.core.qtensor import QTensor, is_qtensor
from jaxquant.core.recipe import Recipe, get_recipe
from jaxquant.frontends import describe
from jaxquant.frontends.adapter import ModelAdapter
from jaxquant.passes.assign_recipe import ParamPlan
from jaxquant.passes.insert_fake_quant import Steps, check_steps, usable_step
from jaxquant.passes.make_plan import make_plan
from jaxquant.passes.plan import Plan


def ptq(
    model: Any,
    *args: Any,
    recipe: str | Recipe | None = None,
    calibration: Iterable[Any] | None = None,
    steps: Steps | None = None,
    progress: bool = True,
    strict: bool = False,
    **kwargs: Any,
) -> Any:
    """Quantizes a model's weights after training.

    Args:
      model: a decorated Flax module instance or function (see `jaxquant.quantize`).
      *args: Linen: the variables, then the model's own arguments as the example to trace.
        Function: its parameters, then its other arguments. NNX: the example arguments only. The
        parameters may be `jax.ShapeDtypeStruct`s: then so are the results, and nothing is
        computed. Where ``calibration`` is given its first batch can be the example.
      recipe: a preset's name or a `Recipe`, in the place of the decorator's.
      calibration: batches for static activation ranges and for `Smooth`: each is an array, a tuple
        of positional arguments or a mapping of keyword arguments. Read once, one batch at a time;
        kept where the recipe has transforms.
      steps: scales that were trained (`jaxquant.qat`): taken as they are, in the place of those
        that the recipe's ranges and the calibration would give.
      progress: show a progress bar on a terminal.
      strict: raise `StrictError`, before anything is computed, where a product of a parameter would
        stay float although no rule skips it, or a weight would be dequantized before use.
      **kwargs: keyword arguments of the model, part of the example and of each batch.

    Returns:
      The variables (parameters, NNX module) with `QTensor`s in the place of the quantized
      weights; everything else is the very object it was, unless a transform of the recipe changed
      it. Sharded weights stay sharded. Peak memory is the float tree, the result, and about one
      layer; transforms hold the weights that they change twice.

    Raises:
      ValueError: a rule matches nothing, no parameter is quantized by a recipe that has rules for
        weights, a group size does not divide, a weight is not finite, a static range or `Smooth`
        lacks calibration, or the tree is quantized already.
      FoldError: the recipe refuses what it cannot fold, or a transform changed the function.
    """
    adapter = describe(model)
    given, args = ((), args) if adapter.kind == "nnx" else (args[:1], args[1:])
    fn, tree = adapter.pure(*given)
    paths = adapter.param_paths(tree)
    leaves, treedef = jax.tree_util.tree_flatten(tree, is_leaf=is_qtensor)
    _refuse_quantized(paths, leaves)
    chosen = adapter.recipe if recipe is None else get_recipe(recipe)
    calls = batch_calls(calibration, kwargs)
    first = next(calls, None)
    if calibration is not None and first is None:
        raise ValueError("calibration holds no batch; give at least one, or leave calibration out")
    example = (args, kwargs) if args or first is None else first
    batches = chain(first, calls)
    program, assignment = assign(fn, tree, paths, example, chosen)
    if not assignment.quantized and any(rule.weight is not None for rule in chosen.rules):
        _refuse_nothing(adapter, make_plan(program, assignment))
    if strict:
        would = explain_transforms(fn, tree, paths, example, assignment)
        require_quantized(make_plan(program, assignment, inputs=would.inputs))
    if steps is not None:
        refuse_transforms(chosen, "ptq(steps=)")
    if chosen.transforms:
        batches = list(batches)  # read more than once
    done = transform_model(fn, tree, paths, example, assignment, batches)
    leaves = jax.tree_util.tree_leaves(done.tree)
    plans = {plan.path: plan for plan in assignment.quantized}
    if steps is None:
        scales = static_ranges.input_scales(done.fn, done.tree, paths, batches, assignment)
    else:
        check_steps(steps, plans)
        scales = {path: own["input"] for path, own in steps.items() if "input" in own}
    firsts = static_ranges.input_groups(program, assignment, scales, done.inputs_alike)
    groups = group_names(firsts)
    trained = {path: own["weight"] for path, own in (steps or {}).items() if "weight" in own}
    todo = [(i, plans[path]) for i, path in enumerate(paths) if path in plans]
    for i, plan in track(todo, "quantizing", show=progress):
        weight = _quantize(leaves[i], plan, trained.get(plan.path))
        leaves[i] = weight.replace(
            input_scale=scales.get(plan.path),
            input_group=groups.get(plan.path),
            op_rules=assignment.op_rules,
            contracted=plan.contracted,
            act_ops=plan.act_ops,
            **done.inputs.get(plan.path, {}),
        ).validate(plan.path)
    return adapter.with_tree(jax.tree_util.tree_unflatten(treedef, leaves))


def _refuse_nothing(adapter: ModelAdapter, plan: Plan) -> None:
    """Refuses a plan under which every parameter stays float: most likely not what was meant."""
    params = {row.param: row.reason for row in plan.rows if row.param is not None}
    reasons = "; ".join(f"{path or 'the tree itself'} {why}" for path, why in [*params.items()][:3])
    first = " (a function's parameters are its first argument)"
    raise ValueError(
        f"recipe {plan.recipe!r} quantizes none of the {len(params)} parameters of {adapter.name}"
        f"{first if adapter.kind == 'function' else ''}; jaxquant.explain gives every reason"
        + (f", e.g. {reasons}" if reasons else "")
    )


def _refuse_quantized(paths: Sequence[str | None], leaves: Sequence[Any]) -> None:
    done = [path for path, leaf in zip(paths, leaves, strict=True) if is_qtensor(leaf)]
    if done:
        raise ValueError(
            f"{done[0]!r} is a QTensor already ({len(done)} in all): ptq takes the float tree"
        )


def _quantize(leaf: Any, plan: ParamPlan, step: Any) -> QTensor:
    """Quantizes one leaf, or says what it would become where only its shape is known."""
    assert plan.scheme is not None and plan.block_shape is not None, plan.path
    weight = quantize_weight(
        leaf,
        plan.scheme,
        plan.block_shape,
        packed_axis=plan.packed_axis,
        stack_axes=plan.stack_axes,
        act=plan.act,
        scale=None if step is None else usable_step(step, plan.scheme),
        name=plan.path,
    )
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.block_until_ready(weight)  # one leaf at a time: bounds the peak memory
    if not isinstance(leaf.sharding, NamedSharding):
        return weight
    return placement.placed_structs(weight, leaf.sharding)
