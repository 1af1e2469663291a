"""Tables of the static TPU figures: the issue's goals, gains, floors and peers, in Markdown.

`python -m benchmarks.tpu_tables` reads benchmarks/results/tpu-static-<chip>.json, writes
tpu-static-<chip>.md with every row, and the summary between the markers of docs/tpu.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.tpu_peers import PEERS
from benchmarks.tpu_static import NOTE, RESULTS
from jaxquant.pallas_kernels.tpu.chips import CHIPS

DOCUMENT = Path(__file__).parent.parent / "docs" / "tpu.md"
BEGIN, END = "<!-- tpu-static: begin -->", "<!-- tpu-static: end -->"
# A kernel reaches its floor within this.
NEAR = 1.25
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure to reach: a ratio over all shapes of some rows.

    Attributes:
      words: what it says.
      chip, name, against: of which rows, and over which rows' time.
      rows: which numbers of rows count.
      least: time of `against` over that of `name`, at least.
    """

    words: str
    chip: str
    name: str
    against: str
    rows: Callable[[int], bool]
    least: float


def _few(m: int) -> bool:
    return m <= 16


def _many(m: int) -> bool:
    return m >= 1024


def _any(m: int) -> bool:
    return True


GOALS = (
    Goal("w4a16 g128, M <= 16, over bf16", "v5e", "w4a16 g128", "bf16", _few, 3.0),
    Goal("w4a16 g128, M <= 16, over bf16", "v6e", "w4a16 g128", "bf16", _few, 2.6),
    *(  # as far as unpacking allows: the second table says what bounds it
        Goal("w4a16 g128, M <= 16, over bf16", chip, "w4a16 g128", "bf16", _few, 1.0)
        for chip in ("v5p", "v7x")
    ),
    Goal("w4a8 g128, M <= 16, over bf16", "v5e", "w4a8 g128", "bf16", _few, 3.4),
    Goal("w4a8 g128, M <= 16, over bf16", "v6e", "w4a8 g128", "bf16", _few, 2.9),
    *(
        Goal("w4a16 g128, M >= 1024, over bf16", chip, "w4a16 g128", "bf16", _many, 1 / 1.05)
        for chip in ("v5e", "v5p", "v6e", "v7x")
    ),
    Goal("w8a8, M >= 1024, over bf16", "v5e", "w8a8", "bf16", _many, 1.8),
    Goal("w8a8, M >= 1024, over bf16", "v6e", "w8a8", "bf16", _many, 1.4),
    Goal("fp8, M >= 1024, over bf16", "v7x", "fp8", "bf16", _many, 1.6),
    *(
        Goal(words, chip, "w4a16 g128", "xla int4 g128", rows, least)
        for words, rows, least in (
            ("w4a16 g128, M <= 16, over XLA's grouped int4", _few, 3.0),
            ("w4a16 g128, all M, over XLA's grouped int4", _any, 1.0),
        )
        for chip in ("v5e", "v5p", "v6e", "v7x")
    ),
    *(
        Goal(f"{same}, all M, over {label}", chip, same, label, _any, 1.0)
        for label, (_, _, same) in PEERS.items()
        for chip in ("v5e", "v6e")
    ),
)


def main() -> None:
    """Writes the files."""
    parts = []
    everything: dict[str, list[Row]] = {}
    for chip in CHIPS:
        path = RESULTS / f"tpu-static-{chip}.json"
        record = json.loads(path.read_text())
        rows = everything[chip] = record["rows"]
        text = f"# {chip}\n\n{NOTE} Compiler: {record['compiler']}.\n\n{_times(rows)}\n"
        path.with_suffix(".md").write_text(text + "\n" + _floors(rows) + _stand_ins(rows))
        parts.append(f"**{chip}** ({record['compiler']})\n\n{_gains(rows)}")
    summary = "\n".join([_goals(everything), _misses(everything), *parts])
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{summary}{END}{rest.partition(END)[2]}")


def _pairs(rows: list[Row], name: str, against: str) -> list[tuple[Row, Row]]:
    """Rows of two names at the same size, both with a time."""
    timed = [row for row in rows if row["microseconds"] is not None]
    others = {(r["k"], r["n"], r["m"]): r for r in timed if r["name"] == against}
    return [
        (row, others[row["k"], row["n"], row["m"]])
        for row in timed
        if row["name"] == name and (row["k"], row["n"], row["m"]) in others
    ]


