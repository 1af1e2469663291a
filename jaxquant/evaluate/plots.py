"""The plots of a report, as inline SVG.

For: :mod:`jaxquant.evaluate.page`. A recipe has one colour in all of them. What cannot be drawn
(zero or not finite on a logarithmic axis) is said below the plot, never dropped in silence.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from jaxquant.evaluate import format as fmt
from jaxquant.evaluate import svg
from jaxquant.evaluate.bootstrap import Interval
from jaxquant.evaluate.results import Quality, RecipeResult, Tail, WeightError

if TYPE_CHECKING:
    from jaxquant.evaluate.report import Report

_ROWS_SHOWN = 48


def quality_plot(report: Report, slice_name: str | None = None, width: int = 1040) -> str:
    """Mean divergence against bytes: of all slices with labels, or of one slice, small."""
    small = slice_name is not None
    height, top = (236, 30) if small else (400, 40)
    y = svg.log_axis(_all_means(report), height - 48, top)
    tails = {r.name: _of(r, slice_name).divergence for r in report.recipes}
    if y is None:
        return _nothing("No recipe has a positive, finite mean divergence.")
    memories = [r.memory for r in report.recipes]
    bf16 = report.float_model.memory.total_bf16
    unit, scale = _unit(max([m.total for m in memories] + [bf16]))
    x = svg.Axis(0, 1.08 * max([m.total for m in memories] + [bf16]) / scale, 58, width - 18)
    title = f"{report.divergence} mean" + ("" if small else " (lower is better)")
    parts = svg.axes(x, y, f"device bytes of the whole tree ({unit})", title, 5 if small else 8)
    parts.append(svg.line(x(bf16 / scale), y.start, x(bf16 / scale), y.end, "mark"))
    parts.append(svg.text(x(bf16 / scale) - 5, y.end + 10, "bf16", "end", "tick"))
    labels = svg.Labels(x.start, x.end, y.end - 14, y.start - 2)
    drawn, missing = [], []
    for color, result in enumerate(report.recipes):
        tail = tails[result.name]
        if tail is None or not _drawable(tail.mean.value):
            missing.append(f"{result.name} ({fmt.number(tail.mean.value if tail else None)})")
            continue
        spot = x(result.memory.total / scale), y(tail.mean.value)
        labels.block(*spot, 8)
        parts += _whisker(spot[0], y, tail.mean, color)
        hint = (
            f"{result.name}: {fmt.number(tail.mean.value)} at {fmt.megabytes(result.memory.total)}"
        )
        parts.append(svg.dot(*spot, 4.5 if small else 6.5, color, hint))
        drawn.append((result.name, spot))
    for name, spot in drawn if not small else []:
        at_x, at_y, anchor = labels.place(*spot, name)
        parts.append(svg.text(at_x, at_y, name, anchor, "name"))
    plot = svg.frame(width, height, parts, f"{title} against bytes")
    return plot + _missing(missing)


def tail_plot(report: Report) -> str:
    """Share of positions above each divergence, both axes logarithmic."""
    curves = [
        [(value, share) for value, share in result.survival if _drawable(value)]
        for result in report.recipes
    ]
    values = [value for curve in curves for value, share in curve if share <= 0.8]
    x = svg.log_axis(values, 58, 1022)
    if x is None:
        return _nothing("No position has a positive, finite divergence.")
    least = min(share for curve in curves for _, share in curve)
    y = svg.Axis(least * 0.8, 1.15, 352, 40, log=True)
    parts = svg.axes(x, y, report.divergence, "share of positions above", 9)
    for share, name in ((0.5, "p50"), (0.01, "p99")):
        if y.low < share:
            parts.append(svg.line(x.start, y(share), x.end, y(share), "mark"))
            parts.append(svg.text(x.end, y(share) - 5, name, "end"))
    for color, (result, curve) in enumerate(zip(report.recipes, curves, strict=True)):
        points = [(x(value), y(share)) for value, share in curve if value >= x.low]
        if points:
            parts.append(svg.polyline(points, color, result.name))
            worst = result.overall.divergence.worst if result.overall.divergence else curve[-1][0]
            hint = f"{result.name}: worst {fmt.number(worst)}"
            parts.append(svg.dot(*points[-1], 3.5, color, hint))
    return svg.frame(1040, 400, parts, f"distribution of the {report.divergence}")


def weights_plot(report: Report) -> str:
    """SQNR of every quantized parameter: a row per parameter, a dot per layer and recipe."""
    entries = [(color, w) for color, r in enumerate(report.recipes) for w in r.weights]
    finite = [w.sqnr_db for _, w in entries if math.isfinite(w.sqnr_db)]
    if not finite:
        return _nothing("No recipe has quantized weights beside float ones of the same shape.")
    lowest: dict[str, float] = {}
    for _, w in entries:
        lowest[w.path] = min(lowest.get(w.path, math.inf), w.sqnr_db)
    kept = set(sorted(lowest, key=lowest.__getitem__)[:_ROWS_SHOWN])
    rows = [path for path in lowest if path in kept]
    lane, left = 20.0, 300.0
    bottom = 34 + lane * len(rows)
    low, high = min([0.0, *finite]), max(finite)
    x = svg.Axis(low, high + 0.04 * (high - low) + 1, left, 1022)
    parts = []
    for value, label in x.ticks(10):
        parts.append(svg.line(x(value), 26, x(value), bottom, "grid"))
        parts.append(svg.text(x(value), bottom + 18, label, "middle"))
    parts.append(
        svg.text((left + 1022) / 2, bottom + 38, "SQNR (dB, higher is better)", "middle", "label")
    )
    place = {path: 34 + lane * (index + 0.5) for index, path in enumerate(rows)}
    for path in rows:
        parts.append(svg.line(left, place[path], 1022, place[path], "grid"))
        parts.append(svg.text(left - 10, place[path] + 4, _shorten(path, 42), "end", "path"))
    count = max(1, len(report.recipes))
    for color, w in entries:
        if w.path in place and math.isfinite(w.sqnr_db):
            offset = (color - (count - 1) / 2) * min(3.0, 12 / count)
            parts.append(
                svg.dot(
                    x(w.sqnr_db),
                    place[w.path] + offset,
                    3.2,
                    color,
                    _weight_hint(report, color, w),
                    "mote",
                )
            )
    left_out = len(lowest) - len(rows)
    note = f"{left_out} parameters with a higher SQNR are not drawn." if left_out else ""
    plot = svg.frame(1040, bottom + 48, parts, "SQNR of the quantized weights")
    return plot + (f'<p class="aside">{note}</p>' if note else "")


def _weight_hint(report: Report, color: int, w: WeightError) -> str:
    layer = "" if w.layer is None else f", layer {w.layer}"
    return f"{report.recipes[color].name}: {w.path}{layer} ({w.qtype}) {w.sqnr_db:.1f} dB"


def _whisker(x: float, y: svg.Axis, interval: Interval, color: int) -> list[str]:
    low, high = interval.low, interval.high
    if low is None or high is None or not _drawable(high):
        return []
    low = max(low, y.low)
    return [svg.line(x, y(low), x, y(high), "whisker", f"--c:{svg.series(color)}")]


def _all_means(report: Report) -> list[float]:
    found: list[float] = []
    for result in report.recipes:
        for quality in (result.overall, *result.slices.values()):
            tail: Tail | None = quality.divergence
            if tail is not None:
                mean = tail.mean
                found += [v for v in (mean.low, mean.value, mean.high) if v is not None]
    return found


def _of(result: RecipeResult, slice_name: str | None) -> Quality:
    return result.overall if slice_name is None else result.slices[slice_name]


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _unit(most: float) -> tuple[str, float]:
    return next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1)) if most >= s)


def _shorten(path: str, most: int) -> str:
    if len(path) <= most:
        return path
    half = (most - 1) // 2
    return f"{path[:half]}…{path[-half:]}"


def _missing(names: list[str]) -> str:
    if not names:
        return ""
    return f'<p class="aside">Not drawn: {html.escape(", ".join(names))}.</p>'


def _nothing(why: str) -> str:
    return f'<p class="aside">Nothing to draw. {html.escape(why)}</p>'
