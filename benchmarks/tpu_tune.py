"""Searches configs that beat the rules, and writes the tables that `tpu.heuristics` reads first.

`python -m benchmarks.tpu_tune [--chips v6e] [--formats ...] [--rows 16] ...` compiles
every candidate with the TPU compiler and compares static times: the larger of estimated cycles over
the clock and bytes over the bandwidth. The best one is written to
`pallas_kernels/tpu/tables/<chip>.json` if it beats the rules by `MARGIN`; an entry that was
searched again and does not is taken out. Candidates and their order are fixed, and of equal ones
the first is taken, so that a run with the same compiler gives the same table. With few rows, what
spills registers is out. v4 has no estimates to search by.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tpu_aot import Job, compiler, measure
from benchmarks.tpu_programs import FORMATS
from benchmarks.tpu_static import lines
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu import table
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.config import MatmulConfig, Reading, ScaleTime
from jaxquant.pallas_kernels.tpu.heuristics import DECODE_ROWS, by_rules, fit

TABLES = Path(__file__).parent.parent / "pallas_kernels" / "tpu" / "tables"
MARGIN = 0.03
_MOST_SPILLS = 64  # with few rows, what is live fits the registers
_BLOCKS = {
    "few": ((0,), (256, 512, 1024, 2048), (2048, 4096, 8192, 16384)),  # bm = 0: all rows
    "many": ((512, 1024), (512, 1024, 2048), (4096, 8192, 16384)),
}


def main() -> None:
    """Searches and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    chips = [name for name in CHIPS if name != "v4"]
    parser.add_argument("--chips", nargs="+", default=chips, choices=chips)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 1024], choices=table.ROWS)
    parser.add_argument("--columns", nargs="+", type=int, default=[4096], choices=table.COLUMNS)
    parser.add_argument("--depths", nargs="+", type=int, default=[4096], choices=table.DEPTHS)
    arguments = parser.parse_args()
    for name in arguments.chips:
        a = arguments
        for item in itertools.product(a.formats, a.rows, a.columns, a.depths):
            _search(CHIPS[name], *item)


def _search(chip: Chip, label: str, rows: int, columns: int, depth: int) -> None:
    problem = MatmulProblem(rows, depth, columns, **FORMATS[label])
    configs = list(candidates(problem, chip))
    jobs = [
        Job(
            str(number),
            "benchmarks.tpu_cases:chosen",
            {
                "problem": dataclasses.asdict(problem),
                "config": dataclasses.asdict(config),
                "chip": chip.name,
            },
        )
        for number, config in enumerate(configs)
    ]
    results = measure(jobs, chip.name)
    memory = problem.least_bytes / (chip.hbm_bandwidth * chip.cores)
    times = [
        max(got.cycles / chip.clock, memory) if got.cycles and got.source == "estimate" else None
        for got in (results[job.name] for job in jobs)
    ]
    for number, job in enumerate(jobs[1:], 1):
        if rows <= DECODE_ROWS and results[job.name].spills > _MOST_SPILLS:
            times[number] = None
    rules, best = times[0], min(time for time in times if time is not None)
    print(f"{chip.name} {label} {rows}x{depth}x{columns}:")
    for config, time in sorted(
        zip(configs, times, strict=True), key=lambda pair: pair[1] or float("inf")
    )[:3]:
        print(f"  {config} {time and time * 1e6:.2f} us")
    if rules is None:
        print("  the rules' own config has no estimate: nothing is written")
        return
    print(f"  rules: {configs[0]} {rules * 1e6:.2f} us", flush=True)
    found = configs[times.index(best)] if rules / best > 1 + MARGIN else None
    _write(chip, table.key_of(problem), found, rules / best)


def candidates(problem: MatmulProblem, chip: Chip) -> Iterator[MatmulConfig]:
    """The rules' config first, then every other one that is tried."""
    rules = by_rules(problem, chip)
    seen = {rules}
    yield rules
    sizes = _BLOCKS["few" if problem.m <= DECODE_ROWS else "many"]
    for order in _orders(problem, chip, rules):
        for bm, bn, bk in itertools.product(*sizes):
            try:
                config = fit(problem, chip, MatmulConfig(bm or problem.m, bn, bk, *order))
            except Unsupported:
                continue
            if config is not None and config not in seen:
                seen.add(config)
                yield config


def _orders(
    problem: MatmulProblem, chip: Chip, rules: MatmulConfig
) -> Iterator[tuple[ScaleTime, Reading, str]]:
    """Scale, reading and operand. Float sums are scaled after the dot for few rows only."""
    if rules.scale == "end":
        yield "end", rules.reading, rules.operand
        return
    if problem.x_dtype == "int8" and "int8" in chip.mxu_dtypes:
        yield "after", "cast", "int8"
        if problem.m <= DECODE_ROWS:
            return
    scales: list[ScaleTime] = []
    if problem.m <= 256:
        scales.append("after")
    if problem.m > DECODE_ROWS:
        scales.append("before")
    # Reading bits spares vector operations, which the matrix units hide from some rows on.
    for scale in scales:
        readings = {rules.reading: None}
        if problem.codes == "int4" and problem.m <= 256:
            readings |= dict.fromkeys(("cast", "bits"))
        for reading in readings:
            if (scale, reading) != ("after", "staged"):  # there it is no other than "cast"
                yield scale, reading, rules.operand if scale == "after" else "bfloat16"


def _write(
    chip: Chip,
    key: table.Key,
    config: MatmulConfig | None,
    gain: float,
) -> None:
    """Puts an entry into the chip's table in its place, or takes it out."""
    path = TABLES / f"{chip.name}.json"
    entries = table.parse(path.read_text(), path.name) if path.exists() else {}
    entries.pop(key, None)
    if config is not None:
        blocks: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("bm", "bn", "bk", "scale", "reading", "operand")
        }
        entries[key] = table.Entry(*key, **blocks, gain=round(gain, 3))
    record = {
        "note": "by `python -m benchmarks.tpu_tune`; gain: time by the rules over this time",
        "compiler": compiler(),
        "entries": [dataclasses.asdict(entries[key]) for key in sorted(entries)],
    }
    TABLES.mkdir(exist_ok=True)
    text = lines(record)
    table.parse(text, path.name)
    path.write_text(text)


if __name__ == "__main__":
    main()
