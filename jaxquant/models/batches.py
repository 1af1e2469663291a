"""Batches of tokens: shuffled windows for training, consecutive ones for evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class MixedBatches:
    """Training batches of fixed proportions, as a pure function of the step.

    Every slice is one stream of tokens. An epoch over it cuts the stream into windows at a random
    offset and visits each window once in a random order. Nothing is remembered between batches, so
    a resumed run sees exactly what an uninterrupted one would have seen.

    Args:
      streams: slice name to int array of tokens.
      rows: slice name to its number of rows in every batch.
      length: tokens a row predicts; rows have one more.
      seed: fixes offsets and orders.

    Raises:
      ValueError: a slice has rows but fewer than two windows of text.
    """

    def __init__(
        self, streams: Mapping[str, np.ndarray], rows: Mapping[str, int], length: int, seed: int
    ) -> None:
        for name in rows:
            if len(streams[name]) < 2 * (length + 1):
                raise ValueError(
                    f"slice {name!r} has {len(streams[name])} tokens; rows of {length} need at "
                    f"least {2 * (length + 1)}"
                )
        self._streams, self._rows = dict(streams), dict(rows)
        self._length, self._seed = length, seed

    def __call__(self, step: int) -> np.ndarray:
        """The batch of a step: int32 [sum of rows, length + 1]."""
        chosen = []
        for salt, (name, count) in enumerate(sorted(self._rows.items())):
            windows = (len(self._streams[name]) - self._length - 1) // self._length
            for sample in range(step * count, (step + 1) * count):
                epoch, index = divmod(sample, windows)
                rng = np.random.default_rng((self._seed, salt, epoch))
                offset = int(rng.integers(self._length))
                start = offset + self._length * int(rng.permutation(windows)[index])
                chosen.append(self._streams[name][start : start + self._length + 1])
        return np.stack(chosen).astype(np.int32)


def windows(stream: np.ndarray, batch_size: int, length: int) -> list[np.ndarray]:
    """Consecutive, disjoint windows of a stream in full batches; the rest is dropped.

    Args:
      stream: int [N].
      batch_size: rows of a batch.
      length: tokens of a row.

    Returns:
      int32 arrays [batch_size, length].

    Raises:
      ValueError: a size is not positive, or the stream does not fill one batch.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch_size={batch_size} and length={length} must be positive")
    count = len(stream) // (batch_size * length)
    if count == 0:
        raise ValueError(
            f"{len(stream)} tokens do not fill one batch of {batch_size} x {length}; "
            "ask for smaller batches"
        )
    used = np.asarray(stream[: count * batch_size * length], np.int32)
    return list(used.reshape(count, batch_size, length))


def rows_per_slice(weights: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Splits a batch in proportion to `weights`, at least one row each, largest remainder first.

    Raises:
      ValueError: there are fewer rows than slices.
    """
    if batch_size < len(weights):
        raise ValueError(f"a batch of {batch_size} rows cannot hold {len(weights)} slices")
    total = sum(weights.values())
    exact = {name: batch_size * weight / total for name, weight in weights.items()}
    rows = {name: max(1, int(share)) for name, share in exact.items()}
    while sum(rows.values()) != batch_size:
        change = 1 if sum(rows.values()) < batch_size else -1
        may_change = [n for n in rows if rows[n] + change >= 1]
        name = max(may_change, key=lambda n: change * (exact[n] - rows[n]))
        rows[name] += change
    return rows
