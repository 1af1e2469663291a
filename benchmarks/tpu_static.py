"""Static figures of the TPU kernels beside bfloat16, XLA's own lowering, Qwix and tokamax.

`python -m benchmarks.tpu_static [--chips v5e v6e] [--shapes 4096x4096] [--rows 16 1024]` writes
benchmarks/results/tpu-static-<chip>.json; `python -m benchmarks.tpu_tables` makes tables of them.
No hardware is timed: time is the larger of the compiler's estimated cycles over the clock and the
bytes that must be moved over the bandwidth (`pallas_kernels/tpu/chips.py` has both, with sources).
`benchmarks.tpu_programs` says where a program stands for a larger one, and where only a lower bound
is known. Needs libtpu; see `benchmarks.tpu_aot`.

A run takes long, so each program is written down when it is compiled. `--resume` keeps what the
file has of the same compiler: a program of ours while its fingerprint is that of today's kernel
(`benchmarks.tpu_fingerprint`). `--resume --recorded` thus compiles what has changed, and nothing
else. Rows that are not asked for stay as they are; a test says which are out of date.
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
from benchmarks.tpu_fingerprint import fingerprint
from benchmarks.tpu_programs import BASELINES, FORMATS, Program, moved, program, time_of
from jaxquant.pallas_kernels.problem import Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip

RESULTS = Path(__file__).parent / "results"
SHAPES = ("4096x4096", "4096x14336", "14336x4096", "8192x28672")
ROWS = (1, 8, 16, 64, 256, 1024, 4096)
LABELS = (*BASELINES, *FORMATS, *tpu_peers.PEERS)
# Label, m, k, n.
Product = tuple[str, int, int, int]
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
      like: key of one with the same work, asked for its estimate; of XLA's grouped int4 only.
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
    like: str | None
    times: float


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--formats", nargs="+", default=list(LABELS), choices=LABELS)
    parser.add_argument("--resume", action="store_true", help="keep what is still true of the file")
    parser.add_argument(
        "--recorded", action="store_true", help="the file's products, whatever else is said"
    )
    arguments = parser.parse_args()
    labels = [label for label in arguments.formats if label not in tpu_peers.PEERS]
    for label in arguments.formats:
        if label in tpu_peers.PEERS and tpu_peers.available(label):
            labels.append(label)
        elif label in tpu_peers.PEERS:
            print(f"{label}: not installed, left out")
    wanted = [
        (label, m, *map(int, shape.split("x")))
        for m in arguments.rows
        for shape in arguments.shapes
        for label in labels
    ]
    for name in arguments.chips:
        own = [_product(row) for row in recorded(name)["rows"]] if arguments.recorded else wanted
        measure_chip(name, own, arguments.resume)


def measure_chip(name: str, wanted: list[Product], resume: bool) -> None:
    """Every product; writes the chip's file as it goes.

    With `resume`, programs of the file that are today's are not compiled again, and its other
    products stay in it, unless no kernel does them any more.
    """
    chip, record = CHIPS[name], recorded(name)
    if not resume or record["compiler"] != compiler():
        record = _empty()
    rows = {_product(row): row for row in record["rows"]}
    known = [*rows, *map(_parsed, record["unsupported"])]
    items, reasons = _programs(chip, dict.fromkeys([*wanted, *known]))
    different = {item.job.name: item for item in items.values()}
    today = {key: _kernel(item) for key, item in different.items()}
    programs, kernels = record["programs"], record["kernels"]

    def is_there(item: Program) -> bool:
        key = item.job.name
        there = key in programs and kernels.get(key) == today[key]
        return there and (item.like is None or item.like.name in programs)

    asked = [item for product, item in items.items() if product in set(wanted)]
    left = [item for item in asked if not is_there(item)]
    jobs = {job.name: job for item in left for job in (item.job, item.like) if job is not None}
    for product in reasons:
        rows.pop(product, None)
    batches = list(_batches(jobs.values()))
    for number, batch in enumerate([[], *batches]):
        for key, static in measure(batch, name).items():
            programs[key] = dataclasses.asdict(static)
            kernels |= {key: today[key]} if today.get(key) else {}
        for product, item in items.items():
            if is_there(item):
                static = Static(**programs[item.job.name])
                like = None if item.like is None else Static(**programs[item.like.name])
                rows[product] = dataclasses.asdict(_row(chip, item, static, like))
        _write(chip, rows, programs, kernels, reasons)
        print(f"{name}: {number} of {len(batches)} batches of {_BATCH} compiled", flush=True)


def recorded(name: str) -> dict[str, Any]:
    """What a chip's file has; empty without one."""
    path = RESULTS / f"tpu-static-{name}.json"
    return json.loads(path.read_text()) if path.exists() else _empty()


