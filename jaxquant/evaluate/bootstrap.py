"""Bootstrap intervals over examples, with the positions of one example kept together.

For: every interval a report shows. Called by :mod:`jaxquant.evaluate.summary` and open to users.
Plain numpy on the host; nothing here may touch a device or know what a recipe is.

An example (a row of a batch) is the unit that is drawn, since the tokens of one text are not
independent: drawing tokens would give intervals that are far too narrow. Statistics are of two
kinds:

* a ratio ``sum(num) / sum(den)`` over examples: means, agreement, losses (token-weighted);
* a quantile of the positions, each belonging to one example.

Both take ``counts`` ``[R, E]``: how often example ``e`` is in resample ``r``. The same counts serve
every recipe, so that differences between recipes are paired.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval; ``low`` and ``high`` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def map(self, fn: Callable[[float], float]) -> Interval:
        """Applies an increasing function to the value and both ends."""
        low = None if self.low is None else fn(self.low)
        high = None if self.high is None else fn(self.high)
        return Interval(fn(self.value), low, high)


def resample_counts(examples: int, resamples: int, seed: int) -> np.ndarray:
    """Draws ``resamples`` bootstrap samples of ``examples`` examples.

    Args:
      examples: how many examples there are.
      resamples: how many samples to draw.
      seed: the same seed draws the same samples.

    Returns:
      ``[resamples, examples]`` float64 counts; each row sums to ``examples``.

    Raises:
      ValueError: if either number is not positive.
    """
    if examples < 1 or resamples < 1:
        raise ValueError(
            f"bootstrap needs at least one example and one resample; got {examples} and {resamples}"
        )
    rng = np.random.default_rng(seed)
    return rng.multinomial(examples, np.full(examples, 1 / examples), size=resamples).astype(float)


def ratio_interval(
    num: np.ndarray, den: np.ndarray, counts: np.ndarray | None, level: float = 0.95
) -> Interval:
    """Percentile interval of ``sum(num) / sum(den)``.

    Args:
      num: ``[E]`` numerators, one per example.
      den: ``[E]`` weights, one per example, not all zero.
      counts: ``[R, E]`` from :func:`resample_counts`, or None for no interval.
      level: the coverage asked for.

    Returns:
      The value and its interval. With fewer than two examples, or with a value that is not finite,
      there is no interval.

    Raises:
      ValueError: if the weights sum to zero.
    """
    num, den = np.asarray(num, float), np.asarray(den, float)
    total = den.sum()
    if total == 0:
        raise ValueError("a mean over nothing: every example has weight zero")
    value = float(num.sum() / total)
    if counts is None or len(num) < 2 or not math.isfinite(value):
        return Interval(value)
    dens = counts @ den
    kept = dens > 0
    return _percentiles(value, (counts @ num)[kept] / dens[kept], level)


def quantile(values: np.ndarray, q: float) -> float:
    """The smallest value not exceeded by a share ``q`` of the values (nearest rank)."""
    ordered = np.sort(np.asarray(values).ravel())
    return float(ordered[_rank(len(ordered), q) - 1])


def quantile_interval(
    values: np.ndarray,
    owners: np.ndarray,
    counts: np.ndarray | None,
    q: float,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a quantile of positions, drawing whole examples.

    Exact for every resample without sorting each one: the positions are sorted once, and a resample
    only changes how often each of them counts. A first pass over about ``sqrt(N)`` groups of them
    (one matrix product) finds the group that holds the quantile, a second looks inside it.

    Args:
      values: ``[N]`` one value per position.
      owners: ``[N]`` the example each position belongs to.
      counts: ``[R, E]`` from :func:`resample_counts`, or None for no interval.
      q: the quantile, in (0, 1].
      level: the coverage asked for.

    Returns:
      The quantile (see :func:`quantile`) and its interval.
    """
    order = np.argsort(values, kind="stable")
    ordered, owners = np.asarray(values)[order], np.asarray(owners)[order]
    size = len(ordered)
    value = float(ordered[_rank(size, q) - 1])
    if counts is None or counts.shape[1] < 2:
        return Interval(value)
    examples = counts.shape[1]
    width = max(1, math.isqrt(size))
    groups = -(-size // width)
    held = np.zeros((groups, examples))
    np.add.at(held, (np.arange(size) // width, owners), 1.0)
    upto = np.cumsum(counts @ held.T, axis=1)
    kept = upto[:, -1] > 0
    counts, upto = counts[kept], upto[kept]
    target = np.ceil(q * upto[:, -1] - 1e-9).clip(1)
    group = (upto < target[:, None]).sum(axis=1)
    before = np.where(group > 0, upto[np.arange(len(upto)), group - 1], 0.0)
    inside = group[:, None] * width + np.arange(width)[None]
    weight = np.take_along_axis(counts, owners[inside.clip(max=size - 1)], axis=1)
    weight = np.where(inside < size, weight, 0.0)
    reached = before[:, None] + np.cumsum(weight, axis=1) >= target[:, None]
    at = group * width + reached.argmax(axis=1)
    return _percentiles(value, ordered[at], level)


def _rank(size: int, q: float) -> int:
    if size < 1:
        raise ValueError("a quantile of nothing")
    if not 0 < q <= 1:
        raise ValueError(f"a quantile lies in (0, 1]; got {q}")
    return max(1, math.ceil(q * size - 1e-9))


def _percentiles(value: float, samples: np.ndarray, level: float) -> Interval:
    if not len(samples) or not np.isfinite(samples).all():
        return Interval(value)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
