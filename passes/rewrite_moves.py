"""Rules for operations that move a weight's elements: codes and scales move alike.

The table `MOVES` of the rewriter. Each rule applies one of `jaxquant.core.structure`'s operations,
which stand for exactly the float operation, or raise `Unstructured`; then the rewriter dequantizes
and reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, placement, structure
from jaxquant.core.qtensor import QTensor
from jaxquant.core.structure import Unstructured
from jaxquant.passes.events import report_quantized
from jaxquant.passes.interpreter import Context, Rule, Weight, is_weight, register

MOVES: dict[Primitive, Rule] = {}


def _structural(
    *which: Primitive,
) -> Callable[[Callable[..., QTensor]], Callable[..., QTensor]]:
    """Enters ``op(value, *other inputs, **params)`` for operations on their first input."""

    def enter(op: Callable[..., QTensor]) -> Callable[..., QTensor]:
        @register(MOVES, *which)
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


@_structural(jp.all_gather_p)
def _all_gather(
    w: QTensor, *, axis_name: Sequence[str], all_gather_dimension: int, tiled: bool,
    axis_index_groups: Any, **_: Any,
) -> QTensor:  # fmt: skip
    if not tiled or axis_index_groups is not None:
        raise Unstructured("all_gather with a new axis (tiled=False) or with axis_index_groups")
    return structure.all_gather(w, axis_name, all_gather_dimension)


@_structural(jp.sharding_constraint_p)
def _sharding_constraint(w: QTensor, *, sharding: Any, **_: Any) -> QTensor:
    return placement.constrain_parts(w, sharding)


@_structural(_compat.reshard_p)
def _reshard(w: QTensor, *, dst_sharding: Any, **_: Any) -> QTensor:
    return jax.tree_util.tree_map(
        jax.sharding.reshard, w, placement.part_shardings(w, dst_sharding)
    )


@register(MOVES, jp.copy_p, jp.name_p, jp.stop_gradient_p, _compat.pvary_p)
def _each_part(ctx: Context, ins: list[Any]) -> list[Any]:
    """Operations on values whatever their shape: applied to every part."""
    (weight,) = ins
    return [jax.tree_util.tree_map(lambda part: _compat.bind(ctx.eqn, [part])[0], weight)]


@register(MOVES, _compat.optimization_barrier_p)
def _barrier(ctx: Context, ins: list[Any]) -> list[Any]:
    outs = jax.lax.optimization_barrier(tuple(ins))
    # jax 0.10 makes zeros of the tangents that are none, where any operand has one; parts of
    # weights have none.
    return [jax.lax.stop_gradient(out) if is_weight(out) else out for out in outs]


@register(MOVES, jp.concatenate_p)
def _concatenate(ctx: Context, ins: list[Any]) -> list[Any]:
    return [_join(ins, lambda parts: structure.concatenate(parts, ctx.params["dimension"]))]


@register(MOVES, _compat.stack_p)
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


@register(MOVES, _compat.split_p)
def _split(ctx: Context, ins: list[Any]) -> list[Any]:
    (weight,) = ins
    return list(_cut(weight, ctx.params["axis"], ctx.params["sizes"]))


@register(MOVES, _compat.unstack_p)
def _unstack(ctx: Context, ins: list[Any]) -> list[Any]:
    (weight,), axis = ins, ctx.params["axis"]
    pieces = _cut(weight, axis, [1] * weight.value.shape[axis])
    return [p.replace(value=structure.squeeze(p.value, (axis,))) for p in pieces]


@register(MOVES, jp.mul_p, jp.div_p)
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


@register(MOVES, jp.gather_p)
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
    if value.ndim == len(p["dimension_numbers"].offset_dims):
        return [weight.replace(value=value)]  # one index: a slice, such as a layer
    report_quantized(ctx, weight, lambda: _GATHER)
    return [weight.replace(value=value, gathered=True)]
