"""Random programs: drawn, quantized, and compared with the floats that they stand for.

`program` draws a chain of layers; `check` quantizes its parameters as the library would, runs the
float function on dequantized weights and the rewritten one on codes, and asserts what must hold of
any program. Used by `test_random_programs` and, with other seeds and more of them, by
`python -m benchmarks.random_programs`.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxquant.core import _compat
from jaxquant.core.blocks import scale_shape
from jaxquant.core.qtensor import QTensor, is_qtensor, make_qtensor
from jaxquant.core.recipe import ActScheme, Recipe, Rule, WeightScheme
from jaxquant.frontends.function import transform
from jaxquant.passes.assign_recipe import Assignment, ParamPlan, assign_recipe
from jaxquant.passes.events import Event
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.make_plan import make_plan
from jaxquant.passes.op_use import OpUse
from jaxquant.passes.param_blocks import GroupSizeError
from jaxquant.passes.plan import Plan
from jaxquant.passes.program import trace
from tests.passes import random_control, random_layers
from tests.passes.random_layers import Layer, Made, quantized_activations
from tests.passes.random_weights import Builder, Draw, Shape

# Cheap to compile: programs are small, and each runs once.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass
class Program:
    """A random program and how it is to be quantized.

    Attributes:
      builder: what was drawn.
      fn: the program: parameters, activation and indices to a result.
      x_shape: shape of the activation.
      weight: scheme of its weights.
      act: scheme of the activations, or None.
    """

    builder: Builder
    fn: Callable[[dict[str, Any], Any, dict[str, Any]], Any]
    x_shape: Shape
    weight: WeightScheme
    act: ActScheme | None


def program(draw: Draw) -> Program:
    """Draws a program."""
    act = draw((None, ActScheme()))
    dtype = "float64" if act is not None else draw(("float32", "float64"))
    b = Builder(draw, dtype)
    x_shape: Shape = draw(((4, 8), (8,), (2, 3, 4), (6, 4), (2, 2, 3, 4), (3, 1, 8)))
    layers: list[Layer] = []
    shape = x_shape
    for _ in range(draw((1, 2, 2, 3))):
        fn, shape = _layer(b, shape, depth=0)
        layers.append(fn)
    scheme = draw(
        (
            WeightScheme("int8"),
            WeightScheme("int8"),
            WeightScheme("int8", granularity="tensor"),
            WeightScheme("int8", group_size=2),
            WeightScheme("int8", symmetric=False),
        )
    )
    tops = draw((False, False, True))

    def run(p: dict[str, Any], x: Any, given: dict[str, Any]) -> Any:
        p = {**p, **given}
        for fn in layers:
            x = fn(p, x)
        return {"x": x, "handed on": next(iter(p.values()))} if tops else x

    return Program(b, run, x_shape, scheme, act)


def _layer(b: Builder, shape: Shape, depth: int) -> Made:
    if depth < 2 and b.maybe(45 if depth == 0 else 25):
        kinds = random_control.WRAPPERS + ((random_control.noted,) if depth == 0 else ())
        wrap = b.draw(kinds)
        fn, out = wrap(b, shape, lambda b, shape: _layer(b, shape, depth + 1))
    else:
        fn, out = b.draw(random_layers.LAYERS)(b, shape)
    if not out:
        return (lambda p, x: jnp.reshape(fn(p, x), (1,))), (1,)
    if np.prod(out) > 300:
        return (lambda p, x: random_layers.resized(fn(p, x), (4, 8))), (4, 8)
    return fn, out


@dataclasses.dataclass
class Outcome:
    """What a check found.

    Attributes:
      error: largest difference to the oracle over the largest magnitude of the result.
      primitives: how often each primitive occurs in the float program.
      quantized: how many parameters were quantized.
      activations: whether activations were quantized.
      statuses: how many rows of the plan have which status.
      edge: how it differed where a value lay on the edge between two codes; "" if none did.
    """

    error: float
    primitives: collections.Counter[str]
    quantized: int
    activations: bool
    statuses: collections.Counter[str]
    edge: str = ""


def check(case: Program, seed: int = 0) -> Outcome:
    """Quantizes a program and asserts what must hold of it.

    Where activations are rounded a value may lie on the edge between two codes, to the last bit of
    a sum: then the program must be right for two other draws of its values.

    Raises:
      AssertionError: something does not hold.
    """
    try:
        return _checked(case, seed)
    except DiffersError as error:
        if case.act is None:
            raise
        _checked(case, seed + 1_000_003)
        outcome = _checked(case, seed + 2_000_003)
        return dataclasses.replace(outcome, edge=error.args[0])


class DiffersError(AssertionError):
    """The result is not the oracle's."""


