"""Small drawing kit: axes with readable ticks, and SVG elements as escaped text.

For: :mod:`jaxquant.evaluate.plots`. It knows pixels and numbers, nothing of reports. Colours are
CSS classes and variables of the page, so that a drawing follows light and dark.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
CHAR_WIDTH = 6.4  # of the page's 12 px sans-serif, on average
LINE_HEIGHT = 14.0


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps numbers ``low .. high`` to pixels ``start .. end``, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a number."""
        low, high = self._transform(self.low), self._transform(self.high)
        share = (self._transform(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[tuple[float, str]]:
        """Round values within the axis, about ``count`` of them, with labels."""
        if not self.log:
            step = nice_step((self.high - self.low) / count)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            return [(i * step, f"{i * step:.10g}") for i in range(first, last + 1)]
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        if last - first >= 2:
            every = max(1, math.ceil((last - first) / count))
            return [(10.0**e, power_label(e)) for e in range(first, last + 1, every)]
        values = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        kept = [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
        return [(v, f"{v:.3g}") for v in kept]

    def _transform(self, value: float) -> float:
        return math.log10(value) if self.log else value


def log_axis(values: Iterable[float], start: float, end: float) -> Axis | None:
    """A logarithmic axis that holds all positive finite values with some air; None without any."""
    kept = [v for v in values if math.isfinite(v) and v > 0]
    if not kept:
        return None
    low, high = min(kept), max(kept)
    air = max((high / low) ** 0.06, 1.15)
    return Axis(low / air, high * air, start, end, log=True)


def nice_step(raw: float) -> float:
    """The step 1, 2 or 5 times a power of ten at or above ``raw``."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def power_label(exponent: int) -> str:
    """``10^exponent`` as people write it."""
    if -2 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def text(
    x: float, y: float, value: str, anchor: str = "start", cls: str = "tick", extra: str = ""
) -> str:
    """A text element, escaped."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}"{extra}>'
        f"{html.escape(value)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, cls: str, style: str = "") -> str:
    """A straight line."""
    styled = f' style="{style}"' if style else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"{styled}/>'


def dot(x: float, y: float, radius: float, color: int, title: str, cls: str = "dot") -> str:
    """A disc in a series colour with a tooltip."""
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
    hint = html.escape(title)
    return (
        f'<circle {place} class="{cls}" style="--c:{series(color)}"><title>{hint}</title></circle>'
    )


def polyline(points: Sequence[tuple[float, float]], color: int, title: str) -> str:
    """A line through points in a series colour with a tooltip."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{joined}" class="curve" style="--c:{series(color)}">'
        f"<title>{html.escape(title)}</title></polyline>"
    )


def series(color: int) -> str:
    """The CSS variable of a series' colour."""
    return f"var(--s{color % 10})"


def frame(
    width: float,
    height: float,
    parts: Iterable[str],
    title: str,
) -> str:
    """A whole drawing, which shrinks with the page."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">{"".join(parts)}</svg>'
    )


def axes(
    x: Axis, y: Axis, x_title: str, y_title: str, x_count: int = 6, y_count: int = 6
) -> list[str]:
    """Grid, ticks and titles of a plot; the x axis lies at the low end of y."""
    parts = []
    for value, label in y.ticks(y_count):
        parts.append(line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(text(x.start - 8, y(value) + 4, label, "end"))
    for value, label in x.ticks(x_count):
        parts.append(line(x(value), y.start, x(value), y.start + 4, "axis"))
        parts.append(text(x(value), y.start + 18, label, "middle"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 36, x_title, "middle", "label"))
    parts.append(text(x.start - 8, y.end - 10, y_title, "start", "label", ' dx="-34"'))
    return parts


@dataclasses.dataclass
class Labels:
    """Places labels beside points so that they hide neither points nor each other."""

    left: float
    right: float
    top: float
    bottom: float
    taken: list[tuple[float, float, float, float]] = dataclasses.field(default_factory=list)

    def block(self, x: float, y: float, radius: float) -> None:
        """Keeps labels off a point."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, x: float, y: float, value: str) -> tuple[float, float, str]:
        """Where to write a label for the point: x, baseline y and anchor."""
        wide = CHAR_WIDTH * len(value) + 2
        spots = [
            (x + 11, y + 4, "start"),
            (x - 11, y + 4, "end"),
            (x, y - 11, "middle"),
            (x, y + 20, "middle"),
            (x + 10, y - 10, "start"),
            (x + 10, y + 18, "start"),
            (x - 10, y - 10, "end"),
            (x - 10, y + 18, "end"),
            (x + 11, y - 24, "start"),
            (x + 11, y + 32, "start"),
            (x - 11, y - 24, "end"),
            (x - 11, y + 32, "end"),
        ]
        boxes = [(spot, _box(*spot, wide)) for spot in spots]
        inside = [(spot, box) for spot, box in boxes if self._inside(box)] or boxes
        spot, box = min(inside, key=lambda pair: sum(_overlap(pair[1], t) for t in self.taken))
        self.taken.append(box)
        return spot

    def _inside(self, box: tuple[float, float, float, float]) -> bool:
        return (
            box[0] >= self.left
            and box[2] <= self.right
            and box[1] >= self.top
            and box[3] <= self.bottom
        )


def _box(x: float, y: float, anchor: str, wide: float) -> tuple[float, float, float, float]:
    left = {"start": x, "end": x - wide, "middle": x - wide / 2}[anchor]
    return left, y - LINE_HEIGHT + 3, left + wide, y + 3


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0