def _goals(everything: dict[str, list[Row]]) -> str:
    lines = [
        "| goal | chip | to reach | least | most | reached | beyond any kernel"
        " | least, if ours never waited | least, XLA's operations in turn |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        found = [
            (other["microseconds"] / row["microseconds"], row, other)
            for row, other in _pairs(everything[goal.chip], goal.name, goal.against)
            if goal.rows(row["m"])
        ]
        if not found:
            continue
        low, high = min(found, key=lambda f: f[0]), max(found, key=lambda f: f[0])
        unwaited = min(other["microseconds"] / row["unwaited"] for _, row, other in found)
        reached = sum(ratio >= goal.least for ratio, _, _ in found)
        beyond = sum(_beyond(goal, row, other) for _, row, other in found)
        turns = [
            other["in_turn"] / row["microseconds"] for _, row, other in found if other["in_turn"]
        ]
        sign = ">= " if low[2]["at_least"] else ""
        size = f"{low[1]['m']} x {low[1]['k']} x {low[1]['n']}"
        lines.append(
            f"| {goal.words} | {goal.chip} | {goal.least:.2f}x | {sign}{low[0]:.2f}x ({size})"
            f" | {high[0]:.2f}x | {reached} of {len(found)} | {beyond or ''} | {unwaited:.2f}x"
            f" | {f'{min(turns):.2f}x' if turns else ''} |"
        )
    return "\n".join(lines) + "\n"


def _beyond(goal: Goal, row: Row, other: Row) -> bool:
    """Whether the goal asks for less time than the floor of our kernel, whatever it does."""
    return bool(other["microseconds"] / goal.least < max(row["floor"].values()) * (1 - 1e-3))


def _misses(everything: dict[str, list[Row]]) -> str:
    """By chip and format: how near the floor, and what bounds those that are not."""
    lines = [
        f"| chip | format | within {NEAR:.2f} of the floor | farthest | time, by what | floor |",
        "|---|---|---|---|---|---|",
    ]
    for chip, rows in everything.items():
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [r for r in rows if r["name"] == name and r["over_floor"] is not None]
            if not own or all(row["over_floor"] <= NEAR for row in own):
                continue
            far = max(own, key=lambda row: row["over_floor"])
            near = sum(row["over_floor"] <= NEAR for row in own)
            bound = max(far["floor"], key=far["floor"].get)
            lines.append(
                f"| {chip} | {name} | {near} of {len(own)} | {far['over_floor']:.2f}"
                f" ({far['m']} x {far['k']} x {far['n']}) | {far['microseconds']:.1f} us,"
                f" {far['bound']} | {far['floor'][bound]:.1f} us, {bound} |"
            )
    return "\n".join(lines) + "\n"


def _sizes(rows: list[Row]) -> Iterable[tuple[int, int, int]]:
    return dict.fromkeys((row["k"], row["n"], row["m"]) for row in rows)


def _gains(rows: list[Row]) -> str:
    """Gains over bfloat16 at 16 and 1024 rows."""
    return _times([row for row in rows if row["m"] in (16, 1024)])


def _times(rows: list[Row]) -> str:
    """Microseconds, gain over bfloat16, and what bounds the time."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [f"| K x N | M | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for k, n, m in _sizes(rows):
        own = {r["name"]: r for r in rows if (r["k"], r["n"], r["m"]) == (k, n, m)}
        base = own.get("bf16", {}).get("microseconds")
        cells = [_cell(own.get(name), base) for name in names]
        lines.append(f"| {k}x{n} | {m} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, base: float | None) -> str:
    if row is None:
        return ""
    if row["microseconds"] is None:
        return "does not compile"
    sign = ">= " if row["at_least"] else ""
    text = f"{sign}{row['microseconds']:.1f} us"
    if base and row["name"] != "bf16":
        text += f", {'<= ' if row['at_least'] else ''}{base / row['microseconds']:.2f}x"
    return f"{text} ({row['bound']})"


def _floors(rows: list[Row]) -> str:
    """Time over the floor, and what the floor is."""
    own = [row for row in rows if row["over_floor"] is not None]
    names = list(dict.fromkeys(row["name"] for row in own))
    lines = ["Time over the floor, and which resource the floor is:", ""]
    lines += [f"| K x N | M | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for k, n, m in _sizes(own):
        cells = []
        found = {r["name"]: r for r in own if (r["k"], r["n"], r["m"]) == (k, n, m)}
        for name in names:
            row = found.get(name)
            bound = max(row["floor"], key=row["floor"].get) if row else ""
            cells.append(f"{row['over_floor']:.2f} ({bound})" if row else "")
        lines.append(f"| {k}x{n} | {m} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _stand_ins(rows: list[Row]) -> str:
    """Which programs stood for larger ones."""
    lines = [
        f"* {row['name']}, {row['m']} x {row['k']} x {row['n']}: {row['times']} times"
        f" {row['program'].split('|')[1]}"
        for row in rows
        if row["times"] != 1
    ]
    if not lines:
        return ""
    return (
        "\n".join(["", "Too large to estimate; a smaller program stands for each of:", "", *lines])
        + "\n"
    )


if __name__ == "__main__":
    main()
