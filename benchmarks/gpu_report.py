"""The tables of `benchmarks.gpu`: from its record to markdown. Plain data in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

NOT_MEASURED = "not measured"
# What is to be reached: title, format, shapes, rows, times as fast as bf16, share of the copy
# bandwidth. "large" is 8192x8192 and larger.
TARGETS: list[tuple[str, str, bool, Callable[[int], bool], float, float | None]] = [
    ("w4a16 g128, M <= 16, large", "w4a16 g128", True, lambda m: m <= 16, 3.3, 0.8),
    ("w4a16 g128, M = 64, large", "w4a16 g128", True, lambda m: m == 64, 2.5, None),
    ("w8a16, M <= 16", "w8a16", False, lambda m: m <= 16, 1.85, None),
    ("w2a16 g64, M <= 16", "w2a16 g64", False, lambda m: m <= 16, 5.0, None),
    ("w8a8, M >= 2048", "w8a8", False, lambda m: m >= 2048, 1.7, None),
    ("fp8, M >= 2048", "fp8", False, lambda m: m >= 2048, 1.7, None),
    ("w4a16 g128, M >= 2048", "w4a16 g128", False, lambda m: m >= 2048, 0.95, None),
    ("nf4 g64, M <= 16", "nf4 g64", False, lambda m: m <= 16, 3.0, None),
]
DECODE_TARGETS = {1: 2.8, 16: 2.5}
MEMORY_TARGET = 0.32
_NOTE = (
    "Microseconds of device time a call (CUPTI, no launches), the slower of two passes; in brackets"
    " times as fast as bf16 and the share of this run's copy bandwidth at bytes moved once. Weights"
    " rotate through several times the L2 cache. w8a8, fp8, w4a8 and llm.int8 include what makes"
    " their x. Peers: one pass; off is how far from the float product, of its norm."
)


def report(data: dict[str, Any]) -> str:
    """All tables of a record."""
    times = _Times(data, 0)
    lines = ["# Figures of the GPU kernels", "", "`python -m benchmarks.gpu`", ""]
    lines += [", ".join(f"{k} {v}" for k, v in data["environment"].items()), ""]
    lines += [f"Copy bandwidth: {_copy(data)}. Laying out a weight: {_prepare(data)}.", "", _NOTE]
    lines += ["", "## To reach", "", *table(target_rows(times, data.get("decoder", ())))]
    for k, n in times.shapes():
        lines += ["", f"## {k} x {n}", "", *table(shape_rows(times, k, n))]
    for experts in sorted({row["case"]["experts"] for row in data["rows"]} - {0}):
        own = _Times(data, experts)
        for k, n in own.shapes():
            title = f"## {experts} experts of {k} x {n}; M are all rows"
            lines += ["", title, "", *table(shape_rows(own, k, n))]
    lines += ["", "## One decode step, shapes of 8B", "", *table(decoder_rows(data["decoder"]))]
    if data.get("peers"):
        lines += ["", "## Peers", "", *table(peer_rows(data["peers"]))]
    lines += ["", "## Why no kernel", "", *notes(data["rows"]), ""]
    return "\n".join(lines)


class _Times:
    """Times of a record's products with one weight, or with so many experts, by case."""

    def __init__(self, data: dict[str, Any], experts: int) -> None:
        rates = [rate for rate in data.get("copy", ()) if rate]
        self.copy = max(rates, default=None)
        self._found = {
            tuple(row["case"][key] for key in ("k", "n", "m", "form", "route")): row["passes"]
            for row in data["rows"]
            if row["case"]["experts"] == experts
        }

    def shapes(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys((k, n) for k, n, *_ in self._found))

    def rows(self, k: int, n: int) -> list[int]:
        return sorted({m for a, b, m, *_ in self._found if (a, b) == (k, n)})

    def formats(self) -> list[str]:
        return list(dict.fromkeys(key[3] for key in self._found if key[3] != "bf16"))

    def us(self, k: int, n: int, m: int, form: str, route: str) -> float | None:
        """The slower pass; None where there is none."""
        passes = self._found.get((k, n, m, form, route), [])
        times = [p["timing"]["device"] for p in passes if p["timing"]]
        return max(times, default=None)

    def gain(self, k: int, n: int, m: int, form: str, route: str) -> float | None:
        own, base = self.us(k, n, m, form, route), self.us(k, n, m, "bf16", "bf16")
        return base / own if own and base else None

    def share(self, k: int, n: int, m: int, form: str, route: str) -> float | None:
        own = self.us(k, n, m, form, route)
        if own is None or self.copy is None:
            return None
        least = self._found[k, n, m, form, route][0]["bytes"]
        return least / (own * 1e-6) / self.copy

    def cell(self, k: int, n: int, m: int, form: str, route: str) -> str:
        own = self.us(k, n, m, form, route)
        if own is None:
            passes = self._found.get((k, n, m, form, route), [])
            return "no" if any(p["note"] for p in passes) else NOT_MEASURED
        gain, share = self.gain(k, n, m, form, route), self.share(k, n, m, form, route)
        behind = [f"{gain:.2f}x"] if gain else []
        behind += [f"{100 * share:.0f}%"] if share else []
        return f"{own:.2f}" + (f" ({', '.join(behind)})" if behind else "")


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why kernels have no time, each reason once."""
    found: dict[str, str] = {}
    for row in rows:
        case = row["case"]
        for one in row["passes"]:
            if one["note"] and case["route"] == "pallas":
                where = f"{case['m']} x {case['k']} x {case['n']}"
                found.setdefault(f"{case['form']}: {one['note']}", where)
    return [f"- {note} (first at {where})" for note, where in found.items()] or ["-"]


def shape_rows(times: _Times, k: int, n: int) -> Iterable[dict[str, str]]:
    """A line for bf16 and for both routes of every format; a column for every number of rows."""
    lines = [("bf16", "bf16"), *((f, r) for f in times.formats() for r in ("pallas", "xla"))]
    for form, route in lines:
        title = {"": form if form == "bf16" else f"{form}, {route}"}
        yield title | {f"M = {m}": times.cell(k, n, m, form, route) for m in times.rows(k, n)}


def target_rows(times: _Times, decoders: Sequence[dict[str, Any]]) -> Iterable[dict[str, str]]:
    """A line for every figure: the worst case of the faster route, and whether that will do.

    `benchmarks.gpu_tune` writes which one is faster into the table that dispatch goes by.
    """
    for title, form, large, wanted, gain, share in TARGETS:
        gains, shares, missing = [], [], False
        for k, n in times.shapes():
            if large and min(k, n) < 8192:
                continue
            for m in filter(wanted, times.rows(k, n)):
                both = [times.gain(k, n, m, form, route) for route in ("pallas", "xla")]
                known = [g for g in both if g is not None]
                missing |= not known
                gains += [max(known)] if known else []
                part = times.share(k, n, m, form, "pallas")
                shares += [part] if part is not None else []
        known = bool(gains) and not missing
        met = known and min(gains) >= gain
        goal, shown = f">= {gain}x", f"{min(gains):.2f}x" if known else NOT_MEASURED
        if share is not None:
            goal += f", >= {100 * share:.0f}% of copying"
            met = met and bool(shares) and min(shares) >= share
            shown += f", {100 * min(shares):.0f}%" if known and shares else ""
        yield {"figure": title, "to reach": goal, "worst case": shown, "met": _verdict(known, met)}
    yield from _decode_targets(decoders)


def _decode_targets(decoders: Sequence[dict[str, Any]]) -> Iterable[dict[str, str]]:
    steps = {(d["recipe"], d["batch"], d["layers"]): d for d in decoders}
    for batch, goal in DECODE_TARGETS.items():
        for layers in ("stacked", "apart"):
            pair = [steps.get((recipe, batch, layers), {}) for recipe in ("bf16", "w4a16_g128")]
            known = all(one.get("milliseconds") for one in pair)
            gain = min(pair[0]["milliseconds"]) / max(pair[1]["milliseconds"]) if known else 0.0
            memory = pair[1]["peak_bytes"] / pair[0]["peak_bytes"] if known else 0.0
            met = known and gain >= goal and memory <= MEMORY_TARGET
            yield {
                "figure": f"decode step of 8B, batch {batch}, w4a16_g128, layers {layers}",
                "to reach": f">= {goal}x tokens/s, <= {MEMORY_TARGET}x peak memory",
                "worst case": f"{gain:.2f}x, {memory:.3f}x" if known else NOT_MEASURED,
                "met": _verdict(known, met),
            }


def _verdict(known: bool, met: bool) -> str:
    return ("reached" if met else "MISSED") if known else NOT_MEASURED


def decoder_rows(decoders: Sequence[dict[str, Any]]) -> Iterable[dict[str, str]]:
    """A line for every model and batch."""
    for one in decoders:
        times, peak = one.get("milliseconds"), one.get("peak_bytes")
        step = sorted(times)[len(times) // 2] if times else None
        unknown = "failed" if one.get("error") else NOT_MEASURED
        yield {
            "layers": one["layers"],
            "batch": str(one["batch"]),
            "weights": one["recipe"],
            "ms a step": f"{step:.2f}" if step else unknown,
            "tokens/s": f"{1e3 * one['batch'] / step:.0f}" if step else unknown,
            "peak GB": f"{peak / 1e9:.2f}" if peak else unknown,
        }


def peer_rows(results: Sequence[dict[str, Any]]) -> Iterable[dict[str, str]]:
    """A line for every library, format and shape."""
    for one in results:
        if "library" in one:
            us = one.get("us")
            yield {
                "library": one["library"],
                "format": one["form"],
                "K x N": f"{one['k']} x {one['n']}",
                "M": str(one.get("m", "all")),
                "us": f"{us:.2f}" if us else one.get("error", NOT_MEASURED),
                "off": f"{one['off']:.3f}" if "off" in one else "",
            }


def table(rows: Iterable[dict[str, str]]) -> list[str]:
    """A markdown table of mappings with the same keys; nothing for none."""
    lines: list[str] = []
    for row in rows:
        if not lines:
            lines = [f"| {' | '.join(row)} |", "|" + "---|" * len(row)]
        lines.append("| " + " | ".join(value.replace("|", "/") for value in row.values()) + " |")
    return lines or [NOT_MEASURED]


def _copy(data: dict[str, Any]) -> str:
    rates = [rate for rate in data.get("copy", ()) if rate]
    return " / ".join(f"{rate / 1e12:.2f} TB/s" for rate in rates) or NOT_MEASURED


def _prepare(data: dict[str, Any]) -> str:
    runs = [run for run in data.get("prepare", ()) if run["seconds"]]
    rates = (f"{run['bytes'] / run['seconds'] / 1e9:.0f} GB/s" for run in runs)
    return " / ".join(rates) or NOT_MEASURED
