"""`make_plan`: runs the rewriter on shapes and says for each operation what it will be and why.

The lowering column is what the rewriter itself reports when it is given the quantized tree as
avals, so a plan cannot differ from what runs. Called by `jaxquant.algorithms.explain`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core import _compat, placement
from jaxquant.core.qtensor import QTensor
from jaxquant.core.recipe import Rule
from jaxquant.passes.abstract_weights import abstract_weight
from jaxquant.passes.assign_recipe import Assignment, ParamPlan
from jaxquant.passes.events import Event
from jaxquant.passes.interpreter import Weight
from jaxquant.passes.op_use import OpUse, Site
from jaxquant.passes.plan import Plan, PlanRow, Status
from jaxquant.passes.program import Program
from jaxquant.passes.rewrite import Rewriter

Events = dict[tuple[Site, str], Event]


def make_plan(
    program: Program,
    assignment: Assignment,
    notes: Sequence[str] = (),
    stored: Mapping[str, QTensor] | None = None,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """The plan of a program under a recipe, or of one whose weights are quantized already.

    Args:
      program: the float program.
      assignment: from `assign_recipe`, or `stored_assignment`.
      notes: remarks that the plan should carry.
      stored: the quantized weights by path; None for those that the assignment would make.
      inputs: by path of a weight fields of its `QTensor` that say what is done to its input.
    """
    weights: Mapping[str, QTensor] = stored or {
        p.path: abstract_weight(p, assignment.op_rules).replace(**(inputs or {}).get(p.path, {}))
        for p in assignment.quantized
    }
    events = _rewrite(program, weights, assignment.op_rules)
    sizes = {
        path: (_float_bytes(plan), weights[path].nbytes if path in weights else _float_bytes(plan))
        for path, plan in assignment.params.items()
    }
    known = {(use.site, use.param) for use in assignment.uses}
    lost = {
        path: event
        for (site, path), event in events.items()
        if event.action == "dequantized" and (site, path) not in known
    }
    rows: list[PlanRow] = []
    listed: set[str] = set()
    told: set[str] = set()
    for use, rule in zip(assignment.uses, assignment.rules, strict=True):
        if use.param is None:
            rows.append(_weightless_row(use, rule, events, assignment))
            continue
        plan = assignment.params[use.param]
        if use.primitive == "other" and plan.scheme is None:
            continue  # said once for the parameter, below
        first = use.primitive != "other" and use.param not in listed
        event = events.get((use.site, use.param))
        if event is None and use.primitive != "other":
            event = lost.get(use.param)  # it became an array on its way here
            told.update([use.param] if event else [])
        rows.append(_row(use, rule, plan, event, sizes[use.param], first))
        listed.update([use.param] if first else [])
    rows += [
        _unused_row(p, sizes[p.path]) for p in assignment.params.values() if p.path not in listed
    ]
    rows += [
        _event_row(event, assignment.params[path])
        for (site, path), event in events.items()
        if event.action == "dequantized" and (site, path) not in known and path not in told
    ]
    if not weights:
        notes = [*notes, "nothing is quantized: every row says why"]
    return Plan(assignment.recipe.name, tuple(rows), tuple(notes))


def _rewrite(program: Program, weights: Mapping[str, QTensor], op_rules: Sequence[Rule]) -> Events:
    """What the rewriter decides, by place and parameter."""
    events: Events = {}

    def record(event: Event) -> None:
        for path in event.path.split(","):
            known = events.get((event.site, path))
            # A site that is once dequantized is not what the plan may call quantized.
            if known is None or known.action == "quantized":
                events[event.site, path] = event

    if not weights:
        return events
    jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
    inputs = [
        Weight(_placed(weights[path], var.aval), path)
        if path is not None and path in weights
        else _struct(var.aval)
        for path, var in zip(program.paths, jaxpr.invars, strict=True)
    ]
    rewriter = Rewriter(on_event=record, op_rules=op_rules)
    jax.eval_shape(lambda values: rewriter.run(jaxpr, consts, values), inputs)
    return events


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=_compat.explicit_sharding(aval))


def _placed(weight: QTensor, aval: Any) -> QTensor:
    """The abstract weight, its parts sharded like the float they stand for where types say so."""
    sharding = _compat.explicit_sharding(aval)
    if sharding is None:
        return weight
    return placement.placed_structs(weight, sharding)


def _float_bytes(plan: ParamPlan) -> int:
    if jnp.issubdtype(plan.dtype, jax.dtypes.extended):
        return 0  # random keys: no storage that a plan could speak of
    return math.prod(plan.shape) * jnp.dtype(plan.dtype).itemsize


def _row(
    use: OpUse,
    rule: Rule | None,
    plan: ParamPlan,
    event: Event | None,
    sizes: tuple[int, int],
    first: bool,
) -> PlanRow:
    status: Status = "float"
    reason, lowering, why = plan.reason, "", ""
    if plan.scheme is not None:
        status, reason = _outcome(use, event)
        lowering, why = (event.lowering, event.reason) if event else ("", "")
        reason = "; ".join([*([reason] if reason else []), *(plan.notes if first else ())])
    decided = plan.rule if plan.scheme is not None else rule
    return PlanRow(
        path=use.module or _module(plan.path),
        cls=use.cls,
        kind=use.kind,
        param=plan.path,
        param_shape=plan.shape,
        x_shape=_shape(use.x),
        out_shape=_shape(use.out),
        rule=str(decided) if decided is not None else "",
        qtype=plan.scheme.qtype if plan.scheme else None,
        granularity=plan.scheme.granularity if plan.scheme else None,
        weight=str(plan.scheme) if plan.scheme else "",
        block_shape=plan.block_shape,
        act=str(plan.act) if plan.act and _quantizes_input(use, plan) else "",
        status=status,
        lowering=lowering,
        why=why,
        reason=reason,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        counts=first,
        source=use.source,
    )


def _quantizes_input(use: OpUse, plan: ParamPlan) -> bool:
    named = plan.act_ops is None or use.primitive in plan.act_ops
    return use.is_product and named and not use.backward


def _outcome(use: OpUse, event: Event | None) -> tuple[Status, str]:
    if use.primitive == "other":
        return "dequantized", use.detail
    if event is None:
        return "quantized", "not reached when the call is rewritten"
    if event.action == "dequantized":
        return "dequantized", event.reason
    return "quantized", ""


def _weightless_row(
    use: OpUse, rule: Rule | None, events: Events, assignment: Assignment
) -> PlanRow:
    event = events.get((use.site, ""))
    if event is not None:
        reason = ""
    elif rule is not None and rule.act is not None:
        reason = "a rule names it, but nothing in the tree is quantized"
    elif rule is not None:
        reason = f"{rule} skips it"
    elif use.kind == "attention":
        reason = "a product of two activations; only a rule with op='attention' names it"
    else:
        reason = "neither operand is a parameter"
    return PlanRow(
        path=use.module or "",
        cls=use.cls,
        kind=use.kind,
        x_shape=_shape(use.x),
        out_shape=_shape(use.out),
        rule=str(rule) if rule is not None else "",
        act=str(rule.act) if event and rule else "",
        status="quantized" if event else "float",
        lowering=event.lowering if event else "",
        why=event.reason if event else "",
        reason=reason,
        source=use.source,
    )


def _unused_row(plan: ParamPlan, sizes: tuple[int, int]) -> PlanRow:
    use = plan.uses[0] if plan.uses else None
    return PlanRow(
        path=(use.module if use else None) or _module(plan.path),
        cls=use.cls if use else None,
        kind="other",
        param=plan.path,
        param_shape=plan.shape,
        status="float",
        reason=plan.reason,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        counts=True,
        source=use.source if use else "",
    )


def _event_row(event: Event, plan: ParamPlan) -> PlanRow:
    """A weight that the rewriter turns to floats where no use of it was found."""
    return PlanRow(
        path=_module(plan.path),
        cls=None,
        kind="other",
        param=plan.path,
        param_shape=plan.shape,
        qtype=plan.scheme.qtype if plan.scheme else None,
        status="dequantized",
        lowering=event.lowering,
        reason=event.reason,
        source=event.source,
    )


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _shape(struct: Any) -> tuple[int, ...] | None:
    return None if struct is None else tuple(struct.shape)
