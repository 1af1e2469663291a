"""`insert_observers`: calibration as extra outputs of a pure function.

The float jaxpr is evaluated with every observed parameter marked; wherever a marked weight meets
a product, a statistic of the product's *other* operand is added to the outputs. The result is an
ordinary function that can be jitted and sharded: statistics inside a scan over stacked layers come
out stacked like the layers, those inside other loops and branches are merged. Called by `ptq`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp
from jax.sharding import PartitionSpec

from jaxquant.core import _compat
from jaxquant.core.structure import Unstructured
from jaxquant.passes.control_flow import merge_fixed, separate_invariant
from jaxquant.passes.interpreter import (
    Context,
    Interpreter,
    Rule,
    Site,
    Weight,
    is_weight,
    register,
)
from jaxquant.passes.program import Program
from jaxquant.passes.statistics import Statistic

# A parameter, and the scans that stack it.
Key = tuple[str, tuple[Site, ...]]
Collected = dict[Key, Any]

RULES: dict[Primitive, Rule] = {}
CONTROL: dict[Primitive, Rule] = {}


def insert_observers(
    program: Program, statistics: Mapping[str, Statistic]
) -> Callable[..., dict[str, Any]]:
    """A pure function that gives statistics of what the observed parameters are multiplied with.

    Args:
      program: the float program.
      statistics: for each parameter path to observe, what is collected.

    Returns:
      ``observed(*flat_inputs) -> {path: statistic}``. A parameter that scans stack has one leading
      axis a scan, outermost first; one that meets no product is absent.

    Raises:
      ValueError: a path is no parameter of the program.
    """
    unknown = set(statistics) - set(program.parameters)
    if unknown:
        raise ValueError(f"not parameters of the program: {', '.join(sorted(unknown))}")
    jaxpr, consts = program.jaxpr.jaxpr, program.jaxpr.consts

    def observed(*inputs: Any) -> dict[str, Any]:
        observer = _Observer(statistics)
        marked = [
            Weight(x, path) if path is not None and path in statistics else x
            for x, path in zip(inputs, program.paths, strict=True)
        ]
        with observer.collecting() as found:
            observer.run(jaxpr, consts, marked)
        merged: dict[str, Any] = {}
        for (path, _), stat in sorted(found.items(), key=lambda item: -len(item[0][1])):
            statistic = statistics[path]
            if path in merged:  # the parameter is also used outside the scan that stacks it
                merged[path] = statistic.merge(merged[path], stat)
            else:
                merged[path] = stat
        return merged

    return observed


class _Observer(Interpreter):
    """Marks flow like QTensors do; the values stay float."""

    rules = RULES
    control_rules = CONTROL

    def __init__(self, statistics: Mapping[str, Statistic]) -> None:
        self.statistics = statistics
        self._found: Collected = {}

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Collected]:
        """What is recorded inside goes to a dict of its own: the outputs of one traced body."""
        outer, self._found = self._found, {}
        try:
            yield self._found
        finally:
            self._found = outer

    def record(self, weight: Weight, x: jax.Array) -> None:
        self.add({(weight.path, weight.levels): self.statistics[weight.path].of(x)})

    def add(self, found: Collected) -> None:
        for key, stat in found.items():
            if key in self._found:
                stat = self.statistics[key[0]].merge(self._found[key], stat)
            self._found[key] = stat

    @staticmethod
    def neutral(shapes: Collected) -> Collected:
        """Statistics of nothing, in the shapes of ``shapes``."""
        return {key: jnp.zeros(shape.shape, shape.dtype) for key, shape in shapes.items()}

    def to_float(self, ctx: Context, weight: Weight, reason: str) -> Any:
        return weight.value


def _observer(ctx: Context) -> _Observer:
    assert isinstance(ctx.interpreter, _Observer)
    return ctx.interpreter


# --- equations: the mark follows structural operations and ends in products -------------------


@register(
    RULES, jp.convert_element_type_p, jp.transpose_p, jp.reshape_p, jp.broadcast_in_dim_p,
    jp.squeeze_p, jp.slice_p, jp.dynamic_slice_p, jp.rev_p, jp.sharding_constraint_p, jp.copy_p,
    jp.name_p, jp.stop_gradient_p, _compat.reshard_p,
    jp.gather_p, jp.concatenate_p, _compat.pvary_p, _compat.stack_p, _compat.split_p,
    _compat.unstack_p, _compat.optimization_barrier_p,
)  # fmt: skip
def _structural(ctx: Context, ins: list[Any]) -> list[Any]:
    marks = [x for x in ins if is_weight(x)]
    if ctx.eqn.primitive is _compat.optimization_barrier_p:
        return list(jax.lax.optimization_barrier(tuple(ins)))
    if any(mark.path != marks[0].path for mark in marks):
        raise Unstructured("several parameters are joined")
    outs = _compat.bind(ctx.eqn, [x.value if is_weight(x) else x for x in ins])
    return [marks[0].replace(value=out) for out in outs]


@register(RULES, jp.dot_general_p, jp.conv_general_dilated_p, _compat.ragged_dot_general_p)
def _product(ctx: Context, ins: list[Any]) -> list[Any]:
    lhs, rhs, *_ = ins
    weight, x = (lhs, rhs) if is_weight(lhs) and not is_weight(rhs) else (rhs, lhs)
    if is_weight(weight):
        _observer(ctx).record(weight, x.value if is_weight(x) else x)
    return _compat.bind(ctx.eqn, [y.value if is_weight(y) else y for y in ins])


# --- equations with sub-jaxprs: statistics leave them as outputs ------------------------------


@register(
    CONTROL, jp.jit_p, jp.remat_p, jp.custom_jvp_call_p, jp.custom_vjp_call_p,
    *_compat.call_primitives,
)  # fmt: skip
def _inline(ctx: Context, ins: list[Any]) -> list[Any]:
    """Only the values of a forward run count here, so calls are simply inlined."""
    params = ctx.params
    body = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
    return ctx.run(0, body, ins)


def _floats(outs: Sequence[Any]) -> list[Any]:
    return [x.value if is_weight(x) else x for x in outs]


@register(CONTROL, jp.scan_p)
def _scan(ctx: Context, ins: list[Any]) -> list[Any]:
    params, observer = ctx.params, _observer(ctx)
    body, _ = _compat.open_jaxpr(params["jaxpr"])
    num_consts, num_carry = _compat.scan_arity(ctx.eqn)
    consts, carry = ins[:num_consts], ins[num_consts : num_consts + num_carry]
    xs = [
        x.replace(levels=(*x.levels, ctx.site)) if is_weight(x) else x
        for x in ins[num_consts + num_carry :]
    ]
    state, fixed = separate_invariant(ctx, carry)

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], Collected]]:
        with observer.collecting() as found:
            outs = ctx.run(0, params["jaxpr"], [*consts, *merge_fixed(state, fixed), *x])
        new = [y for i, y in enumerate(_floats(outs[:num_carry])) if i not in fixed]
        return new, (_floats(outs[num_carry:]), found)

    state, (ys, found) = jax.lax.scan(
        step, state, xs, length=params["length"], reverse=params["reverse"]
    )
    observer.add(
        {
            key: stat if ctx.site in key[1] else observer.statistics[key[0]].reduce(stat)
            for key, stat in found.items()
        }
    )
    return [*merge_fixed(state, fixed), *ys]


@register(CONTROL, jp.while_p)
def _while(ctx: Context, ins: list[Any]) -> list[Any]:
    params, observer = ctx.params, _observer(ctx)
    body, _ = _compat.open_jaxpr(params["body_jaxpr"])
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = ins[:num_cond], ins[num_cond : num_cond + num_body]
    carry = ins[num_cond + num_body :]
    state, fixed = separate_invariant(ctx, carry)

    def cond(full: tuple[list[Any], Collected]) -> Any:
        args = [*cond_consts, *merge_fixed(full[0], fixed)]
        with observer.collecting():  # what a condition multiplies is not calibrated
            return ctx.run(0, params["cond_jaxpr"], args)[0]

    def step(state: list[Any]) -> tuple[list[Any], Collected]:
        with observer.collecting() as found:
            outs = ctx.run(1, params["body_jaxpr"], [*body_consts, *merge_fixed(state, fixed)])
        return [y for i, y in enumerate(_floats(outs)) if i not in fixed], found

    def merged_step(full: tuple[list[Any], Collected]) -> tuple[list[Any], Collected]:
        state, found = step(full[0])
        return state, {
            k: observer.statistics[k[0]].merge(full[1][k], stat) for k, stat in found.items()
        }

    _, shapes = jax.eval_shape(step, state)
    state, found = jax.lax.while_loop(cond, merged_step, (state, observer.neutral(shapes)))
    observer.add(found)
    return merge_fixed(state, fixed)


@register(CONTROL, jp.cond_p)
def _cond(ctx: Context, ins: list[Any]) -> list[Any]:
    observer = _observer(ctx)
    index, *operands = ins

    def run(sub: int, jaxpr: Any, *args: Any) -> tuple[list[Any], Collected]:
        with observer.collecting() as found:
            outs = _floats(ctx.run(sub, jaxpr, args))
        return outs, found

    branches = [
        functools.partial(run, sub, jaxpr) for sub, jaxpr in enumerate(ctx.params["branches"])
    ]
    shapes: Collected = {}
    for branch in branches:
        shapes.update(jax.eval_shape(branch, *operands)[1])

    def complete(branch: Any) -> Any:
        def run_branch(*args: Any) -> tuple[list[Any], Collected]:
            outs, found = branch(*args)
            return outs, {**observer.neutral(shapes), **found}

        return run_branch

    outs, found = jax.lax.switch(index, [complete(b) for b in branches], *operands)
    observer.add(found)
    return list(outs)


@register(CONTROL, _compat.shard_map_p)
def _shard_map(ctx: Context, ins: list[Any]) -> list[Any]:
    params, observer = ctx.params, _observer(ctx)
    axes = tuple(params["newly_manual_axes"])

    def inner(*local: Any) -> tuple[list[Any], Collected]:
        with observer.collecting() as found:
            outs = _floats(ctx.run(0, params["jaxpr"], local))
        return outs, {k: observer.statistics[k[0]].across(s, axes) for k, s in found.items()}

    outs, found = jax.shard_map(
        inner, mesh=params["mesh"], in_specs=tuple(params["in_specs"]),
        out_specs=(list(params["out_specs"]), PartitionSpec()), check_vma=False,
        axis_names=set(axes),
    )(*ins)  # fmt: skip
    observer.add(found)
    return outs
