"""Static figures of the TPU kernels beside bfloat16 and XLA's own lowering. No hardware is timed.

`python -m benchmarks.tpu_static [--chips v5e v6e] [--shapes 4096x4096] [--rows 16 1024]` writes
benchmarks/results/tpu-static-<chip>.json and the table in tpu-static.md. Time is the larger of the
compiler's estimated cycles over the clock and the bytes that must be moved over the bandwidth
(`pallas_kernels/tpu/chips.py` has both, with sources). Needs libtpu; see `benchmarks.tpu_aot`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks.tpu_aot import Job, Static, measure
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_config

RESULTS = Path(__file__).parent / "results"
NOTE = (
    "Estimates of the TPU compiler (libtpu), no timing on hardware: time = max(estimated cycles /"
    " clock, bytes moved once / bandwidth). Behind each gain: what bounds the time. Where there are"
    " no estimated cycles (bf16 on v4), the floor of bytes and matrix operations stands instead."
)
# What each column is: fields of a problem. v7x multiplies fp8, not int8.
FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"codes": "int8", "x_dtype": "int8", "x_scale": True},
    "w8a16 g128": {"codes": "int8", "group": 128},
    "w4a16 g128": {"codes": "int4", "group": 128},
    "w4a16 g32": {"codes": "int4", "group": 32},
    "w4a8 g128": {"codes": "int4", "group": 128, "x_dtype": "int8", "x_scale": True},
    "w3a16 g128": {"codes": "int3", "group": 128},
    "w2a16 g128": {"codes": "int2", "group": 128},
    "fp8": {"codes": "float8_e4m3fn", "x_dtype": "float8_e4m3fn", "x_scale": True},
    "table4 g64": {"codes": "table4", "group": 64},
}
BASELINES = ("bf16", "xla int4 g128")


@dataclasses.dataclass(frozen=True)
class Row:
    """One program on one chip."""

    chip: str
    k: int
    n: int
    m: int
    name: str
    microseconds: float | None
    bound: str
    cycles: int | None
    source: str
    bytes: int
    floor_microseconds: float
    config: dict[str, Any] | None
    static: dict[str, Any]


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--formats", nargs="+", default=[*BASELINES, *FORMATS])
    parser.add_argument("--tag", default="", help="suffix of the result files")
    arguments = parser.parse_args()
    for name in arguments.chips:
        rows = measure_chip(name, arguments.shapes, arguments.rows, arguments.formats)
        stem = f"tpu-static-{name}{arguments.tag}"
        record = {
            "note": NOTE,
            "jax": jax.__version__,
            "chip": dataclasses.asdict(CHIPS[name]),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        text = table(rows)
        (RESULTS / f"{stem}.md").write_text(f"# {name}\n\n{NOTE}\n\n{text}")
        print(text)


def measure_chip(
    name: str, shapes: list[str], row_counts: list[int], formats: list[str]
) -> list[Row]:
    """Every format at every shape and number of rows, in one process of the compiler."""
    chip = CHIPS[name]
    jobs: list[tuple[Job, MatmulProblem, MatmulConfig | None]] = []
    for shape in shapes:
        k, n = map(int, shape.split("x"))
        for m in row_counts:
            for label in formats:
                found = _job(chip, label, m, k, n)
                if found is not None:
                    jobs.append(found)
    results = measure([job for job, _, _ in jobs], name)
    return [_row(chip, job, problem, config, results[job.name]) for job, problem, config in jobs]


def _job(
    chip: Chip, label: str, m: int, k: int, n: int
) -> tuple[Job, MatmulProblem, MatmulConfig | None] | None:
    name = f"{label}|{m}x{k}x{n}"
    if label == "bf16":
        problem = MatmulProblem(m, k, n, "int8")
        return Job(name, "benchmarks.tpu_cases:bfloat16", {"m": m, "k": k, "n": n}), problem, None
    if label == "xla int4 g128":
        problem = MatmulProblem(m, k, n, "int4", group=128)
        options = {"codes": "int4", "group": 128, "x_dtype": "bfloat16"}
        return (
            Job(name, "benchmarks.tpu_cases:xla", {"m": m, "k": k, "n": n, **options}),
            problem,
            None,
        )
    problem = MatmulProblem(m, k, n, **FORMATS[label])
    try:
        config = choose_config(problem, chip)
    except Unsupported as reason:
        print(f"{chip.name} {name}: {reason}")
        return None
    arguments = {"problem": dataclasses.asdict(problem), "chip": chip.name}
    return Job(name, "benchmarks.tpu_cases:chosen", arguments), problem, config


def _row(
    chip: Chip, job: Job, problem: MatmulProblem, config: MatmulConfig | None, static: Static
) -> Row:
    p, label = problem, job.name.partition("|")[0]
    moved = p.least_bytes + 2 * static.temporaries
    if label == "bf16":
        moved = 2 * (p.m * p.k + p.k * p.n + p.m * p.n)
    bandwidth = chip.hbm_bandwidth * chip.cores
    memory = moved / bandwidth * 1e6
    compute = None if static.cycles is None else static.cycles / chip.clock * 1e6
    least = p.m * p.k * p.n / (chip.macs_per_cycle * chip.cores) / chip.clock * 1e6
    if config is not None and config.operand == "int8":
        least /= 2
    time = None if static.error else max(least if compute is None else compute, memory)
    bound = "memory"
    if compute is None:
        bound = "floor: no cycle estimate"
    elif compute > memory:
        bound = max(static.units, key=lambda unit: static.units[unit])
    return Row(
        chip.name,
        p.k,
        p.n,
        p.m,
        label,
        time,
        bound,
        static.cycles,
        static.source,
        moved,
        max(memory, least),
        None if config is None else dataclasses.asdict(config),
        dataclasses.asdict(static),
    )


def table(rows: list[Row]) -> str:
    """Markdown: a line for each shape and number of rows, times and gains over bfloat16."""
    names = list(dict.fromkeys(row.name for row in rows))
    lines = [f"| K x N | M | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for key in dict.fromkeys((row.k, row.n, row.m) for row in rows):
        own = {row.name: row for row in rows if (row.k, row.n, row.m) == key}
        base = own["bf16"].microseconds if "bf16" in own else None
        cells = [_cell(own.get(name), base) for name in names]
        lines.append(f"| {key[0]}x{key[1]} | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, base: float | None) -> str:
    if row is None:
        return ""
    if row.microseconds is None:
        return "does not compile"
    if row.cycles is None and row.name.startswith("xla"):
        return "no estimate"
    gain = f", {base / row.microseconds:.2f}x" if base and row.name != "bf16" else ""
    return f"{row.microseconds:.1f} us{gain} ({row.bound})"


if __name__ == "__main__":
    main()
