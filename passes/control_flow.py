"""Rules that rebuild equations with sub-jaxprs around weights, and keep what the user wrote.

jit stays jit (tiny bodies are inlined), remat stays remat with its policy, scan, while and cond
keep their form, shard_map keeps its mesh. Weights go in as pytrees. A weight that a loop carries
unchanged is a constant of the loop; whatever else leaves a loop or a branch as a weight leaves it
as an array. Called by `interpreter` through the table `CONTROL`; the rules of custom derivatives
are in `custom_derivatives`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp
from jax.sharding import PartitionSpec

from jaxquant.core import _compat, placement, prepared
from jaxquant.core.qtensor import QTensor
from jaxquant.core.remat_policy import as_dot_policy
from jaxquant.passes.forwarding import forwarded_operands
from jaxquant.passes.interpreter import Context, Rule, Weight, is_weight, register

CONTROL: dict[Primitive, Rule] = {}

# A jitted body of this many equations or fewer is inlined: jnp wraps single einsums and takes in
# jit, and rebuilding each would double the cost of the rewrite.
INLINE_EQUATIONS = 8


def _has_sub_jaxpr(eqn: Any) -> bool:
    return any(
        hasattr(v, "eqns") or hasattr(v, "jaxpr")
        for p in eqn.params.values()
        for v in (p if isinstance(p, (tuple, list)) else (p,))
    )


@register(CONTROL, jp.jit_p)
def jit_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """Rebuilds a jitted call: name, donation and shardings of the array arguments are kept."""
    params = ctx.params
    body, _ = _compat.open_jaxpr(params["jaxpr"])
    placed = not all(
        map(_compat.is_unspecified, (*params["in_shardings"], *params["out_shardings"]))
    )
    donated = [i for i, d in enumerate(params["donated_invars"]) if d and not is_weight(ins[i])]

    def inner(*args: Any) -> list[Any]:
        args = tuple(map(_constrain, args, params["in_shardings"]))
        outs = ctx.run(0, params["jaxpr"], args)
        return list(map(_constrain, outs, params["out_shardings"]))

    small = len(body.eqns) <= INLINE_EQUATIONS and not any(map(_has_sub_jaxpr, body.eqns))
    if small and not placed and not donated:
        with jax.named_scope(params["name"]):
            return inner(*ins)
    inner.__name__ = inner.__qualname__ = params["name"]
    call = jax.jit(inner, keep_unused=params["keep_unused"], donate_argnums=donated)
    return call(*ins)


def _constrain(value: Any, sharding: Any) -> Any:
    if _compat.is_unspecified(sharding) or is_weight(value):
        return value  # a weight keeps the placement of its parts
    return jax.lax.with_sharding_constraint(value, sharding)


@register(CONTROL, *_compat.call_primitives)
def call_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """A plain call is inlined."""
    return ctx.run(0, ctx.params.get("call_jaxpr", ctx.params.get("jaxpr")), ins)


@register(CONTROL, jp.remat_p)
def remat_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """Remat stays remat; its policy sees a quantized dot as the dot it stands for."""
    params = {**ctx.params, "policy": as_dot_policy(ctx.params["policy"])}
    return _compat.bind_remat(
        lambda *args: ctx.run(0, ctx.params["jaxpr"], args), tuple(ins), params=params
    )


@register(CONTROL, jp.scan_p)
def scan_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """Weights enter a scan as constants, or stacked and sliced along their first axis."""
    params = ctx.params
    num_consts, num_carry = _compat.scan_arity(ctx.eqn)
    consts, carry, xs = _split(ins, num_consts, num_carry)
    entries = [_stacked(x, ctx) if is_weight(x) else (x, None) for x in xs]
    xs, backs = [x for x, _ in entries], [back for _, back in entries]
    state, fixed = separate_invariant(ctx, carry)
    # Layers that the body hands on are stacked again as they were: the weight itself.
    sources = forwarded_operands(ctx.eqn)[num_carry:]
    kept = {i: ins[k] for i, k in enumerate(sources) if k is not None and is_weight(ins[k])}

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        x = [
            part if back is None else part.replace(value=back(part.value))
            for part, back in zip(x, backs, strict=True)
        ]
        outs = ctx.run(0, params["jaxpr"], [*consts, *merge_fixed(state, fixed), *x])
        new = [_array(ctx, out) for i, out in enumerate(outs[:num_carry]) if i not in fixed]
        ys = [_array(ctx, y) for i, y in enumerate(outs[num_carry:]) if i not in kept]
        return _like(new, state), ys

    state, ys = jax.lax.scan(
        step, state, xs, length=params["length"], reverse=params["reverse"],
        unroll=params["unroll"],
    )  # fmt: skip
    return [*merge_fixed(state, fixed), *merge_fixed(ys, kept)]


@register(CONTROL, jp.while_p)
def while_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """Weights enter a while loop as constants."""
    params = ctx.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = _split(ins, num_cond, num_body)
    state, fixed = separate_invariant(ctx, carry)

    def running(state: Sequence[Any]) -> Any:
        (out,) = ctx.run(0, params["cond_jaxpr"], [*cond_consts, *merge_fixed(state, fixed)])
        return out

    def step(state: Sequence[Any]) -> Sequence[Any]:
        outs = ctx.run(1, params["body_jaxpr"], [*body_consts, *merge_fixed(state, fixed)])
        new = [_array(ctx, out) for i, out in enumerate(outs) if i not in fixed]
        return _like(new, state)

    loops = finished_stay(ctx, running, step)
    return merge_fixed(jax.lax.while_loop(*loops, state), fixed)


def finished_stay(
    ctx: Context, running: Callable[[Any], Any], step: Callable[[Any], Any]
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Condition and step for `lax.while_loop`, also where the equation has several conditions.

    A loop that was mapped has one for each: it goes on while any of them holds, and where one does
    not, its part of the state stays as it is.

    Args:
      ctx: context of the while equation.
      running: from the state to the condition, or to an array of them.
      step: from the state, a list of arrays, to the next. If there are several conditions, their
        axes are in front in all of them.
    """
    (out,) = _compat.open_jaxpr(ctx.params["cond_jaxpr"])[0].outvars
    if not out.aval.shape:
        return running, step

    def step_where_running(state: Any) -> list[Any]:
        mask = running(state)

        def chosen(new: Any, old: Any) -> Any:
            return jax.lax.select(jax.lax.broadcast_in_dim(mask, old.shape, axes), new, old)

        axes = range(mask.ndim)
        return list(map(chosen, step(state), state))

    return lambda state: running(state).any(), step_where_running


