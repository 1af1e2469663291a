"""How jaxquant times things: warmed up, interleaved, blocked, repeated; median and quartiles.

For: the latency part of :func:`jaxquant.compare`, and benchmarks. It knows callables only, no
models, so it must not import anything of jaxquant.

Protocol. Every candidate is first called ``warmup`` times. Then, in each of ``rounds`` rounds,
every candidate is run once, in an order shuffled anew each round, so that a machine that slows down
slows all of them. A run begins with a call that is not timed: what ran before has emptied the
caches, and a candidate is not to pay for its neighbour. A run waits for its result
(``jax.block_until_ready``). A call shorter than ``min_sample_s`` is repeated within the run, each
call waited for, and the run's time is divided.
Compilation must have happened before: time it with :func:`timed`, apart from the rest.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class LatencyOptions:
    """How long and how often to time.

    Attributes:
      rounds: runs of every candidate.
      warmup: calls of every candidate before the first run.
      min_sample_s: a run repeats its call until it takes about this long, in seconds.
      max_seconds: no new round starts after this long; at least three rounds are run.
      seed: of the shuffled order.
    """

    rounds: int = 30
    warmup: int = 2
    min_sample_s: float = 10e-3
    max_seconds: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0:
            raise ValueError(
                f"latency needs rounds >= 1 and warmup >= 0; got rounds={self.rounds}, "
                f"warmup={self.warmup}"
            )


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate: median, quartiles, extremes, and every run."""

    median_s: float
    q25_s: float
    q75_s: float
    min_s: float
    samples_s: tuple[float, ...]
    calls_per_sample: int


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster a candidate is than the baseline: median and quartiles over rounds."""

    median: float
    q25: float
    q75: float


def timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    """Calls ``fn`` once, waits for what it returns, and gives the result and the seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(fn())
    return result, time.perf_counter() - start


def measure_latency(
    candidates: Mapping[str, Callable[[], Any]], options: LatencyOptions | None = None
) -> dict[str, Timing]:
    """Times callables against each other by the module's protocol.

    Args:
      candidates: name to a callable without arguments, compiled already; what it returns is waited
        for.
      options: how long and how often.

    Returns:
      Name to :class:`Timing`; sample ``i`` of every candidate is of the same round ``i``.

    Raises:
      ValueError: if there is no candidate.
    """
    options = options or LatencyOptions()
    if not candidates:
        raise ValueError("nothing to time: no candidates")
    repeats = {name: _warm(fn, options) for name, fn in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, rng = list(candidates), random.Random(options.seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(options.rounds):
            if done >= 3 and time.perf_counter() - start > options.max_seconds:
                break
            rng.shuffle(order)
            for name in order:
                samples[name].append(_run(candidates[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(samples[name], repeats[name]) for name in candidates}


def speedup(baseline: Timing, candidate: Timing) -> Ratio:
    """Baseline time over candidate time, round by round (both from one :func:`measure_latency`)."""
    pairs = zip(baseline.samples_s, candidate.samples_s, strict=True)
    q25, median, q75 = np.quantile([base / cand for base, cand in pairs], [0.25, 0.5, 0.75])
    return Ratio(float(median), float(q25), float(q75))


def _warm(fn: Callable[[], Any], options: LatencyOptions) -> int:
    """Warms up; returns how many calls make one run."""
    for _ in range(options.warmup):
        timed(fn)
    took = min(timed(fn)[1] for _ in range(3))
    return max(1, round(options.min_sample_s / took)) if took < options.min_sample_s else 1


def _run(fn: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(fn())
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(fn())
    return (time.perf_counter() - start) / repeats


def _timing(samples: list[float], repeats: int) -> Timing:
    q25, q75 = np.quantile(samples, [0.25, 0.75])
    return Timing(
        median_s=statistics.median(samples),
        q25_s=float(q25),
        q75_s=float(q75),
        min_s=min(samples),
        samples_s=tuple(samples),
        calls_per_sample=repeats,
    )
