"""`insert_scales`: runs a float jaxpr with `QTensor` weights as quantized primitives.

`Rewriter` is the interpreter whose weights are QTensors. Structural operations move codes and
scales alike; dot_general, conv and ragged_dot become quantized primitives; a gather picks codes
and scales and dequantizes only what it picked; everything else gets the dequantized array. Each
decision is an `Event`, so nothing happens silently. Called by `jaxquant.frontends.function` and,
abstractly, by `explain`. What an op does with its input is read from the QTensor, never from a
recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, placement, primitives, structure
from jaxquant.core.qtensor import QTensor
from jaxquant.core.recipe import Rule as RecipeRule
from jaxquant.core.structure import Unstructured
from jaxquant.passes import custom_derivatives as custom_derivatives  # enters its rules
from jaxquant.passes.control_flow import CONTROL
from jaxquant.passes.interpreter import (
    Context,
    Interpreter,
    Rule,
    Site,
    Weight,
    is_weight,
    register,
)
from jaxquant.passes.weightless import is_attention_product, rule_for


class StrictError(ValueError):
    """Something would run in float although ``strict=True`` forbids it."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One decision of the rewriter.

    Attributes:
      site: place of the equation (see `interpreter.Context`).
      names: its scope names, outermost first.
      primitive: name of the original primitive.
      path: the parameter concerned; "" for a product of two activations.
      action: "quantized" or "dequantized".
      lowering: what the op becomes, e.g. "xla: int8 dot".
      reason: why.
      source: the user's source line.
    """

    site: Site
    names: tuple[str, ...]
    primitive: str
    path: str
    action: str
    lowering: str
    reason: str
    source: str


RULES: dict[Primitive, Rule] = {}


class Rewriter(Interpreter):
    """Evaluates a float jaxpr with quantized weights.

    Args:
      on_event: called with every `Event`.
      strict: raise `StrictError` where a weight would be dequantized.
      op_rules: rules for products without weights (attention), from the tree's QTensors.
    """

    rules = RULES
    control_rules = CONTROL

    def __init__(
        self,
        *,
        on_event: Callable[[Event], None] | None = None,
        strict: bool = False,
        op_rules: Sequence[RecipeRule] = (),
    ) -> None:
        self._on_event = on_event
        self._strict = strict
        self._op_rules = tuple(op_rules)
        self.visits = bool(op_rules)

    def visit(self, ctx: Context, ins: list[Any]) -> list[Any] | None:
        """Quantizes a product of two activations if a rule names it."""
        if not is_attention_product(ctx.eqn, ctx.names):
            return None
        rule = rule_for(self._op_rules, ctx.names)
        if rule is None or rule.act is None:
            return None
        p = ctx.params
        out = primitives.quantized_attention_dot(
            *ins,
            p["dimension_numbers"],
            rule.act,
            precision=p["precision"],
            preferred_element_type=p["preferred_element_type"],
        )
        self.report(ctx, "", "quantized", "xla: int8 dot", "a rule names attention products")
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

    @property
    def has_listener(self) -> bool:
        """Whether anybody wants to know of decisions."""
        return self._on_event is not None

    def report(self, ctx: Context, path: str, action: str, lowering: str, reason: str) -> None:
        """Tells the listener of a decision about the equation of ``ctx``."""
        if self._on_event is not None:
            self._on_event(
                Event(
                    ctx.site, ctx.names, str(ctx.eqn.primitive), path, action, lowering,
                    reason, ctx.source,
                )
            )  # fmt: skip


def _report(ctx: Context, weight: Weight, describe: Callable[[], tuple[str, str]]) -> None:
    """Reports a quantized op; its lowering and reason are worked out only if somebody listens."""
    interpreter = ctx.interpreter
    assert isinstance(interpreter, Rewriter)
    if interpreter.has_listener:
        interpreter.report(ctx, weight.path, "quantized", *describe())


# --- structural operations: codes and scales move alike -------------------------------------


def _structural(
    *which: Primitive,
) -> Callable[[Callable[..., QTensor]], Callable[..., QTensor]]:
    """Enters ``op(value, *other inputs, **params)`` for operations on their first input."""

    def enter(op: Callable[..., QTensor]) -> Callable[..., QTensor]:
        @register(RULES, *which)
        def rule(ctx: Context, ins: list[Any]) -> list[Any]:
            weight, *rest = ins
            if not is_weight(weight) or any(map(is_weight, rest)):
                raise Unstructured(f"a weight is not the first operand of {ctx.eqn.primitive}")
            return [weight.replace(value=op(weight.value, *rest, **ctx.params))]

        return op

    return enter


@_structural(jp.convert_element_type_p)
def _astype(w: QTensor, *, new_dtype: Any, **_: Any) -> QTensor:
    return structure.astype(w, new_dtype)


@_structural(jp.transpose_p)
def _transpose(w: QTensor, *, permutation: Sequence[int]) -> QTensor:
    return structure.transpose(w, permutation)


@_structural(jp.reshape_p)
def _reshape(w: QTensor, *, new_sizes: Sequence[int], dimensions: Any, **_: Any) -> QTensor:
    if dimensions is not None:
        raise Unstructured("reshape with a permutation")
    return structure.reshape(w, new_sizes)


@_structural(jp.broadcast_in_dim_p)
def _broadcast(w: QTensor, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> QTensor:
    return structure.broadcast_in_dim(w, shape, broadcast_dimensions)


@_structural(jp.squeeze_p)
def _squeeze(w: QTensor, *, dimensions: Sequence[int]) -> QTensor:
    return structure.squeeze(w, dimensions)


@_structural(jp.slice_p)
def _slice(w: QTensor, *, start_indices: Any, limit_indices: Any, strides: Any) -> QTensor:
    return structure.slice(w, start_indices, limit_indices, strides)


@_structural(jp.dynamic_slice_p)
def _dynamic_slice(w: QTensor, *starts: Any, slice_sizes: Sequence[int]) -> QTensor:
    return structure.dynamic_slice(w, starts, slice_sizes)


@_structural(jp.rev_p)
def _rev(w: QTensor, *, dimensions: Sequence[int]) -> QTensor:
    return structure.rev(w, dimensions)


@_structural(jp.sharding_constraint_p)
def _sharding_constraint(w: QTensor, *, sharding: Any, **_: Any) -> QTensor:
    return placement.constrain_parts(w, sharding)


@_structural(_compat.reshard_p)
def _reshard(w: QTensor, *, dst_sharding: Any, **_: Any) -> QTensor:
    return jax.tree_util.tree_map(
        jax.sharding.reshard, w, placement.part_shardings(w, dst_sharding)
    )


@register(RULES, jp.copy_p, jp.name_p, jp.stop_gradient_p, _compat.pvary_p)
def _each_part(ctx: Context, ins: list[Any]) -> list[Any]:
    """Operations on values whatever their shape: applied to every part."""
    (weight,) = ins
    return [jax.tree_util.tree_map(lambda part: _compat.bind(ctx.eqn, [part])[0], weight)]


@register(RULES, _compat.optimization_barrier_p)
def _barrier(ctx: Context, ins: list[Any]) -> list[Any]:
    return list(jax.lax.optimization_barrier(tuple(ins)))


@register(RULES, jp.concatenate_p)
def _concatenate(ctx: Context, ins: list[Any]) -> list[Any]:
    return [_join(ins, lambda parts: structure.concatenate(parts, ctx.params["dimension"]))]


@register(RULES, _compat.stack_p)
def _stack(ctx: Context, ins: list[Any]) -> list[Any]:
    axis = ctx.params["axis"]
    return [
        _join(
            ins,
            lambda parts: structure.concatenate(
                [structure.expand_dims(part, (axis,)) for part in parts], axis
            ),
        )
    ]


def _join(ins: list[Any], op: Callable[[list[QTensor]], QTensor]) -> Weight:
    if not all(map(is_weight, ins)):
        raise Unstructured("weights are joined with values that are not quantized")
    first = ins[0]
    path = ",".join(dict.fromkeys(w.path for w in ins))
    return first.replace(value=op([w.value for w in ins]), path=path)


def _cut(weight: Weight, axis: int, sizes: Sequence[int]) -> list[Weight]:
    shape, parts, start = weight.value.shape, [], 0
    for size in sizes:
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        parts.append(weight.replace(value=structure.slice(weight.value, starts, limits, None)))
        start += size
    return parts


@register(RULES, _compat.split_p)
def _split(ctx: Context, ins: list[Any]) -> list[Any]:
    (weight,) = ins
    return list(_cut(weight, ctx.params["axis"], ctx.params["sizes"]))


@register(RULES, _compat.unstack_p)
def _unstack(ctx: Context, ins: list[Any]) -> list[Any]:
    (weight,), axis = ins, ctx.params["axis"]
    pieces = _cut(weight, axis, [1] * weight.value.shape[axis])
    return [p.replace(value=structure.squeeze(p.value, (axis,))) for p in pieces]


@register(RULES, jp.mul_p, jp.div_p)
def _scalar_factor(ctx: Context, ins: list[Any]) -> list[Any]:
    """A scalar factor goes into the scales: the codes stay as they are."""
    weight, factor = ins if is_weight(ins[0]) else ins[::-1]
    divides = ctx.eqn.primitive is jp.div_p
    if is_weight(factor) or jnp.ndim(factor) != 0 or (divides and not is_weight(ins[0])):
        raise Unstructured(f"{ctx.eqn.primitive} of a weight that is not a scalar factor")
    if weight.gathered:
        raise Unstructured("the picked rows are scaled")
    factor = 1 / factor if divides else factor
    return [weight.replace(value=structure.scale_by(weight.value, factor))]


_GATHER = (
    "xla: gather codes and scales",
    "only what is picked is read, and dequantized at its use",
)


@register(RULES, jp.gather_p)
def _gather(ctx: Context, ins: list[Any]) -> list[Any]:
    weight, indices = ins
    if not is_weight(weight) or is_weight(indices):
        raise Unstructured("a weight is used as indices")
    p = ctx.params
    value = structure.gather(
        weight.value, indices, p["dimension_numbers"], p["slice_sizes"],
        mode=p["mode"], fill_value=p["fill_value"],
        indices_are_sorted=p["indices_are_sorted"], unique_indices=p["unique_indices"],
    )  # fmt: skip
    _report(ctx, weight, lambda: _GATHER)
    return [weight.replace(value=value, gathered=True)]


# --- products: quantized primitives ----------------------------------------------------------


@register(RULES, jp.dot_general_p)
def _dot_general(ctx: Context, ins: list[Any]) -> list[Any]:
    """The weight keeps its codes; of two weights the one that was looked up is the input."""
    lhs, rhs = ins
    if is_weight(lhs) and is_weight(rhs):
        reason = "the other operand of the product is a weight too"
        if rhs.gathered and not lhs.gathered:
            rhs = ctx.float(rhs, reason)
        else:
            lhs = ctx.float(lhs, reason)
    weight, x, side = (lhs, rhs, "lhs") if is_weight(lhs) else (rhs, lhs, "rhs")
    _require_float(x)
    w, dims = weight.value, ctx.params["dimension_numbers"]
    kept = ("precision", "preferred_element_type", "out_sharding")
    options = {name: ctx.params[name] for name in kept}
    out = primitives.quantized_dot_general(x, w, dims, weight_side=side, **options)
    _report(ctx, weight, lambda: primitives.describe_lowering(x, w, dims, weight_side=side))
    return [_as(out, ctx)]


@register(RULES, jp.conv_general_dilated_p)
def _conv(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight = ins
    if is_weight(x) or not is_weight(weight):
        raise Unstructured("a weight is the input of a convolution")
    _require_float(x)
    out = primitives.bind_conv(x, weight.value, **ctx.params)
    dims = ctx.params["dimension_numbers"]
    _report(ctx, weight, lambda: primitives.describe_conv(weight.value, dims))
    return [_as(out, ctx)]


@register(RULES, _compat.ragged_dot_general_p)
def _ragged_dot(ctx: Context, ins: list[Any]) -> list[Any]:
    x, weight, group_sizes = ins
    if is_weight(x) or not is_weight(weight):
        raise Unstructured("a weight is the left side of a ragged dot")
    _require_float(x)
    out = primitives.bind_ragged_dot(x, weight.value, group_sizes, **ctx.params)
    _report(ctx, weight, lambda: primitives.describe_ragged_dot(weight.value))
    return [_as(out, ctx)]


def _require_float(x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Unstructured(f"the other operand is {x.dtype}, not floating point")


def _as(out: Any, ctx: Context) -> Any:
    dtype = ctx.eqn.outvars[0].aval.dtype
    return out if out.dtype == dtype else out.astype(dtype)
