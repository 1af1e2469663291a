"""Rules of `find_weights` for operations that only move elements of a parameter.

Each mirrors a rule of `rewrite` and calls the shape arithmetic of `axes`. Entered into the table
`follow.MOVES` on import.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.core.structure import Unstructured
from jaxquant.passes import axes
from jaxquant.passes.axes import Origin, Role
from jaxquant.passes.follow import MOVES, Followed, Step, Values, register


def _first(step: Step, ins: Values) -> Followed:
    value, *rest = ins
    if value is None or any(rest):
        raise Unstructured(f"is an index or size of {step.eqn.primitive}")
    return value


@register(
    MOVES, jp.copy_p, jp.name_p, jp.rev_p, jp.sharding_constraint_p, jp.stop_gradient_p,
    _compat.reshard_p, _compat.pvary_p, _compat.optimization_barrier_p,
)  # fmt: skip
def _unchanged(step: Step, ins: Values) -> Values:
    return list(ins)


@register(MOVES, jp.convert_element_type_p)
def _convert(step: Step, ins: Values) -> Values:
    if not jnp.issubdtype(step.params["new_dtype"], jnp.floating):
        raise Unstructured(f"is converted to {jnp.dtype(step.params['new_dtype'])}")
    return list(ins)


@register(MOVES, jp.transpose_p)
def _transpose(step: Step, ins: Values) -> Values:
    value = _first(step, ins)
    permutation = step.params["permutation"]
    return [value.moved(step.out_shape, lambda o: axes.transpose(o, permutation))]


@register(MOVES, jp.reshape_p)
def _reshape(step: Step, ins: Values) -> Values:
    value = _first(step, ins)
    if step.params["dimensions"] is not None:
        raise Unstructured("is reshaped and permuted at once")
    return [value.moved(step.out_shape, lambda o: axes.reshape(o, value.shape, step.out_shape))]


@register(MOVES, jp.broadcast_in_dim_p)
def _broadcast(step: Step, ins: Values) -> Values:
    value = _first(step, ins)
    new, dims = step.params["shape"], step.params["broadcast_dimensions"]
    return [value.moved(new, lambda o: axes.broadcast_in_dim(o, value.shape, new, dims))]


@register(MOVES, jp.all_gather_p)
def _all_gather(step: Step, ins: Values) -> Values:
    value, p = _first(step, ins), step.params
    if not p["tiled"] or p["axis_index_groups"] is not None:
        raise Unstructured("is gathered over devices with a new axis or with axis_index_groups")
    dim, devices = p["all_gather_dimension"], p["axis_size"]
    return [value.moved(step.out_shape, lambda o: axes.unshard_dim(o, dim, devices))]


@register(MOVES, jp.squeeze_p)
def _squeeze(step: Step, ins: Values) -> Values:
    value = _first(step, ins)
    dims = step.params["dimensions"]
    return [value.moved(step.out_shape, lambda o: axes.remove(o, dims, "layer"))]


@register(MOVES, jp.slice_p)
def _slice(step: Step, ins: Values) -> Values:
    value, p = _first(step, ins), step.params
    strides = p["strides"] or (1,) * len(value.shape)
    ranges = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    return [_sliced(value, ranges)]


def _sliced(value: Followed, ranges: Sequence[tuple[int, int, int]]) -> Followed | None:
    def move(origin: Origin | None) -> Origin | None:
        for dim, (start, limit, stride) in enumerate(ranges):
            if origin is not None:
                size = value.shape[dim]
                origin = axes.slice_dim(origin, dim, size, int(start), int(limit), int(stride))
        return origin

    shape = tuple(-(-(limit - start) // stride) for start, limit, stride in ranges)
    return value.moved(shape, move)


@register(MOVES, jp.dynamic_slice_p)
def _dynamic_slice(step: Step, ins: Values) -> Values:
    value, sizes = _first(step, ins), step.params["slice_sizes"]

    def move(origin: Origin) -> Origin:
        for dim, length in enumerate(sizes):
            origin = axes.dynamic_slice_dim(origin, dim, value.shape[dim], length)
        return origin

    return [value.moved(sizes, move)]


def _joined(ins: Values, dim: int, shape: Sequence[int]) -> Followed:
    origins: list[Origin] = []
    start = 0
    for value in ins:
        if value is None:
            raise Unstructured("is joined with values that are no parameters")
        origins += [axes.shift(o, dim, start) for o in value.origins]
        start += value.shape[dim]
    return Followed(tuple(shape), tuple(origins))


@register(MOVES, jp.concatenate_p)
def _concatenate(step: Step, ins: Values) -> Values:
    return [_joined(ins, step.params["dimension"], step.out_shape)]


@register(MOVES, _compat.stack_p)
def _stack(step: Step, ins: Values) -> Values:
    axis = step.params["axis"]
    grown = []
    for value in ins:
        if value is not None:
            shape = (*value.shape[:axis], 1, *value.shape[axis:])
            value = value.moved(shape, lambda o: axes.expand_dims(o, axis))
        grown.append(value)
    return [_joined(grown, axis, step.out_shape)]


def _cut(value: Followed, axis: int, sizes: Sequence[int]) -> Values:
    pieces: Values = []
    start = 0
    for size in map(int, sizes):
        ranges = [(0, n, 1) for n in value.shape]
        ranges[axis] = (start, start + size, 1)
        pieces.append(_sliced(value, ranges))
        start += size
    return pieces


@register(MOVES, _compat.split_p)
def _split(step: Step, ins: Values) -> Values:
    return _cut(_first(step, ins), step.params["axis"], step.params["sizes"])


@register(MOVES, _compat.unstack_p)
def _unstack(step: Step, ins: Values) -> Values:
    value, axis = _first(step, ins), step.params["axis"]
    pieces = _cut(value, axis, [1] * value.shape[axis])
    remove = functools.partial(axes.remove, dims=(axis,), role="layer")
    return [p and p.moved(step.out_shape, remove) for p in pieces]


@register(MOVES, jp.mul_p, jp.div_p)
def _scalar_factor(step: Step, ins: Values) -> Values:
    """A scalar factor goes into the scales."""
    ranks = [len(v.aval.shape) for v in step.eqn.invars]
    divides = step.eqn.primitive is jp.div_p
    where = 0 if ranks[0] > 0 or divides else 1
    value, factor = ins[where], ins[1 - where]
    if value is None or ranks[1 - where] != 0 or ranks[where] == 0 or value.gathered:
        raise Unstructured(f"is used by {step.eqn.primitive}")
    step.end([factor], "is a scalar factor")
    return [value]


@register(MOVES, jp.gather_p)
def _gather(step: Step, ins: Values) -> Values:
    value, numbers = _first(step, ins), step.params["dimension_numbers"]
    sizes = step.params["slice_sizes"]
    batching = tuple(numbers.operand_batching_dims)
    dropped = (*numbers.collapsed_slice_dims, *batching)
    picks = len(step.out_shape) > len(numbers.offset_dims)  # an array of indices, not one
    role: Role = "indexed" if picks else "layer"

    def move(origin: Origin) -> Origin:
        for dim, length in enumerate(sizes):
            if dim not in dropped:
                origin = axes.dynamic_slice_dim(origin, dim, value.shape[dim], length)
        origin = axes.remove(origin, dropped, role)
        spread = [n for d, n in enumerate(sizes) if d not in dropped]
        moved = axes.broadcast_in_dim(origin, spread, step.out_shape, numbers.offset_dims)
        return dataclasses.replace(moved, gathered=step.site) if picks else moved

    if picks:
        roles: list[Role] = ["indexed" if d in dropped else "free" for d in range(len(sizes))]
        step.walker.remember_lookup(step, value, roles)
    return [value.moved(step.out_shape, move)]
