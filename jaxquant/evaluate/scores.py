"""Numbers per example and per position, gathered batch by batch, for one candidate on one slice.

For: :mod:`jaxquant.evaluate.compare`, which adds a batch at a time;
:mod:`jaxquant.evaluate.summary` reads the result. Held on the host: a few numbers per example and
one float32 per position, never logits. Nothing here makes statistics.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable

import numpy as np

from jaxquant.evaluate.divergence import RowScores
from jaxquant.evaluate.reading import Reading
from jaxquant.evaluate.results import Flag, WorstExample

_CONTEXT_TOKENS = 48


@dataclasses.dataclass
class Column:
    """A mean as numerators and weights of examples (of batches, for a scalar metric)."""

    num: list[np.ndarray] = dataclasses.field(default_factory=list)
    den: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, num: np.ndarray, den: np.ndarray) -> None:
        """Adds a batch's units."""
        self.num.append(np.asarray(num, np.float64))
        self.den.append(np.asarray(den, np.float64))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All numerators and all weights, ``[units]`` each."""
        if not self.num:
            return np.zeros(0), np.zeros(0)
        return np.concatenate(self.num), np.concatenate(self.den)


class SliceScores:
    """One candidate on one slice.

    Attributes:
      rows: examples so far.
      positions: positions so far that count.
      columns: means by name: "loss", "agreement", "accuracy", "sqnr" and "metric:NAME".
      flags: batches with non-finite outputs.
    """

    def __init__(self, recipe: str, slice_name: str, keep_worst: int = 10):
        self.recipe = recipe
        self.slice = slice_name
        self.rows = 0
        self.positions = 0
        self.columns: dict[str, Column] = {}
        self.flags: list[Flag] = []
        self._keep = keep_worst
        self._tie = itertools.count()
        self._worst: list[tuple[float, int, WorstExample]] = []
        self._values: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []

    def count(self, reading: Reading) -> None:
        """Counts a batch's rows and positions; call it last for a batch."""
        self.rows += reading.rows
        self.positions += int(reading.mask.sum())

    def column(self, name: str) -> Column:
        """The column of a name, made on first use."""
        return self.columns.setdefault(name, Column())

    def add_targets(self, scores: RowScores, reading: Reading) -> None:
        """Adds loss and accuracy where the batch has targets."""
        held = reading.targets >= 0
        weight = held.sum(axis=1)
        if weight.any():
            nll = np.where(held, np.asarray(scores.nll, np.float64), 0.0)
            self.column("loss").add(nll.sum(axis=1), weight)
            hit = (np.asarray(scores.top) == reading.targets) & held
            self.column("accuracy").add(hit.sum(axis=1), weight)

    def add_metric(self, name: str, numbers: np.ndarray, each: bool, rows: int) -> None:
        """Adds a metric: one number per example, or (``each`` false) one for the batch."""
        if each:
            self.column(name).add(numbers, np.ones(len(numbers)))
        else:
            self.column(name).add(numbers * rows, np.full(1, rows))

    def add_divergence(self, values: np.ndarray, bad: np.ndarray, reading: Reading) -> np.ndarray:
        """Adds ``[B, P]`` divergences; positions in ``bad`` count as infinitely far.

        Returns:
          The divergences with ``-inf`` where a position does not count.
        """
        values = np.where(bad | np.isnan(values), np.inf, values).astype(np.float32)
        owners = np.broadcast_to(np.arange(reading.rows)[:, None] + self.rows, values.shape)
        self._values.append(values[reading.mask])
        self._owners.append(owners[reading.mask])
        return np.where(reading.mask, values, -np.inf)

    def add_agreement(self, ours: RowScores, theirs: RowScores, reading: Reading) -> None:
        """Adds the share of positions where both models have one top-1."""
        same = (np.asarray(ours.top) == np.asarray(theirs.top)) & reading.mask
        self.column("agreement").add(same.sum(axis=1), reading.mask.sum(axis=1))

    def add_worst(
        self,
        far: np.ndarray,
        batch: int,
        reading: Reading,
        float_scores: RowScores | None,
        scores: RowScores | None,
    ) -> None:
        """Keeps the worst position of each row, if it is among the worst so far."""
        for row, position in enumerate(far.argmax(axis=1)):
            value = float(far[row, position])
            full = len(self._worst) >= self._keep
            if not self._keep or value <= 0 or (full and value <= self._worst[0][0]):
                continue
            example = _worst(self.slice, batch, row, int(position), value, reading)
            if float_scores is not None and scores is not None:
                at = (row, position)
                example = dataclasses.replace(
                    example,
                    float_top=int(float_scores.top[at]),
                    float_probability=float(float_scores.top_probability[at]),
                    quantized_top=int(scores.top[at]),
                    quantized_probability=float(scores.top_probability[at]),
                )
            entry = (value, -next(self._tie), example)
            (heapq.heappushpop if full else heapq.heappush)(self._worst, entry)

    def worst(self) -> list[WorstExample]:
        """The worst examples, worst first."""
        return worst_of((entry[2] for entry in self._worst), self._keep)

    def divergences(self) -> tuple[np.ndarray, np.ndarray]:
        """All counted divergences and the example each belongs to, ``[N]`` each."""
        if not self._values:
            return np.zeros(0, np.float32), np.zeros(0, int)
        return np.concatenate(self._values), np.concatenate(self._owners)


def worst_of(examples: Iterable[WorstExample], keep: int) -> list[WorstExample]:
    """The ``keep`` examples of the largest divergence, worst first; ties in the order given."""
    return sorted(examples, key=lambda e: -e.divergence)[:keep]


def _worst(
    name: str, batch: int, row: int, position: int, value: float, reading: Reading
) -> WorstExample:
    target = int(reading.targets[row, position])
    tokens: tuple[int, ...] = ()
    if reading.tokens is not None:
        start = max(0, position + 1 - _CONTEXT_TOKENS)
        tokens = tuple(int(t) for t in reading.tokens[row, start : position + 1])
    return WorstExample(
        slice=name,
        batch=batch,
        row=row,
        position=position,
        divergence=value,
        target=target if target >= 0 else None,
        tokens=tokens,
    )