def _checked(case: Program, seed: int) -> Outcome:
    rng = np.random.default_rng(seed)
    b = case.builder
    params = {n: rng.standard_normal(s).astype(b.dtype) for n, s in b.shapes.items()}
    x = rng.standard_normal(case.x_shape).astype(b.dtype)
    given = {
        "index": np.int32(1),
        "ids": np.array([0, 2, 1, 2], np.int32),
        "factor": np.asarray(0.75, b.dtype),
    }
    traced = trace(case.fn, params, (x, given))
    uses = find_weights(traced)
    assignment = _assign(case, traced, uses)
    plan = make_plan(traced, assignment)
    tree, floats = dict(params), dict(params)
    for p in assignment.quantized:
        tree[p.path], floats[p.path] = _quantize(params[p.path], p)

    events: list[Event] = []
    quantized = transform(case.fn, on_event=events.append)
    after, result = jax.make_jaxpr(quantized, return_shape=True)(tree, x, given)
    exact = _check_decisions(case, plan, assignment, events)
    if case.act is not None and not exact:  # the oracle knows no product of an array by surprise
        return _checked(dataclasses.replace(case, act=None), seed)
    again = jax.make_jaxpr(transform(case.fn))(tree, x, given)
    assert _text(after) == _text(again), "the same program twice gives two jaxprs"
    _check_effects(traced.jaxpr, after)

    with quantized_activations(p.path for p in assignment.quantized if p.act is not None):
        oracle = jax.make_jaxpr(case.fn)(floats, x, given)

    def both(quantized: Any, floats: Any) -> Any:
        outs = jaxpr_as_fun(after)(*quantized)
        return outs, jaxpr_as_fun(oracle)(*floats)

    inputs = jax.tree.leaves((tree, x, given)), jax.tree.leaves((floats, x, given))
    compiled = jax.jit(both).lower(*inputs).compile(compiler_options=_OPTIONS)
    actual, expected = compiled(*inputs)
    error = _error(jax.tree.unflatten(jax.tree.structure(result), actual), expected)
    base = 1e-10 if b.dtype == "float64" else 2e-3
    if b.rounding:  # to float32, or to bfloat16
        base = max(base, 1e-4 if b.rounding < 1e-6 else 0.25)
    if not error <= base:
        raise DiffersError(f"differs by {error:.3g} of the largest value")
    return Outcome(
        error,
        collections.Counter(primitives_of(traced.jaxpr)),
        len(assignment.quantized),
        case.act is not None,
        collections.Counter(row.status for row in plan.rows),
    )


def _assign(case: Program, traced: Any, uses: Sequence[OpUse]) -> Assignment:
    """By channel where the groups do not fit."""
    for scheme in (case.weight, WeightScheme("int8")):
        recipe = Recipe("random", (Rule(weight=scheme, act=case.act, optional=True),))
        try:
            return assign_recipe(uses, traced.parameters, recipe)
        except GroupSizeError:
            continue
    raise AssertionError("int8 by channel fits everything")


