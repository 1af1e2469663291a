"""The assignment that a quantized tree amounts to: what was decided about each parameter.

A tree of `QTensor`s says itself how it runs; no recipe is needed. For plans of such trees the
schemes are read off the stored arrays. Called by `explain` and `compile`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxquant.core.qtensor import QTensor
from jaxquant.core.recipe import Recipe, Rule
from jaxquant.core.schemes import WeightScheme
from jaxquant.passes.assign_recipe import Assignment, ParamPlan
from jaxquant.passes.op_use import OpUse


def stored_assignment(
    uses: Sequence[OpUse], parameters: Mapping[str, Any], weights: Mapping[str, QTensor]
) -> Assignment:
    """What a quantized tree decides, in the form in which a recipe decides it.

    Args:
      uses: from `find_weights` on the float program.
      parameters: path to abstract value, as `Program.parameters`.
      weights: the parameters that are quantized, by path.
    """
    rules = tuple(dict.fromkeys(r for w in weights.values() for r in w.op_rules))
    plans = {
        path: _plan(path, aval, [use for use in uses if use.param == path], weights.get(path))
        for path, aval in parameters.items()
    }
    matching = tuple(_attention_rule(use, rules) for use in uses)
    return Assignment(Recipe("as stored", rules), tuple(uses), matching, plans, rules)


def _plan(path: str, aval: Any, uses: Sequence[OpUse], weight: QTensor | None) -> ParamPlan:
    plan = ParamPlan(path, tuple(aval.shape), aval.dtype, tuple(uses))
    if weight is None:
        return dataclasses.replace(plan, reason="a float array in this tree")
    layers, summed = _axes(uses)
    return dataclasses.replace(
        plan,
        scheme=_scheme(weight, layers, summed),
        act=weight.act,
        act_ops=weight.act_ops,
        block_shape=weight.block_shape,
        packed_axis=weight.packed_axis,
        layer_axes=layers,
    )


def _axes(uses: Sequence[OpUse]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes that number layers, and axes that the first product (else the first use) sums over."""
    known = [use for use in uses if use.axes]
    use = next((use for use in known if use.contracts), known[0] if known else None)
    if use is None:
        return (), ()
    layers = tuple(axis.axis for axis in use.axes if axis.is_layer)
    return layers, use.with_role("contract")


def _scheme(weight: QTensor, layers: Sequence[int], summed: Sequence[int]) -> WeightScheme:
    """The scheme a weight is stored in; how its ranges were chosen is not known any more."""
    if weight.qtype.group_size is not None:
        return WeightScheme(weight.qtype.name)
    blocks = weight.block_shape
    group = math.prod(blocks[axis] for axis in summed)
    grouped = group < math.prod(weight.shape[axis] for axis in summed)
    apart = (*layers, *summed)
    free = [axis for axis in range(weight.ndim) if axis not in apart]
    whole = all(blocks[axis] == weight.shape[axis] for axis in free)
    return WeightScheme(
        weight.qtype.name,
        granularity="group" if grouped else "tensor" if whole else "channel",
        group_size=group if grouped else None,
        symmetric=weight.zero_point is None,
        double_quant=weight.qtype.scale_qtype is None and isinstance(weight.scale, QTensor),
    )


def _attention_rule(use: OpUse, rules: Sequence[Rule]) -> Rule | None:
    if use.param is not None or use.kind != "attention":
        return None
    return next((r for r in rules if r.matches(use.kind, use.cls, None, use.module)), None)
