"""A baseline of static figures: a change that makes a kernel slower is caught without a TPU.

`python -m benchmarks.tpu_guard` compiles a few kernels for every chip and writes
benchmarks/results/tpu-guard.json, a record for each version of the compiler;
`tests/pallas_kernels/tpu/test_guard.py` compiles them again and asks `worse` for what became worse.
Renew it with a change that is meant to alter the schedules, and look at what it prints.

With the compiler of a record, cycles, bundles, VMEM and spills are compared with it. With any
other, each kernel's gain over the bfloat16 product of that same compiler is compared with the
gains that are on record, within wide bounds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.tpu_aot import Job, Static, compiler, measure
from benchmarks.tpu_programs import Program, program, time_of
from benchmarks.tpu_static import lines
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip

BASELINE = Path(__file__).parent / "results" / "tpu-guard.json"
# Label and rows; small sizes, but several steps of the grid.
KERNELS = (
    ("w4a16 g128", 16),
    ("w4a8 g128", 16),
    ("w2a16 g128", 16),
    ("w8a8", 16),
    ("w4a16 g128", 256),
    ("w8a8", 256),
)
_K = _N = 2048
# Figures may grow by so much, and so many more registers may spill.
_GROWTH = {"cycles": 1.03, "bundles": 1.03, "vmem": 1.10}
_MORE_SPILLS = 64
# With another compiler: so much of the smallest gain on record must be left.
_KEPT = 0.75

Record = dict[str, dict[str, Any]]


def records() -> dict[str, Record]:
    """By the compiler's version: figures by `where`."""
    return json.loads(BASELINE.read_text()) if BASELINE.exists() else {}


def measured(chip: Chip) -> Record:
    """What this compiler says now of each kernel on a chip, and its gain over bfloat16."""
    items = _programs(chip)
    jobs = [Job(name, item.job.maker, item.job.arguments) for name, item in items.items()]
    results = measure(jobs, chip.name)
    times = {name: time_of(chip, items[name], results[name]).microseconds for name in items}
    found = {}
    for label, m in KERNELS:
        ours, floats = times[_name(label, m)], times[_name("bf16", m)]
        gain = round(floats / ours, 3) if ours and floats else 0.0
        found[where(chip.name, label, m)] = figures(results[_name(label, m)]) | {"gain": gain}
    return found


def where(chip: str, label: str, m: int) -> str:
    """How a kernel is named in a record."""
    return f"{chip}: {_name(label, m)}"


def figures(static: Static) -> dict[str, Any]:
    """What a record keeps of a program."""
    names = ("cycles", "source", "bundles", "spills", "vmem", "error")
    return {name: getattr(static, name) for name in names}


def worse(now: dict[str, Any], was: dict[str, Any]) -> list[str]:
    """How a kernel became worse than its record of the same compiler; empty if it did not."""
    found = [f"{now['error']}"] if now["error"] else []
    for name, limit in _GROWTH.items():
        if was[name] is not None and (now[name] is None or now[name] > was[name] * limit):
            found.append(f"{name} {was[name]} -> {now[name]}, more than {limit} times as many")
    if now["spills"] > was["spills"] + _MORE_SPILLS:
        found.append(f"spills {was['spills']} -> {now['spills']}")
    return found


def gain_lost(now: dict[str, Any], name: str, known: dict[str, Record]) -> list[str]:
    """How a kernel's gain fell behind all the records of other compilers; empty if it did not."""
    least = min(record[name]["gain"] for record in known.values()) * _KEPT
    if now["error"] or now["gain"] < least:
        return [f"{now['gain']} times as fast as bfloat16, not {least:.2f} ({now['error']})"]
    return []


def _programs(chip: Chip) -> dict[str, Program]:
    floats = [("bf16", m) for m in sorted({m for _, m in KERNELS})]
    return {_name(label, m): program(chip, label, m, _K, _N) for label, m in (*KERNELS, *floats)}


def _name(label: str, m: int) -> str:
    return f"{label} {m}x{_K}x{_N}"


def main() -> None:
    """Writes the record of this compiler beside those of others, and prints what changed."""
    known = records()
    before, record = known.get(compiler(), {}), {}
    for chip in CHIPS.values():
        record |= measured(chip)
    for name, now in record.items():
        if now != before.get(name):
            print(f"{name}: {before.get(name)} -> {now}")
    known[compiler()] = record
    BASELINE.write_text(lines({version: known[version] for version in sorted(known)}))


if __name__ == "__main__":
    main()