@register(CONTROL, jp.cond_p)
def cond_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """Every branch gets the weights; what leaves a branch is an array."""

    def branch(sub: int, jaxpr: Any) -> Any:
        return lambda *args: [_array(ctx, out) for out in ctx.run(sub, jaxpr, args)]

    index, *operands = ins
    branches = [branch(i, jaxpr) for i, jaxpr in enumerate(ctx.params["branches"])]
    outs = choose(ctx.eqn, index, branches, operands)
    return _like(outs, [v.aval for v in ctx.eqn.outvars])


def choose(
    eqn: Any, index: Any, branches: Sequence[Callable[..., Any]], operands: Sequence[Any]
) -> Any:
    """`lax.switch`, or `lax.platform_dependent` where that is what a cond equation stands for.

    There each branch is lowered for its own platforms only, and may hold what no other has.

    Args:
      eqn: the cond equation.
      index: which branch is taken.
      branches: what comes in the place of its branches.
      operands: their arguments.
    """
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return jax.lax.switch(index, branches, *operands)
    default = None
    per_platform: dict[str, Callable[..., Any]] = {}
    for names, branch in zip(platforms, branches, strict=True):
        if names is None:
            default = branch
        else:
            per_platform |= dict.fromkeys(names, branch)
    return jax.lax.platform_dependent(*operands, default=default, **per_platform)


