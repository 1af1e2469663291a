"""The columns of a report's tables, as text, for the terminal and the page alike.

For: :mod:`jaxquant.evaluate.table` and :mod:`jaxquant.evaluate.page`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxquant.evaluate import format as fmt
from jaxquant.evaluate.bootstrap import Interval
from jaxquant.evaluate.results import Quality, RecipeResult

if TYPE_CHECKING:
    from jaxquant.evaluate.report import Report

Cell = tuple[str, str]
"""A value and, smaller, its spread or an empty text."""
Column = tuple[str, list[Cell]]


def quality_columns(report: Report, found: Sequence[Quality]) -> list[Column]:
    """One column per measure that any of ``found`` has, one cell per entry of ``found``."""
    kl = report.divergence
    tails = [q.divergence for q in found]
    columns: list[Column] = [
        (f"{kl} mean", [_cell(t.mean if t else None) for t in tails]),
        (f"{kl} p50", [_brief(t.p50 if t else None) for t in tails]),
        (f"{kl} p99", [_cell(t.p99 if t else None) for t in tails]),
        (f"{kl} worst", [(fmt.number(t.worst if t else None), "") for t in tails]),
        ("SQNR dB", [_cell(q.sqnr_db) for q in found]),
        ("top-1 same", [_cell(q.agreement, fmt.percent) for q in found]),
        ("loss", [_brief(q.loss, _fine) for q in found]),
        ("Δ loss", [_cell(q.loss_delta, fmt.signed) for q in found]),
        ("perplexity", [_brief(q.perplexity, _fine) for q in found]),
        ("accuracy", [_brief(q.accuracy, fmt.percent) for q in found]),
    ]
    for name in report.float_model.overall.metrics:
        columns.append((name, [_brief(q.metrics.get(name), _fine) for q in found]))
        columns.append((f"Δ {name}", [_cell(q.metric_deltas.get(name), fmt.signed) for q in found]))
    return [(name, cells) for name, cells in columns if any(c[0] != fmt.ABSENT for c in cells)]


def slice_columns(report: Report, found: Sequence[Quality]) -> list[Column]:
    """The columns of :func:`quality_columns` on one line, with the mean's interval alone."""
    columns = quality_columns(report, found)
    mean = f"{report.divergence} mean"
    return [
        (name, [(f"{c[0]} {c[1]}".strip() if name == mean else c[0], "") for c in cells])
        for name, cells in columns
    ]


def cost_columns(report: Report, results: Sequence[RecipeResult]) -> list[Column]:
    """Bytes, and times where they were measured; one cell per entry of ``results``."""
    memories = [result.memory for result in results]
    columns: list[Column] = [
        ("device bytes", [(fmt.megabytes(m.total), "") for m in memories]),
        ("÷ float", [(fmt.ratio(m.total, m.total_float), "") for m in memories]),
        ("÷ bf16", [(fmt.ratio(m.total, m.total_bf16), "") for m in memories]),
        (
            "quantized weights",
            [(fmt.megabytes(m.quantized) if m.leaves else fmt.ABSENT, "") for m in memories],
        ),
        ("their ÷ bf16", [(fmt.ratio(m.quantized, m.quantized_bf16), "") for m in memories]),
    ]
    speeds = [result.speed for result in results if result.speed is not None]
    if len(speeds) == len(results):
        ratios = [speed.speedup for speed in speeds]
        columns += [
            ("latency", [(fmt.milliseconds(s.timing.median_s), fmt.spread(s)) for s in speeds]),
            (
                "speed-up",
                [
                    (f"{r.median:.2f}×", f"[{r.q25:.2f}, {r.q75:.2f}]") if r else (fmt.ABSENT, "")
                    for r in ratios
                ],
            ),
            (f"{report.settings['items']}/s", [(fmt.rate(s.items_per_s), "") for s in speeds]),
            ("compile", [(fmt.milliseconds(s.trace_s + s.compile_s), "") for s in speeds]),
        ]
    return columns


def _cell(interval: Interval | None, show: Callable[[float | None], str] = fmt.number) -> Cell:
    return fmt.with_range(interval, show)


def _brief(interval: Interval | None, show: Callable[[float | None], str] = fmt.number) -> Cell:
    return fmt.with_range(interval, show)[0], ""


def _fine(value: float | None) -> str:
    return fmt.number(value, 4)
