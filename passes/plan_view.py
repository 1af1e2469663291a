"""How a `Plan` is drawn: the totals, the operations, the reasons, and what stays float.

Called by `Plan` only. Rows of numbered layers that differ in nothing but their number are drawn
once, with how many there are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from jaxquant.passes.plan import Plan, PlanRow, TransformRow

_WIDTH = 120
_NAMED = 6
_NUMBER = re.compile(r"\d+")
_LINE = re.compile(r" \((?:[^()\s]*:\d+[^()]*)\((?:[^()]*)\)\)")
_STYLES = {"quantized": "green", "dequantized": "yellow", "float": "dim"}


def text(plan: Plan) -> str:
    """The plan as plain text."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, legacy_windows=False)
    for part in parts(plan):
        console.print(part)
    stream: Any = console.file
    return stream.getvalue().rstrip()


def parts(plan: Plan) -> Iterator[RenderableType]:
    """The pieces to print, in order."""
    quantized = [row for row in plan.rows if row.status != "float"]
    floats = [row for row in plan.rows if row.status == "float"]
    yield Text(_headline(plan))
    if plan.transforms:
        yield _transforms(plan)
    if quantized:
        yield _operations(quantized)
        yield _reasons(quantized)
    if floats:
        yield _left_float(floats)
    if plan.observers:
        yield Text(f"calibration keeps {format_bytes(plan.observer_bytes)} on the device")
        yield _observers(plan)
    for note in plan.notes:
        yield Text(f"note: {note}")


def format_bytes(count: int) -> str:
    """A number of bytes as people read it: 512 B, 1.2 kB, 3.4 MB (powers of ten)."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, "kB"
    for bigger in ("MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, bigger
    return f"{value:.1f} {unit}"


def _headline(plan: Plan) -> str:
    t = plan.totals
    words = f"recipe {plan.recipe}: {t['quantized_parameters']} of {t['parameters']} parameters"
    if t["ratio"] is not None:
        before, after = t["quantized_bytes_before"], t["quantized_bytes_after"]
        words += (
            f", {format_bytes(before)} to {format_bytes(after)} ({t['ratio']:.3f} of the float)"
        )
    whole = f"{format_bytes(t['bytes_before'])} to {format_bytes(t['bytes_after'])}"
    ops = ", ".join(f"{n} {status}" for status, n in t["ops"].items() if n)
    return f"{words}; whole model {whole}; ops: {ops or 'none'}"


def _transforms(plan: Plan) -> Table:
    """What is done to the inputs of weights before they are quantized; layers once."""
    groups: dict[Any, list[TransformRow]] = {}
    for row in plan.transforms:
        key = (row.transform, row.status, _NUMBER.sub("#", f"{row.weights} {row.into}"), row.reason)
        groups.setdefault(key, []).append(row)
    table = _table("transform", "input of", "is", "why")
    for (transform, status, _, _), rows in groups.items():
        columns = zip(*(row.weights for row in rows), strict=True)
        others = zip(*(row.into for row in rows), strict=True)
        into = ", ".join(_name(names) for names in others)
        style = {"folded": "green", "multiply": "green", "refused": "red"}.get(status, "dim")
        table.add_row(
            transform,
            ", ".join(_name(names) for names in columns),
            Text(f"folded into {into}" if into else status, style=style),
            _short(rows[0].reason),
        )
    return table


def _operations(rows: Sequence[PlanRow]) -> Table:
    table = _table("op", "kind", "shape", "weight", "input", "bytes", "lowering")
    for name, group in _grouped(rows):
        row = group[0]
        was = sum(r.bytes_before for r in group if r.counts)
        now = sum(r.bytes_after for r in group if r.counts)
        what = row.lowering if row.status == "quantized" else row.status
        table.add_row(
            name,
            _kind(row),
            _dims(row.param_shape),
            row.weight or "-",
            row.act or "-",
            f"{format_bytes(was)} > {format_bytes(now)}" if was else "-",
            Text(what, style=_STYLES[row.status]),
        )
    return table


def _reasons(rows: Sequence[PlanRow]) -> Table:
    """Each lowering and its reason once, and each remark, with how many ops it concerns."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.why:
            key = (row.lowering if row.status == "quantized" else row.status, row.why)
            found[key] = found.get(key, 0) + 1
        if row.reason and row.reason != row.why:
            key = (row.param or row.path, _short(row.reason))
            found[key] = found.get(key, 0) + 1
    table = _table("lowering or op", "ops", "why")
    for (what, why), count in found.items():
        table.add_row(what, str(count), why)
    return table


def _left_float(rows: Sequence[PlanRow]) -> Table:
    """What stays float, by reason."""
    groups: dict[str, list[PlanRow]] = {}
    for row in rows:
        groups.setdefault(_LINE.sub("", row.reason), []).append(row)
    table = _table("left float because", "bytes", "parameters or ops")
    for reason, group in groups.items():
        size = sum(r.bytes_before for r in group if r.counts)
        names = list(dict.fromkeys(name for name, _ in _grouped(group)))
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        table.add_row(
            _short(reason),
            format_bytes(size) if size else "-",
            ", ".join(names[:_NAMED]) + more,
        )
    return table


def _observers(plan: Plan) -> Table:
    """What the statistics take; the counters beside them are only part of the sum above."""
    table = _table("observed", "statistic", "shape", "bytes")
    for size in plan.observers:
        if size.path and size.statistic != "nonfinite":
            shape = _dims(size.shape)
            table.add_row(size.path, size.statistic, shape, format_bytes(size.bytes))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        # No min_width: rich then makes the table a column wider than the page, and cuts its end.
        table.add_column(name, overflow="fold", no_wrap=name in ("shape", "bytes", "ops"))
    return table


def _grouped(rows: Sequence[PlanRow]) -> list[tuple[str, list[PlanRow]]]:
    """Rows that differ only in numbers within their path, under one name."""
    groups: dict[Any, list[PlanRow]] = {}
    for row in rows:
        key = (
            _NUMBER.sub("#", _title(row)), row.kind, row.cls, row.param_shape, row.x_shape,
            row.weight, row.act, row.status, row.lowering,
        )  # fmt: skip
        groups.setdefault(key, []).append(row)
    return [(_name([_title(row) for row in group]), group) for group in groups.values()]


def _title(row: PlanRow) -> str:
    return row.param or row.path or "(root)"


def _name(names: Sequence[str]) -> str:
    """One name for paths that differ in numbers: "layers_{0-11}/kernel (x12)"."""
    words = _NUMBER.split(names[0])
    numbers = [list(map(int, _NUMBER.findall(name))) for name in names]
    name = words[0]
    for word, column in zip(words[1:], zip(*numbers)):
        values = sorted(set(column))
        if len(values) == 1:
            span = str(values[0])
        elif values == list(range(values[0], values[-1] + 1)):
            span = f"{{{values[0]}-{values[-1]}}}"
        else:
            span = f"{{{','.join(map(str, values))}}}"
        name += span + word
    return name if len(names) == 1 else f"{name} (x{len(names)})"


def _kind(row: PlanRow) -> str:
    return f"{row.kind} ({row.cls})" if row.cls else row.kind


def _dims(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else "scalar" if shape == () else "-"


def _short(reason: str) -> str:
    """Source lines without the directories."""
    return re.sub(r"(?:/[^\s/:]+)+/([^\s/:]+:\d+)", r"\1", reason)
