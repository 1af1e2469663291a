"""`Calibration`: what was collected, as a mapping that prints as a table."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from jaxquant.passes.plan_view import format_bytes

_WIDTH = 120


class Calibration(Mapping[str, Mapping[str, Any]]):
    """Statistics by path and name: ``found["layers/mlp/up/kernel"]["hessian"]``.

    Args:
      found: ``{path: {name: array}}``.
      nbytes: bytes that collecting them took on the device.

    Attributes:
      nbytes: likewise.
    """

    def __init__(self, found: Mapping[str, Mapping[str, Any]], nbytes: int) -> None:
        self._found, self.nbytes = found, nbytes

    def __getitem__(self, path: str) -> Mapping[str, Any]:
        """The statistics of one operand by name."""
        return self._found[path]

    def __iter__(self) -> Iterator[str]:
        """The paths, in the order of the program."""
        return iter(self._found)

    def __len__(self) -> int:
        """Number of observed operands."""
        return len(self._found)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
        )
        for name in ("operand", "statistic", "shape", "least", "mean", "greatest"):
            table.add_column(name, overflow="fold", justify="left")
        for path, values in self._found.items():
            for name, value in values.items():
                shape = "x".join(map(str, value.shape)) or "scalar"
                table.add_row(path, name, shape, *_figures(value))
        yield f"{len(self)} operands, {format_bytes(self.nbytes)} of statistics"
        yield table

    def __repr__(self) -> str:
        """The table as text, 120 columns wide."""
        stream = io.StringIO()
        Console(file=stream, width=_WIDTH, color_system=None, legacy_windows=False).print(self)
        return stream.getvalue().rstrip()


def _figures(value: Any) -> list[str]:
    """Least, mean and greatest of what is there; rows that a sample lacks are NaN."""
    numbers = np.asarray(value, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return ["-"] * 3
    return [f"{x:.4g}" for x in (numbers.min(), numbers.mean(), numbers.max())]
