"""`insert_scales`: runs a float jaxpr with `QTensor` weights as quantized primitives.

`Rewriter` is the interpreter whose weights are QTensors. Structural operations move codes and
scales alike; dot_general, conv and ragged_dot become quantized primitives; a gather picks codes
and scales and dequantizes only what it picked; everything else gets the dequantized array. Each
decision is an `Event`, so nothing happens silently. Called by `jaxquant.frontends.function` and,
abstractly, by `explain`. What an op does with its input is read from the QTensor, never from a
recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxquant.core import primitives
from jaxquant.core.recipe import Rule as RecipeRule
from jaxquant.core.schemes import ActScheme
from jaxquant.passes import custom_derivatives as custom_derivatives  # enters its rules
from jaxquant.passes.control_flow import CONTROL
from jaxquant.passes.events import Event, Reporter
from jaxquant.passes.interpreter import Context, Weight
from jaxquant.passes.rewrite_moves import MOVES
from jaxquant.passes.rewrite_products import PRODUCTS
from jaxquant.passes.weightless import is_attention_product, rule_for


class StrictError(ValueError):
    """Something would run in float although ``strict=True`` forbids it."""


class Rewriter(Reporter):
    """Evaluates a float jaxpr with quantized weights.

    Args:
      on_event: called with every `Event`.
      strict: raise `StrictError` where a weight would be dequantized.
      op_rules: rules for products without weights (attention), from the tree's QTensors.
    """

    rules = MOVES | PRODUCTS
    control_rules = CONTROL

    def __init__(
        self,
        *,
        on_event: Callable[[Event], None] | None = None,
        strict: bool = False,
        op_rules: Sequence[RecipeRule] = (),
    ) -> None:
        super().__init__(on_event)
        self._strict = strict
        self._op_rules = tuple(op_rules)
        self.visits = bool(op_rules)

    def visit(self, ctx: Context, ins: list[Any]) -> list[Any] | None:
        """Quantizes a product of two activations if a rule names it."""
        if not is_attention_product(ctx.eqn, ctx.names) or ctx.backward:
            return None
        rule = rule_for(self._op_rules, ctx.names)
        if rule is None or rule.act is None:
            return None
        return self.product(ctx, ins, rule.act)

    def product(self, ctx: Context, ins: list[Any], act: ActScheme) -> list[Any]:
        """The quantized product of two activations."""
        p, (lhs, rhs) = ctx.params, ins
        out = primitives.quantized_attention_dot(
            lhs,
            rhs,
            p["dimension_numbers"],
            act,
            precision=p["precision"],
            preferred_element_type=p["preferred_element_type"],
        )
        name = f"xla: {act.qtype} dot"
        self.report(ctx, "", "quantized", name, "a rule names attention products")
        return [out]

    def to_float(self, ctx: Context, weight: Weight, reason: str) -> Any:
        """The dequantized array; reported, or refused when strict, unless it was looked up."""
        if weight.gathered:
            return primitives.dequantize(weight.value)  # the rows that were picked, no more
        if self._strict:
            raise StrictError(
                f"strict=True: parameter {weight.path!r} would be dequantized at "
                f"{ctx.source}: {reason}"
            )
        self.report(ctx, weight.path, "dequantized", "dequantize", reason)
        return primitives.dequantize(weight.value)

    def returned(self, weight: Weight) -> Any:
        """The array for a weight that the function returns in a form of its own."""
        reason = "the function returns it, transformed"
        if self._strict and not weight.gathered:
            raise StrictError(f"strict=True: parameter {weight.path!r} is dequantized: {reason}")
        if self._on_event is not None and not weight.gathered:
            event = Event((), (), "return", weight.path, "dequantized", "dequantize", reason, "")
            self._on_event(event)
        return primitives.dequantize(weight.value)
