"""What every figure shares: its form, the process it runs in, memory, and the written results.

A figure runs in a process of its own, twice, so that neither memory nor a warm cache of one leaks
into another. Times come from :mod:`jaxquant.evaluate.latency`: interleaved, blocked, repeated runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "qwix")


@dataclasses.dataclass
class Figure:
    """One measured figure.

    Attributes:
      title: what was measured.
      target: what there is to reach, in words.
      rows: one mapping a line of the table; the same keys in each.
      met: for every part of the target, whether it was reached.
      summary: lines for the README's table, each with "figure", "to reach", "jaxquant" and "Qwix".
      notes: what the reader must know: conditions, reasons for a miss, what a peer cannot do.
    """

    title: str
    target: str
    rows: list[dict[str, Any]]
    met: dict[str, bool] = dataclasses.field(default_factory=dict)
    summary: list[dict[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def summary_line(figure: str, to_reach: str, jaxquant: str, qwix: str) -> dict[str, str]:
    """A line of the README's table."""
    return {"figure": figure, "to reach": to_reach, "jaxquant": jaxquant, "Qwix": qwix}


def main(
    module: str,
    figures: Mapping[str, Callable[[bool], Figure]],
    timed: Collection[str],
    title: str,
) -> None:
    """The command line of a set of figures: runs those asked for and writes the results.

    Args:
      module: the module that calls; `python -m` runs it.
      figures: by name; each is told whether to be quick.
      timed: names of those that are run twice. The others have no noise.
      title: results go to results/TITLE-jax-VERSION.json and .md.
    """
    parser = argparse.ArgumentParser(description=f"Measures the figures of {title}.")
    parser.add_argument("--only", nargs="+", choices=figures, default=list(figures))
    parser.add_argument(
        "--quick", action="store_true", help="small shapes; checks the script itself"
    )
    parser.add_argument("--in-process", choices=figures, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        notes = [_take_the_cores()] if args.in_process in timed else []
        figure = figures[args.in_process](args.quick)
        figure.notes += notes
        print(json.dumps(dataclasses.asdict(figure)))
        return
    runs: dict[str, list[Figure]] = {}
    for name in args.only:
        count = 1 + (name in timed)
        runs[name] = [_in_own_process(module, name, args.quick) for _ in range(count)]
        print("\n".join(table(runs[name][0].rows)))
        print([figure.met for figure in runs[name]], flush=True)
    if args.quick:
        return
    for path in _write(title, runs, f"python -m {module}"):  # or some of them, with --only
        print(path)


def _in_own_process(module: str, name: str, quick: bool) -> Figure:
    """Runs a figure in a fresh Python."""
    result = subprocess.run(
        [sys.executable, "-m", module, "--in-process", name] + ["--quick"] * quick,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=RESULTS.parent.parent,
        env={"JAX_PLATFORMS": "cpu", **os.environ},
    )
    if result.returncode:
        raise SystemExit(f"figure {name} failed (see above)")
    return Figure(**json.loads(result.stdout.splitlines()[-1]))


def _take_the_cores() -> str:
    """Real-time priority for this process and the threads it will start; says whether it got it.

    Programs for two cores wait for the slower half: one other process that wants a core for a
    moment makes single runs 10 to 15% slower, and not those of every candidate alike.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return "Timed at normal priority: real-time scheduling needs root (or CAP_SYS_NICE)."
    return "Timed under real-time scheduling (SCHED_FIFO)."


class PeakMemory:
    """Bytes by which the process grew at most within a `with` block (Linux).

    The kernel's high-water mark is reset at the start, so what happened before does not count.
    """

    extra: int = 0

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def directory_bytes(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they explain a number."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _write(title: str, runs: dict[str, list[Figure]], command: str) -> tuple[Path, Path]:
    """Writes all runs as JSON and as markdown; returns both paths.

    Figures that were not measured now are kept, if they come from the same environment.
    """
    RESULTS.mkdir(exist_ok=True)
    where = environment()
    name = f"{title}-jax-{jax.__version__}"
    json_path = RESULTS / f"{name}.json"
    runs = {**_kept(json_path, where), **runs}
    data = {key: [dataclasses.asdict(figure) for figure in all_] for key, all_ in runs.items()}
    record = {"command": command, "environment": where, "figures": data}
    json_path.write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"# Figures of {title}", "", f"`{command}`", ""]
    lines += [", ".join(f"{key} {value}" for key, value in where.items()), ""]
    lines += ["Times and memory are measured twice, in two processes; both runs are shown.", ""]
    for figures in runs.values():
        lines += _markdown(figures)
    markdown_path = RESULTS / f"{name}.md"
    markdown_path.write_text("\n".join(lines))
    return json_path, markdown_path


def _kept(path: Path, where: dict[str, Any]) -> dict[str, list[Figure]]:
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    if record["environment"] != where:
        return {}
    return {key: [Figure(**figure) for figure in runs] for key, runs in record["figures"].items()}


def _markdown(figures: list[Figure]) -> Iterable[str]:
    first = figures[0]
    yield f"## {first.title}"
    yield ""
    yield f"To reach: {first.target}"
    yield ""
    for number, figure in enumerate(figures, 1):
        yield f"Run {number}" + (f": {_verdict(figure.met)}" if figure.met else "")
        yield ""
        yield from table(figure.rows)
        yield ""
    notes = dict.fromkeys(note for figure in figures for note in figure.notes)
    yield from (f"- {note}" for note in notes)
    if notes:
        yield ""


def table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """A markdown table of mappings with the same keys."""
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|" + "---|" * len(rows[0])
    for row in rows:
        yield "| " + " | ".join(_cell(value) for value in row.values()) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def _verdict(met: dict[str, bool]) -> str:
    return "; ".join(f"{part}: {'reached' if ok else 'MISSED'}" for part, ok in met.items())
