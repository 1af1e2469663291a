"""Numbers as text, one way for the table and the page.

For: :mod:`jaxquant.evaluate.table` and :mod:`jaxquant.evaluate.page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxquant.evaluate.bootstrap import Interval
from jaxquant.evaluate.results import Speed

ABSENT = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` significant digits; very small or large ones in powers of ten."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 10**6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """As :func:`number`, with a plus sign where positive."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 and text != "0" else text


def percent(value: float | None, decimals: int = 2) -> str:
    """A share as per cent."""
    return ABSENT if value is None else f"{100 * value:.{decimals}f}%"


def with_range(
    interval: Interval | None, show: Callable[[float | None], str] = number
) -> tuple[str, str]:
    """A value and its interval as texts; the second is empty where there is none."""
    if interval is None:
        return ABSENT, ""
    if interval.low is None or interval.high is None:
        return show(interval.value), ""
    return show(interval.value), f"[{show(interval.low)}, {show(interval.high)}]"


def megabytes(size: int) -> str:
    """Bytes as B, KB, MB or GB (powers of 1000)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{number(size / scale)} {unit}"
    return f"{size} B"


def rate(per_second: float) -> str:
    """A rate with k and M."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if per_second >= scale:
            return f"{number(per_second / scale)}{unit}"
    return number(per_second)


def milliseconds(seconds: float) -> str:
    """Seconds as µs, ms or s."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{number(seconds / scale)} {unit}"
    return f"{number(seconds / 1e-6)} µs"


def spread(speed: Speed) -> str:
    """The middle half of a timing."""
    return f"[{milliseconds(speed.timing.q25_s)}, {milliseconds(speed.timing.q75_s)}]"


def ratio(part: float, whole: float) -> str:
    """How much of the whole a part is, with three decimals."""
    return f"{part / whole:.3f}" if whole else ABSENT
