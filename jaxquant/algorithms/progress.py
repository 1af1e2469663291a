"""The progress bar of work on many weights: one line on a terminal's stderr, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, show: bool = True) -> Iterator[T]:
    """Yields the items; a bar counts them.

    Args:
      items: what is worked on.
      description: stands before the bar.
      show: false for no bar.
    """
    console = Console(stderr=True)
    yield from rich_track(
        items,
        description,
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )
