"""A batch as users give it: one array, a tuple of positional arguments, or keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def check_batches(batches: Any, what: str) -> None:
    """Refuses what only looks like batches: the rows of an array, the keys of a mapping.

    Args:
      batches: what should be an iterable of batches; it is not walked.
      what: its name, for errors, e.g. "slice 'english'".

    Raises:
      TypeError: it is something else.
    """
    if hasattr(batches, "shape"):
        raise TypeError(
            f"{what} is an array of shape {tuple(batches.shape)}; it takes an iterable of batches: "
            "give [array] for one batch, or split it"
        )
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{what} is a {type(batches).__name__}; it takes an iterable of batches, such as a list"
        )


def call_arguments(batch: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Reads a batch as the model's arguments.

    Args:
      batch: an array, a tuple of positional arguments, or a mapping of keyword arguments.
      where: what the batch is, for errors, e.g. "calibration batch 3".

    Returns:
      Positional and keyword arguments.

    Raises:
      TypeError: where it is none of these.
    """
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return (batch,), {}
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return (), dict(batch)
    raise TypeError(
        f"{where}: a batch is an array, a tuple of positional arguments or a mapping of keyword "
        f"arguments; got a {type(batch).__name__}"
    )
