"""From gathered numbers to statistics with intervals, per slice and over all slices.

For: :mod:`jaxquant.evaluate.compare`. One :class:`Summarizer` serves all candidates, so that all of
them see the same resamples. Over all slices the resamples are stratified: each slice keeps its
number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxquant.evaluate.bootstrap import (
    Interval,
    quantile,
    quantile_interval,
    ratio_interval,
    resample_counts,
)
from jaxquant.evaluate.results import Quality, Tail
from jaxquant.evaluate.scores import SliceScores

_SURVIVAL_POINTS = 160


class Summarizer:
    """Makes :class:`Quality` of scores.

    Attributes:
      resamples: bootstrap resamples; 0 for no intervals.
      level: the intervals' coverage.
      seed: of the resamples.
    """

    def __init__(self, resamples: int = 1000, level: float = 0.95, seed: int = 0):
        if resamples < 0:
            raise ValueError(f"bootstrap resamples cannot be negative; got {resamples}")
        if not 0 < level < 1:
            raise ValueError(f"an interval's level lies in (0, 1); got {level}")
        self.resamples = resamples
        self.level = level
        self.seed = seed
        self._drawn: dict[tuple[str, int], np.ndarray] = {}

    def quality(
        self,
        scores: Sequence[SliceScores],
        baseline: Sequence[SliceScores] | None,
        own_loss: bool,
    ) -> Quality:
        """Sums up one candidate over the slices given.

        Args:
          scores: one per slice.
          baseline: the float model's scores of the same slices; None for the float model itself.
          own_loss: whether the loss is the library's own, so that a perplexity is meant.
        """
        names = list(dict.fromkeys(name for s in scores for name in s.columns))
        found = {name: self._mean(name, scores) for name in names}
        deltas = {}
        if baseline is not None:
            paired = [name for name in names if name == "loss" or name.startswith("metric:")]
            deltas = {name: self._delta(name, scores, baseline) for name in paired}
        loss, sqnr = found.get("loss"), found.get("sqnr")
        return Quality(
            examples=sum(s.rows for s in scores),
            positions=sum(s.positions for s in scores),
            divergence=self._tail(scores),
            agreement=found.get("agreement"),
            loss=loss,
            loss_delta=deltas.pop("loss", None),
            perplexity=loss.map(_exp) if loss is not None and own_loss else None,
            accuracy=found.get("accuracy"),
            sqnr_db=None if sqnr is None else sqnr.map(decibels),
            metrics=_users(found),
            metric_deltas=_users(deltas),
        )

    def survival(self, scores: Sequence[SliceScores]) -> tuple[tuple[float, float], ...]:
        """The divergence's distribution: pairs (value, share of positions at or above)."""
        values = np.sort(np.concatenate([s.divergences()[0] for s in scores]))
        size = len(values)
        if not size:
            return ()
        ranks = np.unique(np.geomspace(1, size, _SURVIVAL_POINTS).round().astype(int))
        middle = np.unique(np.linspace(1, size, _SURVIVAL_POINTS // 2).round().astype(int))
        ranks = np.union1d(ranks, middle)[::-1]
        return tuple((float(values[size - rank]), float(rank / size)) for rank in ranks)

    def _tail(self, scores: Sequence[SliceScores]) -> Tail | None:
        parts = [s.divergences() for s in scores]
        if not sum(len(values) for values, _ in parts):
            return None
        offsets = np.cumsum([0] + [s.rows for s in scores[:-1]])
        values = np.concatenate([v for v, _ in parts])
        pairs = zip(parts, offsets, strict=True)
        owners = np.concatenate([owner + offset for (_, owner), offset in pairs])
        rows = sum(s.rows for s in scores)
        counts = self._counts(scores, [s.rows for s in scores])
        sums = np.bincount(owners, values.astype(np.float64), rows)
        mean = ratio_interval(sums, np.bincount(owners, minlength=rows), counts, self.level)
        p50, p99 = (quantile_interval(values, owners, counts, q, self.level) for q in (0.5, 0.99))
        return Tail(mean, p50, p99, quantile(values, 1.0))

    def _mean(self, name: str, scores: Sequence[SliceScores]) -> Interval | None:
        held = [s for s in scores if name in s.columns]
        parts = [s.columns[name].arrays() for s in held]
        num, den = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        if not den.sum():
            return Interval(math.inf if num.sum() else math.nan) if name == "sqnr" else None
        counts = self._counts(held, [len(part[0]) for part in parts])
        return ratio_interval(num, den, counts, self.level)

    def _delta(
        self, name: str, scores: Sequence[SliceScores], baseline: Sequence[SliceScores]
    ) -> Interval | None:
        pairs = [
            (s, s.columns[name].arrays(), b.columns[name].arrays())
            for s, b in zip(scores, baseline, strict=True)
            if name in s.columns
        ]
        num = np.concatenate([ours[0] - theirs[0] for _, ours, theirs in pairs])
        den = np.concatenate([ours[1] for _, ours, _ in pairs])
        if not den.sum():
            return None
        counts = self._counts([s for s, _, _ in pairs], [len(ours[0]) for _, ours, _ in pairs])
        return ratio_interval(num, den, counts, self.level)

    def _counts(self, scores: Sequence[SliceScores], units: Sequence[int]) -> np.ndarray | None:
        """Resample counts over the units of several slices, drawn within each slice."""
        if not self.resamples:
            return None
        return np.concatenate(
            [self._draw(s.slice, n) for s, n in zip(scores, units, strict=True)], 1
        )

    def _draw(self, name: str, units: int) -> np.ndarray:
        if (name, units) not in self._drawn:
            seed = int.from_bytes(name.encode(), "little") % 2**63 + self.seed
            self._drawn[name, units] = resample_counts(units, self.resamples, seed)
        return self._drawn[name, units]


def decibels(ratio: float) -> float:
    """``10 log10`` of a ratio of powers; a ratio of zero is minus infinity."""
    if math.isnan(ratio):
        return math.nan
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _users(found: dict[str, Interval | None]) -> dict[str, Interval]:
    prefix = "metric:"
    return {
        name.removeprefix(prefix): interval
        for name, interval in found.items()
        if name.startswith(prefix) and interval is not None
    }
