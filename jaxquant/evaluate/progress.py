"""The progress bar of a comparison: one line on a terminal's stderr, nothing elsewhere.

For: :mod:`jaxquant.evaluate.compare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def track(slices: Mapping[str, Iterable[Any]], show: bool) -> Iterator[tuple[str, Iterable[Any]]]:
    """Yields ``(name, batches)``; a bar counts the batches as they are taken.

    Args:
      slices: name to batches; those without a length get a bar without an end.
      show: false for no bar.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not (show and console.is_terminal)
    ) as bar:
        for name, batches in slices.items():
            total = len(batches) if isinstance(batches, Sized) else None
            task = bar.add_task(name, total=total)
            yield name, _counted(batches, bar, task)


def _counted(batches: Iterable[Any], bar: Progress, task: Any) -> Iterator[Any]:
    for batch in batches:
        yield batch
        bar.advance(task)