@register(CONTROL, _compat.shard_map_p)
def shard_map_rule(ctx: Context, ins: list[Any]) -> list[Any]:
    """A weight's codes and scales are split like the weight they stand for."""
    params = ctx.params
    mesh, in_specs = params["mesh"], params["in_specs"]
    pairs = [
        _weight_spec(ctx, x, spec, mesh) if is_weight(x) else (x, spec)
        for x, spec in zip(ins, in_specs, strict=True)
    ]
    args, specs = [p[0] for p in pairs], [p[1] for p in pairs]

    def inner(*local: Any) -> list[Any]:
        outs = ctx.run(0, params["jaxpr"], local)
        return [_array(ctx, out) for out in outs]

    return jax.shard_map(
        inner, mesh=mesh, in_specs=tuple(specs), out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"], axis_names=set(params["newly_manual_axes"]),
    )(*args)  # fmt: skip


def _weight_spec(
    ctx: Context, weight: Weight, spec: PartitionSpec, mesh: Any
) -> tuple[Any, Any]:
    """The weight, its scale blocks made fine enough to be split by ``spec``, and its specs.

    An array where its input is turned along an axis that would be split.
    """
    value = weight.value
    if not isinstance(value, QTensor):
        return weight, spec
    shards = [placement.spec_axis_size(mesh, spec[i]) for i in range(len(spec))]
    shards += [1] * (value.ndim - len(shards))
    if value.input_turn is not None and shards[value.input_turn.axis] > 1:
        reason = "its input is turned along an axis of which each device has a part"
        return ctx.float(weight, reason), spec
    value = placement.refine_for_sharding(value, shards)
    weight = weight.replace(value=value)
    specs = jax.tree_util.tree_map(lambda p: placement.part_spec(p.shape, spec, mesh), weight)
    return weight, specs


def _split(ins: list[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return ins[:first], ins[first : first + second], ins[first + second :]


def separate_invariant(ctx: Context, carry: list[Any]) -> tuple[list[Any], dict[int, Weight]]:
    """Splits a loop's carry into arrays and weights that the body returns untouched.

    Args:
      ctx: context of the loop.
      carry: initial values.

    Returns:
      The carried arrays, and by position the weights, which are constants of the loop.
    """
    same = [source is not None for source in forwarded_operands(ctx.eqn)]
    fixed = {i: x for i, x in enumerate(carry) if is_weight(x) and same[i]}
    return [_array(ctx, x) for i, x in enumerate(carry) if i not in fixed], fixed


def merge_fixed(state: Sequence[Any], fixed: dict[int, Weight]) -> list[Any]:
    """The full carry again, from what `separate_invariant` gave."""
    rest = iter(state)
    return [fixed[i] if i in fixed else next(rest) for i in range(len(state) + len(fixed))]


def _array(ctx: Context, value: Any) -> Any:
    return ctx.float(value, f"it leaves or is carried by {ctx.eqn.primitive} as a value")


def _like(values: Sequence[Any], examples: Sequence[Any]) -> list[Any]:
    """Weak types can differ from the traced ones; the dtypes of a loop's state may not."""
    return [
        v if v.dtype == e.dtype else v.astype(e.dtype)
        for v, e in zip(values, examples, strict=True)
    ]


def _stacked(weight: Weight, ctx: Context) -> tuple[Weight, Callable[[QTensor], QTensor] | None]:
    """What the scan slices, and what makes a layer's QTensor of a slice."""
    value, back = weight.value, None
    if isinstance(value, QTensor):
        value, back = prepared.into_scan(placement.with_full_leading_axis(value))
    return weight.replace(value=value, levels=(*weight.levels, ctx.site)), back
