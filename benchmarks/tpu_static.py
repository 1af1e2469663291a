"""Static figures of the TPU kernels beside bfloat16, XLA's own lowering, Qwix and tokamax.

`python -m benchmarks.tpu_static [--chips v5e v6e] [--shapes 4096x4096] [--rows 16 1024]` writes
benchmarks/results/tpu-static-<chip>.json; `python -m benchmarks.tpu_tables` makes tables of them.
No hardware is timed: time is the larger of the compiler's estimated cycles over the clock and the
bytes that must be moved over the bandwidth (`pallas_kernels/tpu/chips.py` has both, with sources).
`benchmarks.tpu_programs` says where a program stands for a larger one, and where only a lower bound
is known. Needs libtpu; see `benchmarks.tpu_aot`.

A run takes long, so each program is written down when it is compiled, and `--resume` takes those of
the same compiler and config from the file. After a change of a kernel's body, do not resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import tpu_floor, tpu_peers
from benchmarks.tpu_aot import Static, compiler, measure
from benchmarks.tpu_programs import BASELINES, FORMATS, Program, moved, program, time_of
from jaxquant.pallas_kernels.problem import Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip

RESULTS = Path(__file__).parent / "results"
SHAPES = ("4096x4096", "4096x14336", "14336x4096", "8192x28672")
ROWS = (1, 8, 16, 64, 256, 1024, 4096)
LABELS = (*BASELINES, *FORMATS, *tpu_peers.PEERS)
NOTE = (
    "Estimates of the TPU compiler, no timing on hardware: time = max(estimated cycles / clock,"
    " bytes moved once / bandwidth). at_least: no estimate; what schedules, bytes and multiply-adds"
    " need (benchmarks/tpu_programs.py). model: XLA's own cost model."
)
_BATCH = 6  # programs a process: what is compiled is written down after each


@dataclasses.dataclass(frozen=True)
class Row:
    """One product on one chip.

    Attributes:
      k, n, m, name: the product and its label.
      microseconds: None if it does not compile.
      bound: what bounds the time.
      at_least: the time is a lower bound.
      unwaited: of our kernels, microseconds if no step waited for its blocks: XLA's and tokamax's
        figures count no such waits, and can be compared with this; else None.
      model: microseconds by XLA's cost model where there is no estimate.
      in_turn: of XLA's grouped int4, microseconds if its operations follow each other.
      floor: microseconds that each resource needs (`tpu_floor`); empty if it is none of ours.
      over_floor: time over the largest of them.
      bytes: what must be moved once.
      program: key of the compiled program.
      times: by how much the program's time was multiplied.
    """

    k: int
    n: int
    m: int
    name: str
    microseconds: float | None
    bound: str
    at_least: bool
    unwaited: float | None
    model: float | None
    in_turn: float | None
    floor: dict[str, float]
    over_floor: float | None
    bytes: int
    program: str
    times: float


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--formats", nargs="+", default=list(LABELS), choices=LABELS)
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    arguments = parser.parse_args()
    wanted = [label for label in arguments.formats if label not in tpu_peers.PEERS]
    for label in arguments.formats:
        if label in tpu_peers.PEERS and tpu_peers.available(label):
            wanted.append(label)
        elif label in tpu_peers.PEERS:
            print(f"{label}: not installed, left out")
    for name in arguments.chips:
        measure_chip(name, arguments.shapes, arguments.rows, wanted, arguments.resume)


def measure_chip(
    name: str, shapes: list[str], row_counts: list[int], labels: list[str], resume: bool
) -> None:
    """Every label at every shape and number of rows; writes the chip's file as it goes.

    With `resume`, what the file has of the same compiler is used, and its other products stay in it
    unless they are another program by now (a rule or a table chose another config).
    """
    chip, path = CHIPS[name], RESULTS / f"tpu-static-{name}.json"
    wanted = [
        (label, m, *map(int, shape.split("x")))
        for m in row_counts
        for shape in shapes
        for label in labels
    ]
    items, reasons = _programs(chip, wanted)
    jobs = {item.job.name: item.job for item in items}
    compiled: dict[str, Static] = {}
    if resume and path.exists():
        record = json.loads(path.read_text())
        if record.get("compiler") == compiler():
            compiled = {key: Static(**value) for key, value in record["programs"].items()}
            others = [(row["name"], row["m"], row["k"], row["n"]) for row in record["rows"]]
            more, _ = _programs(chip, [other for other in others if other not in wanted])
            items += more
            reasons = record["unsupported"] | reasons
    left = [job for key, job in jobs.items() if key not in compiled]
    for batch in _batches(left):
        compiled |= measure(batch, name)
        print(f"{name}: {len(compiled)} programs, {len(left)} were to be compiled", flush=True)
        _write(path, chip, items, compiled, reasons)
    _write(path, chip, items, compiled, reasons)


def _batches(jobs: Iterable[Any]) -> Iterator[list[Any]]:
    left = list(jobs)
    while left:
        yield left[:_BATCH]
        left = left[_BATCH:]


def _programs(
    chip: Chip, wanted: list[tuple[str, int, int, int]]
) -> tuple[list[Program], dict[str, str]]:
    items, reasons = [], {}
    for label, m, k, n in wanted:
        if label in tpu_peers.PEERS and not tpu_peers.can_do(label, m):
            continue
        try:
            items.append(program(chip, label, m, k, n))
        except Unsupported as reason:
            reasons[f"{label}|{m}x{k}x{n}"] = str(reason)
    return items, reasons


def _write(
    path: Path,
    chip: Chip,
    items: list[Program],
    compiled: dict[str, Static],
    reasons: dict[str, str],
) -> None:
    rows = [_row(chip, i, compiled[i.job.name]) for i in items if i.job.name in compiled]
    rows.sort(key=lambda row: (row.k, row.n, row.m, LABELS.index(row.name)))
    used = sorted({row.program for row in rows})
    record = {
        "note": NOTE,
        "compiler": compiler(),
        "chip": dataclasses.asdict(chip),
        "unsupported": reasons,
        "rows": [dataclasses.asdict(row) for row in rows],
        "programs": {key: dataclasses.asdict(compiled[key]) for key in used},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(lines(record))


def lines(record: dict[str, Any]) -> str:
    """JSON with an entry of each list or dictionary a line, so that versions can be compared."""
    parts = []
    for key, value in record.items():
        if isinstance(value, list):
            inner = ",\n".join(f"  {json.dumps(item)}" for item in value)
            parts.append(f' "{key}": [\n{inner}\n ]')
        elif isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f' "{key}": {{\n{inner}\n }}')
        else:
            parts.append(f' "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _row(chip: Chip, item: Program, static: Static) -> Row:
    p, time = item.problem, time_of(chip, item, static)
    floor = None
    if item.config is not None:
        floor = tpu_floor.floor(p, item.config.operand, chip)
    over = None
    if floor is not None and time.microseconds is not None:
        over = round(time.microseconds / floor.microseconds, 3)
    return Row(
        p.k,
        p.n,
        p.m,
        item.label,
        None if time.microseconds is None else round(time.microseconds, 3),
        time.bound,
        time.at_least,
        None if time.unwaited is None else round(time.unwaited, 3),
        None if time.model is None else round(time.model, 3),
        None if time.in_turn is None else round(time.in_turn, 3),
        {} if floor is None else {name: round(t, 3) for name, t in floor.times.items()},
        over,
        moved(item),
        item.job.name,
        round(item.times, 4),
    )


if __name__ == "__main__":
    main()
