"""Rules of `observer` for equations with sub-jaxprs: statistics leave them as outputs.

A scan that slices parameters stacks what it saw, as it stacks layers; other loops, branches and
devices are merged. Only a forward run counts here, so custom derivatives are inlined. Entered into
the table `observer.CONTROL` by being imported.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as jp
from jax.sharding import PartitionSpec

from jaxquant.core import _compat
from jaxquant.passes.control_flow import choose, finished_stay, merge_fixed, separate_invariant
from jaxquant.passes.interpreter import Context, is_weight, register
from jaxquant.passes.observer import CONTROL, Collected, observer
from jaxquant.passes.statistics import State, Statistic


def _floats(outs: Sequence[Any]) -> list[Any]:
    return [x.value if is_weight(x) else x for x in outs]


@register(CONTROL, jp.custom_jvp_call_p, jp.custom_vjp_call_p, *_compat.call_primitives)
def _inline(ctx: Context, ins: list[Any]) -> list[Any]:
    params = ctx.params
    return ctx.run(0, params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"], ins)


@register(CONTROL, jp.jit_p)
def _jit(ctx: Context, ins: list[Any]) -> list[Any]:
    """Inlined, unless it donates buffers or places its arguments."""
    params, own = ctx.params, observer(ctx)
    shardings = (*params["in_shardings"], *params["out_shardings"])
    if not any(params["donated_invars"]) and all(map(_compat.is_unspecified, shardings)):
        with jax.named_scope(params["name"]):
            return ctx.run(0, params["jaxpr"], ins)

    def inner(*args: Any) -> tuple[list[Any], Collected]:
        with own.collecting() as found:
            args = tuple(map(_placed, args, params["in_shardings"]))
            outs = _floats(ctx.run(0, params["jaxpr"], args))
        return list(map(_placed, outs, params["out_shardings"])), found

    inner.__name__ = inner.__qualname__ = params["name"]
    donated = [i for i, d in enumerate(params["donated_invars"]) if d and not is_weight(ins[i])]
    call = jax.jit(inner, keep_unused=params["keep_unused"], donate_argnums=donated)
    outs, found = call(*ins)
    own.add(found)
    return outs


def _placed(value: Any, sharding: Any) -> Any:
    if _compat.is_unspecified(sharding):
        return value
    if is_weight(value):
        return value.replace(value=jax.lax.with_sharding_constraint(value.value, sharding))
    return jax.lax.with_sharding_constraint(value, sharding)


@register(CONTROL, jp.remat_p)
def _remat(ctx: Context, ins: list[Any]) -> list[Any]:
    own = observer(ctx)

    def inner(*args: Any) -> tuple[list[Any], Collected]:
        with own.collecting() as found:
            return _floats(ctx.run(0, ctx.params["jaxpr"], args)), found

    outs, found = _compat.bind_remat(inner, tuple(ins), params=ctx.params)
    own.add(found)
    return outs


@register(CONTROL, jp.scan_p)
def _scan(ctx: Context, ins: list[Any]) -> list[Any]:
    params, own = ctx.params, observer(ctx)
    num_consts, num_carry = _compat.scan_arity(ctx.eqn)
    consts, carry = ins[:num_consts], ins[num_consts : num_consts + num_carry]
    xs = [
        x.replace(levels=(*x.levels, ctx.site)) if is_weight(x) else x
        for x in ins[num_consts + num_carry :]
    ]
    state, fixed = separate_invariant(ctx, carry)
    stacked = (*own.stacked, ctx.site) if any(map(is_weight, xs)) else own.stacked
    key = own.key
    numbers = None if key is None else jnp.arange(params["length"])

    def step(
        state: list[Any], x: tuple[Any, list[Any]]
    ) -> tuple[list[Any], tuple[list[Any], Collected]]:
        number, slices = x
        here = None if key is None else jax.random.fold_in(key, number)
        with own.collecting() as found, own.place(key=here, stacked=stacked):
            outs = ctx.run(0, params["jaxpr"], [*consts, *merge_fixed(state, fixed), *slices])
        new = [y for i, y in enumerate(_floats(outs[:num_carry])) if i not in fixed]
        return new, (_floats(outs[num_carry:]), found)

    state, (ys, found) = jax.lax.scan(
        step, state, (numbers, xs), length=params["length"], reverse=params["reverse"],
        unroll=params["unroll"],
    )  # fmt: skip
    stays = {key: states for key, states in found.items() if ctx.site in key[1]}
    moved = {key: states for key, states in found.items() if ctx.site not in key[1]}
    if params["reverse"]:  # merged in the order of time
        moved = jax.tree.map(lambda x: x[::-1], moved)
    if params["length"]:
        moved = own.each(moved, lambda statistic, x: statistic.reduce(x))
    else:  # not every statistic can be reduced over no steps
        moved = own.neutral(jax.tree.map(lambda x: jnp.sum(x, axis=0), moved))
    own.add({**stays, **moved})
    return [*merge_fixed(state, fixed), *ys]


@register(CONTROL, jp.while_p)
def _while(ctx: Context, ins: list[Any]) -> list[Any]:
    params, own = ctx.params, observer(ctx)
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = ins[:num_cond], ins[num_cond : num_cond + num_body]
    carry = ins[num_cond + num_body :]
    state, fixed = separate_invariant(ctx, carry)
    key = own.key
    Full = tuple[Any, list[Any], Collected]

    def running(state: list[Any]) -> Any:
        args = [*cond_consts, *merge_fixed(state, fixed)]
        with own.collecting():  # what a condition multiplies is not calibrated
            return ctx.run(0, params["cond_jaxpr"], args)[0]

    def step(number: Any, state: list[Any]) -> tuple[list[Any], Collected]:
        here = None if key is None else jax.random.fold_in(key, number)
        with own.collecting() as found, own.place(key=here):
            outs = ctx.run(1, params["body_jaxpr"], [*body_consts, *merge_fixed(state, fixed)])
        return [y for i, y in enumerate(_floats(outs)) if i not in fixed], found

    def merged_step(full: Full) -> Full:
        number, state, before = full
        found: Collected = {}

        def next_state(state: list[Any]) -> list[Any]:
            nonlocal found
            new, found = step(number, state)
            return new

        state = finished_stay(ctx, running, next_state)[1](state)
        with own.collecting() as merged:
            own.add(before)
            own.add(found)
        return number + 1, state, merged

    _, shapes = jax.eval_shape(step, 0, state)
    start = (jnp.zeros((), jnp.int32), state, own.neutral(shapes))
    goes_on = finished_stay(ctx, running, list)[0]
    _, state, found = jax.lax.while_loop(lambda full: goes_on(full[1]), merged_step, start)
    own.add(found)
    return merge_fixed(state, fixed)


@register(CONTROL, jp.cond_p)
def _cond(ctx: Context, ins: list[Any]) -> list[Any]:
    own = observer(ctx)
    index, *operands = ins

    def run(sub: int, jaxpr: Any, *args: Any) -> tuple[list[Any], Collected]:
        with own.collecting() as found:
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
            found = {**own.neutral(shapes), **found}
            return outs, jax.tree.map(_compat.vary_like, found, shapes)

        return run_branch

    outs, found = choose(ctx.eqn, index, [complete(b) for b in branches], operands)
    own.add(found)
    return list(outs)


@register(CONTROL, _compat.shard_map_p)
def _shard_map(ctx: Context, ins: list[Any]) -> list[Any]:
    params, own = ctx.params, observer(ctx)
    axes = tuple(params["newly_manual_axes"])
    there = {"manual": (*own.manual, *axes), "typed": own.typed and params["check_vma"]}

    def inner(*local: Any) -> tuple[list[Any], Collected]:
        with own.collecting() as found, own.place(**there):
            outs = _floats(ctx.run(0, params["jaxpr"], local))
        return outs, own.each(found, merged)

    def merged(statistic: Statistic, state: State) -> State:
        """Over the devices that saw something of their own, as far as types tell."""
        if not params["check_vma"]:
            return statistic.across(state, axes)
        leaves, tree = jax.tree.flatten(state)
        leaves = _compat.match_varying(*leaves)
        names = tuple(a for a in axes if a in _compat.varying_axes(leaves[0]))
        state = jax.tree.unflatten(tree, leaves)
        return statistic.across(state, names) if names else state

    outs, found = jax.shard_map(
        inner, mesh=params["mesh"], in_specs=tuple(params["in_specs"]),
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        check_vma=params["check_vma"], axis_names=set(axes),
    )(*ins)  # fmt: skip
    own.add(found)
    return outs
