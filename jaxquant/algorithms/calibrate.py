"""Runs calibration batches and turns what the observers saw into static activation scales.

Called by `ptq`. The statistics come from `jaxquant.passes.observers`: one pure, compiled program a
batch signature, whose results are merged on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.qtypes import get_qtype
from jaxquant.core.schemes import ActScheme
from jaxquant.passes.observers import insert_observers
from jaxquant.passes.program import is_traceable, trace
from jaxquant.passes.statistics import (
    AbsMax,
    Histogram,
    Statistic,
    percentile_of_histogram,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


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
      Parameter path to statistic; a parameter stacked by a scan has a leading layer axis.

    Raises:
      ValueError: there is no batch, or an input of some op is not finite.
    """
    compiled: dict[Any, tuple[Any, Any]] = {}
    total: dict[str, jax.Array] = {}
    count = 0
    for args, kwargs in calls:
        key = _signature(args, kwargs)
        if key not in compiled:
            program = trace(fn, tree, args, kwargs, paths)
            compiled[key] = program, jax.jit(insert_observers(program, statistics))
        program, observed = compiled[key]
        found = observed(*program.flatten(tree, *args, **kwargs))
        for path, stat in found.items():
            total[path] = statistics[path].merge(total[path], stat) if path in total else stat
        count += 1
    if not count:
        raise ValueError("calibration is empty: a static activation range needs a batch of data")
    bad = [path for path, stat in total.items() if not bool(jnp.isfinite(stat).all())]
    if bad:
        raise ValueError(f"calibration: what is multiplied with {bad[0]!r} is not finite")
    return total


def _signature(args: Any, kwargs: Any) -> Any:
    leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
    return tree, tuple(
        (x.shape, x.dtype) if is_traceable(x) else (type(x), repr(x)) for x in leaves
    )


def input_scale(
    stat: Any, statistic: Statistic, act: ActScheme, shape: Sequence[int], layers: Sequence[int]
) -> jax.Array:
    """The static scale of an op's input, shaped to stand in the weight's QTensor.

    Args:
      stat: the collected statistic, one leading axis for each scan that stacks the weight.
      statistic: what it is.
      act: the scheme; its range and percentile choose the largest magnitude that is kept.
      shape: shape of the weight.
      layers: axes of the weight that number layers.

    Returns:
      Float32 of the weight's rank, the size of each layer axis and 1 elsewhere. Where the layers
      were not told apart by the statistic all of them share one scale.
    """
    stacked = stat.shape[: stat.ndim - len(statistic.shape)]
    if stacked != tuple(shape[axis] for axis in layers):
        for _ in stacked:
            stat = statistic.reduce(stat)
        layers = ()
    amax = stat if act.range == "absmax" else percentile_of_histogram(stat, act.percentile)
    limit = get_qtype(act.qtype).qmax
    scale = jnp.where(amax > 0, amax / limit, 1.0)
    sizes = [shape[axis] if axis in layers else 1 for axis in range(len(shape))]
    return scale.astype(np.float32).reshape(sizes)
