"""One pass over the data: every batch through the float model and every recipe, scored at once.

For: :mod:`jaxquant.evaluate.compare`, which makes a report of what is gathered here. The logits of
one batch of the float model and of one recipe are alive at a time. No statistics here, and no
timing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.evaluate.batches import Call, as_call, per_example
from jaxquant.evaluate.divergence import RowScores, kl_divergence, row_scores, value_scores
from jaxquant.evaluate.reading import Reader, Reading
from jaxquant.evaluate.results import Flag
from jaxquant.evaluate.runner import Runner
from jaxquant.evaluate.scores import SliceScores

Metric = Callable[[Any, Any], Any]


@dataclasses.dataclass
class Session:
    """The candidates and what was gathered of them so far.

    Attributes:
      floating: the float model.
      recipes: the quantized ones.
      reader: says what outputs are.
      metrics: the user's metrics.
      loss: the user's loss, or None for the next-token loss.
      inputs: what of a batch the model takes, or None for all of it.
      worst: how many worst examples to keep per recipe and slice.
      raise_nonfinite: whether a recipe's non-finite output is an error; otherwise it is a flag.
      first: the first batch, for timing.
      items: tokens (or examples) in it.
      scores: per candidate, one :class:`SliceScores` per slice.
    """

    floating: Runner
    recipes: list[Runner]
    reader: Reader
    metrics: dict[str, Metric]
    loss: Metric | None
    inputs: Callable[[Any], Any] | None
    worst: int
    raise_nonfinite: bool
    first: Call | None = None
    items: int = 0
    scores: dict[str, list[SliceScores]] = dataclasses.field(default_factory=dict)

    def run_slice(self, name: str, batches: Iterable[Any]) -> None:
        """Runs all batches of a slice through all candidates.

        Raises:
          ValueError: for an empty slice, outputs that do not fit, or non-finite ones.
        """
        runners = (self.floating, *self.recipes)
        scores = {r.name: SliceScores(r.name, name, self.worst) for r in runners}
        for index, batch in enumerate(batches):
            self._run_batch(scores, batch, index, f"slice {name!r}, batch {index}")
        if not scores[self.floating.name].rows:
            raise ValueError(f"slice {name!r} is empty: it has no batch")
        if not scores[self.floating.name].positions:
            raise ValueError(f"slice {name!r} is empty: the mask leaves no position")
        for recipe, gathered in scores.items():
            self.scores.setdefault(recipe, []).append(gathered)

    def _run_batch(
        self, scores: dict[str, SliceScores], batch: Any, index: int, where: str
    ) -> None:
        call = as_call(batch if self.inputs is None else self.inputs(batch), where)
        outputs = self.floating(call)
        reading = self.reader.read(batch, call, outputs, where)
        if reading.logits is None and not (reading.leaves or self.metrics or self.loss):
            raise ValueError(
                f"{where}: no metric applies: the outputs hold no floating array, and neither "
                "metrics= nor "
                "loss= is given"
            )
        if self.first is None:
            self.first = call
            self.items = reading.mask.size if self.reader.kind == "tokens" else reading.rows
        ours = scores[self.floating.name]
        base, bad = self._score_float(ours, reading)
        if bad.any():
            raise ValueError(
                f"{where}: the float model's own outputs are not finite in rows "
                f"{list(_rows(bad))}, so "
                "there is nothing to compare with"
            )
        self._add_metrics(ours, outputs, batch, reading, where)
        ours.count(reading)
        for runner in self.recipes:
            theirs, at = scores[runner.name], f"recipe {runner.name!r}, {where}"
            outputs = runner(call)
            other = self.reader.again(outputs, reading, runner.name, where)
            bad = self._score_recipe(theirs, reading, other, base, index)
            if bad.any():
                self._nonfinite(theirs, bad, index, at)
            self._add_metrics(theirs, outputs, batch, reading, at)
            theirs.count(reading)

    def _score_float(
        self, ours: SliceScores, reading: Reading
    ) -> tuple[RowScores | None, np.ndarray]:
        """Scores the float model; returns its scores (of logits) and its bad positions."""
        if reading.logits is None:
            finite = np.ones(reading.rows, bool)
            for leaf in reading.leaves:
                finite &= np.asarray(jnp.isfinite(leaf).reshape(reading.rows, -1).all(axis=-1))
            return None, ~finite[:, None] & reading.mask
        base = jax.device_get(row_scores(reading.logits, reading.targets))
        if self.loss is None:
            ours.add_targets(base, reading)
        return base, base.bad & reading.mask

    def _score_recipe(
        self,
        theirs: SliceScores,
        reading: Reading,
        other: Reading,
        base: RowScores | None,
        index: int,
    ) -> np.ndarray:
        """Scores a recipe against the float model; returns its bad positions."""
        if base is not None:
            scores = jax.device_get(row_scores(other.logits, reading.targets))
            bad = scores.bad & reading.mask
            far = np.asarray(kl_divergence(reading.logits, other.logits))
            if self.loss is None:
                theirs.add_targets(scores, reading)
            theirs.add_agreement(base, scores, reading)
            far = theirs.add_divergence(far, bad, reading)
            theirs.add_worst(far, index, reading, base, scores)
        elif reading.leaves:
            values = jax.device_get(value_scores(list(reading.leaves), list(other.leaves)))
            bad = values.bad[:, None] & reading.mask
            counted = reading.mask[:, 0]
            theirs.column("sqnr").add(values.signal[counted], values.noise[counted])
            far = theirs.add_divergence(
                _relative(values.signal, values.noise)[:, None], bad, reading
            )
            theirs.add_worst(far, index, reading, None, None)
        else:
            bad = np.zeros(reading.mask.shape, bool)
        return bad

    def _nonfinite(self, theirs: SliceScores, bad: np.ndarray, index: int, where: str) -> None:
        count = int(bad.sum())
        if self.raise_nonfinite:
            raise ValueError(
                f"{where}: {count} positions in rows {list(_rows(bad))} have NaN or infinite "
                "outputs; "
                "on_nonfinite='flag' reports them and goes on"
            )
        theirs.flags.append(Flag(theirs.recipe, theirs.slice, index, _rows(bad), count))

    def _add_metrics(
        self, scores: SliceScores, outputs: Any, batch: Any, reading: Reading, where: str
    ) -> None:
        """Calls the user's metrics and loss on the model's own outputs."""
        must_be_finite = self.raise_nonfinite or scores.recipe == self.floating.name
        named = {f"metric:{name}": fn for name, fn in self.metrics.items()}
        if self.loss is not None:
            named["loss"] = self.loss
        for column, fn in named.items():
            name = column.removeprefix("metric:")
            numbers, each = per_example(fn(outputs, batch), reading.rows, name, where)
            if must_be_finite and not np.isfinite(numbers).all():
                raise ValueError(f"{where}: metric {name!r} is not finite ({scores.recipe} model)")
            scores.add_metric(column, numbers, each, reading.rows)


def _rows(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(int(row) for row in np.unique(np.nonzero(bad)[0]))


def _relative(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """``sqrt(noise / signal)``; 0 where nothing changed, infinite where an all-zero output did."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise == 0, 0.0, np.sqrt(noise / signal))
