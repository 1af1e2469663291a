"""`jq.calibrate`: batches through a float model, and statistics of what meets its weights.

The statistics come from `jaxquant.passes.insert_observers`: one pure, compiled program a batch
signature, whose state stays on the device and is donated from batch to batch. `ptq` turns some of
them into static activation scales (`static_ranges`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxquant.core.qtensor import is_qtensor
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.batches import call_arguments, check_batches
from jaxquant.frontends.marks import recipe_of
from jaxquant.passes.insert_observers import Observation, Seen, check_finite, check_rules, read
from jaxquant.passes.observe_rules import Observe, observe_rules
from jaxquant.passes.program import is_traceable, trace
from jaxquant.passes.statistics import Statistic
from jaxquant.passes.statistics_view import Calibration

Call = tuple[tuple[Any, ...], dict[str, Any]]


def calibrate(
    model: Any,
    *args: Any,
    calibration: Iterable[Any] | None = None,
    statistics: Any = "absmax",
    **kwargs: Any,
) -> Calibration:
    """Statistics of a float model's activations over batches of data.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      *args: Linen: the variables; function: its parameters; NNX: nothing. Then, where there is no
        ``calibration``, the model's own arguments as the only batch.
      calibration: batches: each is an array, a tuple of positional arguments or a mapping of
        keyword arguments. Read once, one batch at a time.
      statistics: a name, a `Statistic`, `Observe` lines, a sequence of these, or a mapping from
        globs over parameter paths to them. Names: `jaxquant.passes.observe_rules.STATISTICS`.
      **kwargs: keyword arguments of the model, part of each batch.

    Returns:
      A mapping ``{path: {name: array}}``; print it for a table. Where scans stack layers so are
      their statistics, along the first axis. What it takes on the device is what
      ``jq.explain(..., observers=statistics)`` predicts.

    Raises:
      ValueError: there is no batch, a rule matches nothing, data that is not finite (the operation
        is named), channels that differ between batches, or a tree that is quantized already.
    """
    if recipe_of(model) is None:
        model = quantize(model)
    adapter = describe(model)
    given, rest = ((), args) if adapter.kind == "nnx" else (args[:1], args[1:])
    fn, tree = adapter.pure(*given)
    if any(map(is_qtensor, jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor))):
        raise ValueError("calibrate takes the float tree; this one is quantized already")
    if rest and calibration is not None:
        raise ValueError("give the model's arguments or calibration=, not both")
    calls: Iterable[Call] = [(rest, kwargs)] if rest else batch_calls(calibration, kwargs)
    rules = observe_rules(statistics)
    run = run_batches(fn, tree, adapter.param_paths(tree), calls, rules)
    check_rules(rules, run.met)
    return Calibration(read(run.seen, run.statistics), run.bytes)


def batch_calls(calibration: Iterable[Any] | None, kwargs: Mapping[str, Any]) -> Iterator[Call]:
    """The arguments of each calibration batch; none where `calibration` is None."""
    if calibration is None:
        return
    check_batches(calibration, "calibration")
    for number, batch in enumerate(calibration):
        args, own = call_arguments(batch, f"calibration batch {number}")
        yield args, {**kwargs, **own}


class Run:
    """What came of some batches.

    Attributes:
      seen: states by path and name.
      statistics: what they are states of.
      met: all operands that could have been observed; True for those that meet a weight.
      bytes: bytes of the whole state.
    """

    def __init__(self) -> None:
        self.seen: Seen = {}
        self.statistics: dict[str, dict[str, Statistic]] = {}
        self.met: dict[str, bool] = {}
        self.bytes = 0


def run_batches(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    calls: Iterable[Call],
    rules: Sequence[Observe],
) -> Run:
    """Accumulates statistics over all calls.

    Args:
      fn: the float function ``fn(tree, *args, **kwargs)``.
      tree: its parameters.
      paths: name of each leaf of ``tree`` (see `trace`).
      calls: positional and keyword arguments of each batch.
      rules: what is observed.

    Raises:
      ValueError: there is no batch, or something observed is not finite.
    """
    compiled: dict[Any, tuple[Observation, Any]] = {}
    state: dict[str, Any] | None = None
    run = Run()
    for args, kwargs in calls:
        key = _signature(args, kwargs)
        if key not in compiled:
            observation = Observation(trace(fn, tree, args, kwargs, paths), rules)
            compiled[key] = observation, jax.jit(observation.accumulate, donate_argnums=0)
            run.statistics |= observation.statistics
            run.met |= observation.met
            # A state of other calls may hold operands that this program does not see.
            observation.statistics = {**run.statistics, **observation.statistics}
        observation, accumulate = compiled[key]
        state = observation.init() if state is None else observation.extended(state)
        state = accumulate(state, *observation.program.flatten(tree, *args, **kwargs))
    if state is None:
        raise ValueError("calibration is empty: statistics of activations need a batch of data")
    run.seen = state["seen"]
    run.bytes = sum(x.nbytes for x in jax.tree_util.tree_leaves(state))
    check_finite(run.seen, [path for path, weight in run.met.items() if weight])
    return run


def _signature(args: Any, kwargs: Any) -> Any:
    leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
    return tree, tuple(
        (x.shape, x.dtype) if is_traceable(x) else (type(x), repr(x)) for x in leaves
    )


def chain(first: Call | None, calls: Iterable[Call]) -> Iterable[Call]:
    """The calls with the one that was taken off their front."""
    return () if first is None else itertools.chain([first], calls)
