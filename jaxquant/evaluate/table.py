"""The report on a terminal.

For: :class:`jaxquant.evaluate.report.Report`. Shows numbers; makes none.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxquant.evaluate import format as fmt
from jaxquant.evaluate.columns import Column, cost_columns, quality_columns, slice_columns
from jaxquant.evaluate.results import Quality, WorstExample

if TYPE_CHECKING:
    from jaxquant.evaluate.report import Report

_TEXT_WIDTH = 160
_WORST_SHOWN = 2


def render_table(report: Report) -> RenderableType:
    """Tables of quality, slices, cost and worst examples, then the notes."""
    everyone = (report.float_model, *report.recipes)
    names = [result.name for result in everyone]
    found = [result.overall for result in everyone]
    title = f"Quality over all slices ({counted(found[0])})"
    parts: list[RenderableType] = [_table(title, names, quality_columns(report, found))]
    if len(report.slices) > 1:
        parts.append(_slices(report))
    parts.append(_table("Cost", names, cost_columns(report, everyone)))
    if any(result.worst for result in report.recipes):
        parts.append(_worst(report))
    parts.extend(_note(note) for note in report.notes())
    return Group(Text(report.title, style="bold"), *parts)


def table_text(report: Report) -> str:
    """:func:`render_table` as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=_TEXT_WIDTH, color_system=None, force_terminal=False)
    console.print(render_table(report))
    return out.getvalue()


def counted(quality: Quality) -> str:
    """How many examples, and positions where these are more."""
    examples = f"{quality.examples} example" + ("s" if quality.examples != 1 else "")
    more = quality.positions != quality.examples
    return f"{examples}, {quality.positions} positions" if more else examples


def _note(note: str) -> Text:
    return Text(note, style="bold red" if note.startswith("NOT FINITE") else "dim")


def _table(title: str, names: Sequence[str], columns: Sequence[Column]) -> Table:
    table = Table(title=Text(title), box=SIMPLE_HEAD, title_justify="left")
    table.add_column("recipe", no_wrap=True)
    for name, _ in columns:
        table.add_column(Text(name), justify="right")
    for index, recipe in enumerate(names):
        cells = ("\n".join(filter(None, column[1][index])) for column in columns)
        table.add_row(Text(recipe), *map(Text, cells))
    return table


def _slices(report: Report) -> Table:
    table = Table(
        title=Text("By slice (number of examples)"), box=SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("slice")
    table.add_column("recipe", no_wrap=True)
    everyone = (report.float_model, *report.recipes)
    entries = [(name, result) for name in report.slices for result in everyone]
    columns = slice_columns(report, [result.slices[name] for name, result in entries])
    for name, _ in columns:
        table.add_column(Text(name), justify="right")
    for index, (name, result) in enumerate(entries):
        first = result is report.float_model
        about = f"{name} ({result.slices[name].examples})" if first else ""
        cells = (column[1][index][0] for column in columns)
        last = index % len(everyone) == len(everyone) - 1
        table.add_row(Text(about), Text(result.name), *map(Text, cells), end_section=last)
    return table


def _worst(report: Report) -> Table:
    table = Table(title=Text("Worst examples"), box=SIMPLE_HEAD, title_justify="left")
    for name in ("recipe", "slice", "batch:row:position", report.divergence):
        table.add_column(Text(name), no_wrap=True)
    table.add_column("top-1: float → quantized")
    table.add_column("after")
    for result in report.recipes:
        for w in result.worst[:_WORST_SHOWN]:
            context = repr(w.context_text[-30:]) if w.context_text else ""
            place = f"{w.batch}:{w.row}:{w.position}"
            cells = (result.name, w.slice, place, fmt.number(w.divergence), _change(w), context)
            table.add_row(*map(Text, cells))
    return table


def _change(w: WorstExample) -> str:
    if w.float_top is None:
        return fmt.ABSENT
    before = repr(w.float_text) if w.float_text else str(w.float_top)
    after = repr(w.quantized_text) if w.quantized_text else str(w.quantized_top)
    return (
        f"{before} {fmt.percent(w.float_probability, 0)} → "
        f"{after} {fmt.percent(w.quantized_probability, 0)}"
    )
