"""Writes the README's tables from benchmarks/results, so that they say what was measured.

    python -m benchmarks.readme

The tables stand between two marks; the figures' table joins both runs by a slash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, table

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def render(results: Path) -> str:
    """The section of one results file."""
    record = json.loads(results.read_text(encoding="utf-8"))
    where, figures = record["environment"], record["figures"]
    lines = [
        f"`{record['command']}` on {where['cores']} cores of {where['processor']}, "
        f"jax {where['jax']}, beside Qwix {where['qwix']} in the same process; times and "
        "memory measured twice. All runs: "
        f"[benchmarks/results]({RESULTS.relative_to(README.parent)}).",
        "",
        *table([row for runs in figures.values() for row in _summary(runs)]),
    ]
    if "quality" in figures:
        lines += ["", *_quality(figures["quality"][0])]
    return "\n".join(lines)


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    joined = []
    for lines in zip(*(run["summary"] for run in runs), strict=True):
        joined.append(
            {key: " / ".join(dict.fromkeys(line[key] for line in lines)) for key in lines[0]}
        )
    return joined


def _quality(figure: dict[str, Any]) -> list[str]:
    rows = figure["rows"]
    theirs = {row["recipe"]: row for row in rows if row["library"].startswith("Qwix")}
    same = {row["recipe"]: row for row in rows if row["library"].startswith("jaxquant, ")}
    shown = []
    for row in rows:
        if row["library"] != "jaxquant":
            continue
        name = row["recipe"]
        shown.append(
            {
                "recipe": name,
                "KL": row["KL"],
                "KL p99": row["KL p99"],
                "agreement": f"{row['agreement']:.1%}",
                **{
                    key: value
                    for key, value in row.items()
                    if key.startswith("KL ") and "p99" not in key
                },
                "KL, float embedding": same.get(name, {}).get("KL"),
                "KL, Qwix, float embedding": theirs.get(name, {}).get("KL"),
            }
        )
    head = "Quality on held-out text of the trained model: " + figure["notes"][0]
    return [head, "", *table(shown)]


def newest_results() -> Path:
    """The results of the newest jax."""
    return max(RESULTS.glob("spine-jax-*.json"), key=_version)


def main() -> None:
    """Replaces the section in the README by the newest jax's results."""
    newest = newest_results()
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{render(newest)}\n{END}{after}", encoding="utf-8")


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.stem.rpartition("-")[2].split("."))


if __name__ == "__main__":
    main()