def _quantize(w: np.ndarray, plan: ParamPlan) -> tuple[QTensor, np.ndarray]:
    """A weight by the plan, in numpy, and the floats that it stands for."""
    assert plan.scheme is not None and plan.block_shape is not None
    digits = [n for size, b in zip(w.shape, plan.block_shape) for n in (size // b, b)]
    blocks, inner = w.reshape(digits), tuple(range(1, len(digits), 2))
    shape = scale_shape(w.shape, plan.block_shape)
    if plan.scheme.symmetric:
        scale = np.abs(blocks).max(inner, keepdims=True).astype(np.float32) / np.float32(127)
        zero = np.zeros_like(scale)
    else:
        low = np.minimum(blocks.min(inner, keepdims=True), 0).astype(np.float32)
        high = np.maximum(blocks.max(inner, keepdims=True), 0).astype(np.float32)
        scale = (high - low) / np.float32(255)
        zero = np.round(-low / scale) - 128
    codes = np.clip(np.round(blocks / scale) + zero, -128, 127)
    value = ((codes - zero) * scale.astype(w.dtype)).reshape(w.shape).astype(w.dtype)
    parts = (None if plan.scheme.symmetric else zero.reshape(shape).astype(np.int8),)
    weight = make_qtensor(
        codes.reshape(w.shape).astype(np.int8), scale.reshape(shape), *parts,
        qtype="int8", dtype=w.dtype, act=plan.act,
    )  # fmt: skip
    return weight.replace(act_ops=plan.act_ops), value


def _values(weight: Any) -> np.ndarray:
    """The floats of a weight that came back as it is."""
    values = np.asarray(weight.codes, np.float64)
    parts = [weight.scale] if weight.zero_point is None else [weight.scale, weight.zero_point]
    spread = [np.asarray(part, np.float64) for part in parts]
    for axis, n in enumerate(values.shape):
        spread = [np.repeat(part, n // part.shape[axis], axis) for part in spread]
    scale, *zero = spread
    return ((values - (zero[0] if zero else 0)) * scale).astype(weight.dtype)


def _check_decisions(
    case: Program, plan: Plan, assignment: Assignment, events: Sequence[Event]
) -> bool:
    """What was found, what is planned and what is done are the same, and nothing else is done.

    Returns:
      Whether every weight kept its codes wherever its use alone lets it.
    """
    paths = {p.path for p in assignment.quantized}
    found = {
        (use.site, use.param): "dequantized" if use.primitive == "other" else "quantized"
        for use in assignment.uses
        if use.param in paths
    }
    # Rows that a product takes for weights are not listed as a lookup.
    done = {
        (e.site, path): e.action
        for e in events
        for path in e.path.split(",")
        if e.primitive != "gather" or e.action == "dequantized" or (e.site, path) in found
    }
    surprises = {e for e in events if e.action == "dequantized" and not _known(e, found)}
    for event in surprises:
        assert _scales_forbid(event, assignment), f"dequantized, which nothing foresaw: {event}"
    lost = {path for e in surprises for path in e.path.split(",")}
    for place in found.keys() | done.keys():
        if place[1] not in lost:
            assert found.get(place) == done.get(place), (
                f"{place}: found {found.get(place)}, done {done.get(place)}"
            )
    said = {r.param for r in plan.rows if r.status == "dequantized"}
    drawn = paths & case.builder.opaque
    if not case.builder.takes_gradients:  # what they keep of a weight may be an array
        assert said == drawn | lost, f"dequantized: {said}, drawn {drawn}, {lost}"
    for row in plan.rows:
        assert row.reason or row.lowering, f"no reason: {row}"
        assert "not reached" not in row.reason, row
    return not lost


def _known(event: Event, found: dict[Any, str]) -> bool:
    return all(found.get((event.site, path)) == "dequantized" for path in event.path.split(","))


def _scales_forbid(event: Event, assignment: Assignment) -> bool:
    """Whether the reason is one that only the scales know, not the shapes."""
    quantized = {p.path for p in assignment.quantized}
    mixed = {u.param for u in assignment.uses if not quantized.issuperset(u.joined)}
    reasons = ("would have to be repeated", "cuts groups", "may cut groups", "joined with")
    return event.path in mixed or any(reason in event.reason for reason in reasons)


def _check_effects(before: Any, after: Any) -> None:
    names = [sorted(type(e).__name__ for e in jaxpr.effects) for jaxpr in (before, after)]
    assert names[0] == names[1], f"effects {names[0]} became {names[1]}"
    for callback in ("debug_callback", "io_callback"):
        counts = [primitives_of(jaxpr).count(callback) for jaxpr in (before, after)]
        assert counts[0] == counts[1], f"{counts[0]} {callback} became {counts[1]}"


def _text(jaxpr: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))


def primitives_of(jaxpr: Any) -> list[str]:
    """Names of all primitives of a jaxpr and its sub-jaxprs."""
    names = []
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        names.append(str(eqn.primitive))
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    names += primitives_of(sub)
    return names


def _error(actual: Any, expected: Any) -> float:
    """Largest difference over the largest magnitude; infinite where NaNs differ."""
    worst = 0.0
    got = jax.tree.leaves(actual, is_leaf=is_qtensor)
    for a, e in zip(got, jax.tree.leaves(expected), strict=True):
        a = _values(a) if is_qtensor(a) else a
        assert a.shape == e.shape and a.dtype == e.dtype, f"{a.shape} {a.dtype} for {e.shape}"
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        if not np.array_equal(np.isnan(a), np.isnan(e)):
            return float("inf")
        size = max(float(np.nanmax(np.abs(e), initial=0)), 1e-6)
        worst = max(worst, float(np.nanmax(np.abs(a - e), initial=0)) / size)
    return worst