def stale(name: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    """Which of a chip's rows are not of today's kernels, in words."""
    kernels, found = recorded(name)["kernels"], []
    today: dict[str, str | None] = {}
    for row in rows:
        key = row["program"]
        try:
            item = program(CHIPS[name], *_product(row))
        except Unsupported as reason:
            found.append(f"{key}: no kernel any more: {reason}")
            continue
        if item.config is None:
            continue  # none of ours: a smaller program may stand for it than would today
        if item.job.name != key:
            found.append(f"{key}: now {item.job.name}")
            continue
        if key not in today:
            today[key] = _kernel(item)
        if today[key] != kernels.get(key):
            found.append(f"{key}: another kernel by now")
    return list(dict.fromkeys(found))


def _kernel(item: Program) -> str | None:
    """The fingerprint of a program of ours, else None."""
    return None if item.config is None else fingerprint(item.job)


def _empty() -> dict[str, Any]:
    return {"compiler": "", "unsupported": {}, "rows": [], "kernels": {}, "programs": {}}


def _product(row: dict[str, Any]) -> Product:
    return row["name"], row["m"], row["k"], row["n"]


def _parsed(key: str) -> Product:
    """The product of a key of "unsupported"."""
    label, _, size = key.partition("|")
    m, k, n = map(int, size.split("x"))
    return label, m, k, n


def _batches(jobs: Iterable[Any]) -> Iterator[list[Any]]:
    left = list(jobs)
    while left:
        yield left[:_BATCH]
        left = left[_BATCH:]


def _programs(
    chip: Chip, wanted: Iterable[Product]
) -> tuple[dict[Product, Program], dict[Product, str]]:
    """The program of each product, or why there is no kernel."""
    items, reasons = {}, {}
    for product in wanted:
        label, m, k, n = product
        if label in tpu_peers.PEERS and not tpu_peers.can_do(label, m):
            continue
        try:
            items[product] = program(chip, label, m, k, n)
        except Unsupported as reason:
            reasons[product] = str(reason)
    return items, reasons


def _write(
    chip: Chip,
    rows: dict[Product, dict[str, Any]],
    programs: dict[str, dict[str, Any]],
    kernels: dict[str, str],
    reasons: dict[Product, str],
) -> None:
    ordered = sorted(rows.values(), key=lambda r: (r["k"], r["n"], r["m"], LABELS.index(r["name"])))
    used = {row["program"] for row in ordered} | {row.get("like") for row in ordered}
    record = {
        "note": NOTE,
        "compiler": compiler(),
        "chip": dataclasses.asdict(chip),
        "unsupported": {
            f"{label}|{m}x{k}x{n}": reason for (label, m, k, n), reason in reasons.items()
        },
        "rows": ordered,
        "kernels": {key: kernels[key] for key in sorted(used & kernels.keys())},
        "programs": {key: programs[key] for key in sorted(used & programs.keys())},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"tpu-static-{chip.name}.json").write_text(lines(record))


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


def _row(chip: Chip, item: Program, static: Static, like: Static | None) -> Row:
    p, time = item.problem, time_of(chip, item, static, like)
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
        None if item.like is None else item.like.name,
        round(item.times, 4),
    )


if __name__ == "__main__":
    main()
