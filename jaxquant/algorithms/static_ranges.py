"""Static activation scales from calibration data. Called by `ptq` and by `qat`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.algorithms.calibrate import Call, run_batches
from jaxquant.core import _compat
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.schemes import ActScheme
from jaxquant.passes.abstract_weights import abstract_weight
from jaxquant.passes.assign_recipe import Assignment
from jaxquant.passes.common_inputs import common_inputs
from jaxquant.passes.histogram import Histogram, percentile_of_histogram
from jaxquant.passes.observe_rules import Observe
from jaxquant.passes.program import Program
from jaxquant.passes.statistics import AbsMax, Statistic


def input_scales(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    calls: Iterable[Call],
    assignment: Assignment,
) -> dict[str, Any]:
    """The static activation scale of each parameter whose scheme wants one."""
    plans = [p for p in assignment.quantized if p.act is not None and p.act.mode == "static"]
    if not plans:
        return {}
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree_util.tree_leaves(tree)):
        return {p.path: abstract_weight(p).input_scale for p in plans}
    acts = {p.path: p.act for p in plans if p.act is not None}
    statistics = {path: statistic_for(act) for path, act in acts.items()}
    stats = collect(fn, tree, paths, calls, statistics)
    unseen = [p.path for p in plans if p.path not in stats]
    if unseen:
        raise ValueError(f"no calibration batch reaches the product that {unseen[0]!r} is used in")
    idle = [p.path for p in plans if bool(jnp.any(_only_zeros(stats[p.path], statistics[p.path])))]
    if idle:
        warnings.warn(
            f"calibration saw nothing but zeros, or a branch or loop was not run, in front of"
            f" {', '.join(map(repr, idle[:5]))}{' and more' * (len(idle) > 5)}: the static scale of"
            " such an input is 1.0, whatever it will be. Calibrate with batches that reach it, or"
            " use a dynamic scheme for it",
            stacklevel=2,
        )
    return {
        p.path: input_scale(
            stats[p.path], statistics[p.path], acts[p.path], p.shape, p.layer_axes
        )
        for p in plans
    }


def input_groups(
    program: Program,
    assignment: Assignment,
    scales: Mapping[str, Any],
    factors: Mapping[str, Any],
) -> dict[str, str]:
    """Names for the weights that read the same inputs and do the same to them.

    Args:
      program: the float program.
      assignment: what becomes of it.
      scales: the static scales by path.
      factors: for weights with an input factor a key that is equal where the factors are.

    Returns:
      Path to name; weights that are alone with their scale or factor have none. It is the path of
      the first weight of the group. That the scales are equal follows from the program; it is
      looked at all the same, since steps that were trained need not be.
    """
    groups: dict[str, str] = {}
    if not scales and not factors:
        return groups
    for siblings in common_inputs(program, assignment.uses):
        left = [path for path in siblings if path in scales or path in factors]
        while len(left) > 1:
            first, *rest = left
            same = [
                path for path in rest
                if _equal(scales.get(first), scales.get(path))
                and factors.get(first) == factors.get(path)
            ]  # fmt: skip
            if same:
                groups.update(dict.fromkeys([first, *same], first))
            left = [path for path in rest if path not in same]
    return groups


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (a, b)):
        return True  # nothing was measured
    return not any(map(_compat.is_tracer, (a, b))) and np.array_equal(a, b)


def statistic_for(act: ActScheme) -> Statistic:
    """What has to be collected for a static scheme."""
    return AbsMax() if act.range == "absmax" else Histogram()


def collect(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    calls: Iterable[Call],
    statistics: Mapping[str, Statistic],
) -> dict[str, jax.Array]:
    """Statistics of the inputs of the given parameters' ops, over all calls.

    Args:
      fn: the float function ``fn(tree, *args, **kwargs)``.
      tree: its parameters.
      paths: name of each leaf of ``tree`` (see `trace`).
      calls: positional and keyword arguments of each batch.
      statistics: what is collected for each parameter.

    Returns:
      Parameter path to state; a parameter stacked by a scan has a leading layer axis.

    Raises:
      ValueError: there is no batch, or an input of some op is not finite.
    """
    rules = [Observe(path, (statistic,)) for path, statistic in statistics.items()]
    seen = run_batches(fn, tree, paths, calls, rules).seen
    return {path: states[statistics[path].name] for path, states in seen.items()}


def _only_zeros(stat: Any, statistic: Statistic) -> jax.Array:
    """Whether nothing but zeros was seen, of each layer; histograms have them in the first bin."""
    return jnp.max(stat[..., 1:], axis=-1) == 0 if isinstance(statistic, Histogram) else stat == 0


def input_scale(
    stat: Any, statistic: Statistic, act: ActScheme, shape: Sequence[int], layers: Sequence[int]
) -> jax.Array:
    """The static scale of an op's input, shaped to stand in the weight's QTensor.

    Args:
      stat: the collected state, one leading axis for each scan that stacks the weight.
      statistic: what it is: an `AbsMax` or a `Histogram`.
      act: the scheme; its range and percentile choose the largest magnitude that is kept.
      shape: shape of the weight.
      layers: axes of the weight that number layers.

    Returns:
      Float32 of the weight's rank, the size of each layer axis and 1 elsewhere. Where the layers
      were not told apart by the statistic all of them share one scale. 1.0 where only zeros were
      seen.
    """
    own = 1 if isinstance(statistic, Histogram) else 0
    stacked = stat.shape[: stat.ndim - own]
    if stacked != tuple(shape[axis] for axis in layers):
        for _ in stacked:
            stat = statistic.reduce(stat)
        layers = ()
    amax = stat if act.range == "absmax" else percentile_of_histogram(stat, act.percentile)
    limit = get_qtype(act.qtype).qmax
    scale = jnp.where(_only_zeros(stat, statistic), 1.0, amax / limit)
    sizes = [shape[axis] if axis in layers else 1 for axis in range(len(shape))]
    return scale.astype(np.float32).reshape(sizes)
