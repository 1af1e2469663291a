"""`assign_recipe`: what becomes of each parameter, and why.

Takes the uses that `find_weights` found and a recipe; the first rule that matches an operation
decides it. The uses of one parameter are merged: it has one set of codes and scales. Called by
explain and ptq. Nothing here quantizes.

How the uses of one parameter are merged: the product with most work decides the axes of the
scales, else the lookup; further uses that these scales do not suit still compute the same, and the
plan says how (`merge_uses`). A rule that skips one use keeps the whole parameter float. Never
quantized: integers, vectors, parameters that no product sums over (norm gains and biases, also
where an einsum applies them), and whatever has other uses only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxquant.core.blocks import scale_shape
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.quantize_array import choose_packed_axis
from jaxquant.core.recipe import Recipe, Rule
from jaxquant.core.schemes import ActScheme, WeightScheme
from jaxquant.passes.merge_uses import at, deciding, name_of, notes, rounding_ops
from jaxquant.passes.op_use import OpUse
from jaxquant.passes.param_blocks import GroupSizeError, block_shape, summed
from jaxquant.passes.rule_errors import check_rules

# Names by which gains and biases are known where they are looked up by row like an embedding.
_VECTOR_NAMES = frozenset({"bias", "b", "scale", "gain", "gamma", "beta"})


@dataclasses.dataclass(frozen=True)
class ParamPlan:
    """What becomes of one parameter.

    Attributes:
      path: its path.
      shape: its shape.
      dtype: its dtype.
      uses: everything it takes part in.
      scheme: how it is stored, or None if it stays float.
      act: what its products do with their input, or None.
      act_ops: primitives of the products that do so; None for all of them.
      block_shape: neighbours along each axis that share a scale; None if it stays float.
      packed_axis: negative axis along which bit-packed codes are packed, or None.
      layer_axes: axes that only number layers.
      stack_axes: these, and axes of experts and batches, along which nothing is shared.
      contracted: negative axes that the deciding use sums over as a whole; none where it is no
        product of matrices. None if it stays float.
      rule: the rule that decided, or None.
      reason: why it stays float; "" if it is quantized.
      notes: what else the plan should say.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[OpUse, ...] = ()
    scheme: WeightScheme | None = None
    act: ActScheme | None = None
    act_ops: tuple[str, ...] | None = None
    block_shape: tuple[int, ...] | None = None
    packed_axis: int | None = None
    layer_axes: tuple[int, ...] = ()
    stack_axes: tuple[int, ...] = ()
    contracted: tuple[int, ...] | None = None
    rule: Rule | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What becomes of a program under a recipe.

    Attributes:
      recipe: the recipe.
      uses: all uses of parameters and products of two activations, in order.
      rules: for each use the rule that matches it first, or None.
      params: the plan of each parameter by path, in the order of the program's inputs.
      op_rules: rules for products of two activations that apply to some product.
    """

    recipe: Recipe
    uses: tuple[OpUse, ...]
    rules: tuple[Rule | None, ...]
    params: Mapping[str, ParamPlan]
    op_rules: tuple[Rule, ...]

    @property
    def quantized(self) -> list[ParamPlan]:
        """The plans of the parameters that are quantized."""
        return [plan for plan in self.params.values() if plan.scheme is not None]


def assign_recipe(
    uses: Sequence[OpUse], parameters: Mapping[str, Any], recipe: Recipe
) -> Assignment:
    """Applies a recipe to the uses of a program's parameters.

    Args:
      uses: from `find_weights`.
      parameters: path to abstract value (shape, dtype), as `Program.parameters`.
      recipe: the recipe.

    Raises:
      ValueError: a rule matches nothing (the message lists near misses).
      GroupSizeError: group sizes that do not divide; all of them in one message.
    """
    rules = tuple(_first_match(recipe, use) for use in uses)
    check_rules(recipe, uses, rules, parameters)
    plans: dict[str, ParamPlan] = {}
    errors: list[str] = []
    for path, aval in parameters.items():
        own = [(use, rule) for use, rule in zip(uses, rules) if use.param == path]
        plan = ParamPlan(path, tuple(aval.shape), aval.dtype, tuple(use for use, _ in own))
        try:
            plans[path] = _plan(plan, own)
        except GroupSizeError as error:
            errors.append(str(error))
    if errors:
        raise GroupSizeError(f"recipe {recipe.name!r}:\n" + "\n".join(errors))
    used = [rule for use, rule in zip(uses, rules) if use.kind == "attention" and rule]
    return Assignment(recipe, tuple(uses), rules, _with_joined(plans), tuple(dict.fromkeys(used)))


def _first_match(recipe: Recipe, use: OpUse) -> Rule | None:
    if use.primitive == "other" or (use.param is None and use.kind != "attention"):
        return None
    for rule in recipe.rules:
        if rule.matches(use.kind, use.cls, use.param, use.module):
            return rule
    return None


def _plan(plan: ParamPlan, own: Sequence[tuple[OpUse, Rule | None]]) -> ParamPlan:
    reason = _never_quantized(plan)
    if reason:
        return dataclasses.replace(plan, reason=reason)
    for use, rule in own:
        if rule is not None and rule.skip:
            return dataclasses.replace(plan, rule=rule, reason=f"{rule} skips {name_of(use)}")
    use, rule = deciding(own)
    if rule is None or rule.weight is None:
        return dataclasses.replace(plan, reason=f"no rule of the recipe matches {name_of(use)}")
    scheme = rule.weight
    blocks = block_shape(use, scheme, plan.path)
    if not _is_smaller(plan, scheme, blocks):
        return dataclasses.replace(
            plan, rule=rule, reason=f"{scheme} with its scales would take no less than floats"
        )
    apart = ("layer",) if use.primitive == "gather" else ("layer", "batch", "indexed")
    stack = tuple(a.axis for a in use.axes if a.parts and a.run(*apart) == a.length)
    packed = get_qtype(scheme.qtype).packed
    ops = rounding_ops(use, rule, own)
    return dataclasses.replace(
        plan,
        scheme=scheme,
        act=rule.act if True in ops.values() else None,
        act_ops=tuple(op for op in ops if ops[op]) if len(set(ops.values())) > 1 else None,
        block_shape=blocks,
        packed_axis=choose_packed_axis(plan.shape, blocks, stack) if packed else None,
        layer_axes=tuple(a.axis for a in use.axes if a.is_layer),
        stack_axes=stack,
        contracted=_contracted(use),
        rule=rule,
        notes=tuple(notes(use, rule, blocks, own, ops)),
    )


def _contracted(use: OpUse) -> tuple[int, ...]:
    if use.primitive not in ("dot_general", "ragged_dot"):
        return ()
    count = len(use.axes)
    return tuple(a.axis - count for a in use.axes if 1 < a.length == a.contracted)


def _never_quantized(plan: ParamPlan) -> str:
    """Why a parameter cannot be quantized whatever the recipe says, or ""."""
    if not jnp.issubdtype(plan.dtype, jnp.floating):
        return f"{plan.dtype} is not floating point"
    if not plan.uses:
        return "the traced call does not use it"
    products = [use for use in plan.uses if use.is_product]
    lookups = [use for use in plan.uses if use.primitive == "gather"]
    if not products and not lookups:
        other = plan.uses[0]
        return f"{other.detail}, which has no quantized form{at(other)}"
    sums = any(use.contracts for use in products)
    if not sums and not lookups:
        where = at(products[0])
        return f"its products sum over none of its axes: a gain, bias or outer product{where}"
    first = (products or lookups)[0]
    axes = [axis for axis in first.axes if not axis.is_layer]
    if len(axes) < 2:
        return "a vector: it has fewer than two axes besides those of layers"
    if not products and plan.path.rpartition("/")[2] in _VECTOR_NAMES:
        return "a table of gains or biases, by its name; rows of embeddings are looked up"
    if not sums and all(summed(lookups[0], axis) == 1 for axis in lookups[0].axes):
        return "its lookups pick single values, which can share no scale"
    return ""


def _is_smaller(plan: ParamPlan, scheme: WeightScheme, blocks: Sequence[int]) -> bool:
    qtype = get_qtype(scheme.qtype)
    scales = math.prod(scale_shape(plan.shape, blocks))
    scale_bits = 8 if qtype.scale_dtype or qtype.scale_qtype or scheme.double_quant else (
        8 * jnp.dtype(scheme.scale_dtype).itemsize
    )  # fmt: skip
    if not scheme.symmetric:
        scale_bits += 8  # the zero points
    size = math.prod(plan.shape)
    return size * qtype.bits + scales * scale_bits < size * 8 * jnp.dtype(plan.dtype).itemsize


def _with_joined(plans: Mapping[str, ParamPlan]) -> dict[str, ParamPlan]:
    """Says where parameters are joined to others that are stored differently."""
    result = {}
    for path, plan in plans.items():
        partners = [p for use in plan.uses for p in use.joined]
        differ = [p for p in dict.fromkeys(partners) if plans[p].scheme != plan.scheme]
        if plan.scheme is not None and differ:
            note = f"joined with {', '.join(differ)}, stored differently: dequantized there"
            plan = dataclasses.replace(plan, notes=(*plan.notes, note))
        result[path] = plan
    return result
