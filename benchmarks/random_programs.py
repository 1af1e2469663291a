"""Thousands of random programs, quantized and compared with the floats that they stand for.

    python -m benchmarks.random_programs --count 20000

The programs and what is asserted of each are those of `tests/passes/random_programs.py`, which runs
fewer of them. A program follows from its number alone, so that one that fails can be run again with
``--first``. The record says what was run and what came out; it is written as the work goes on, and
a run of the same programs continues where the record ends; those that had failed are run again.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import time
import warnings
from pathlib import Path
from typing import Any

import jax

from benchmarks import harness
from tests.passes import random_programs

_CHUNK = 100  # programs of one task; compiled code is dropped behind it


def main() -> None:
    """Runs the programs that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_programs")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="record (default: in benchmarks/results)")
    given = parser.parse_args()
    name = f"random_programs-jax-{jax.__version__}.json"
    out = given.out or harness.RESULTS / name
    record = _started(out, given.first)
    starts = range(given.first + record["count"], given.first + given.count, _CHUNK)
    end = given.first + given.count
    tasks = [(start, min(_CHUNK, end - start)) for start in starts]
    failed = [(failure["number"], 1) for failure in record["failures"]]
    record["failures"], record["count"] = [], record["count"] - len(failed)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for part in pool.imap(_chunk, [*failed, *tasks]):
            _merge(record, part)
            _write(record, out, given)
            print(f"{record['count']} programs, {len(record['failures'])} failures", flush=True)


def _started(out: Path, first: int) -> dict[str, Any]:
    """The record so far, or an empty one."""
    if out.exists():
        record = json.loads(out.read_text())
        if (record["first"], record["environment"]) == (first, harness.environment()):
            return record
    return {"command": "", "environment": harness.environment(), "first": first, **_empty()}


def _empty() -> dict[str, Any]:
    return {
        "count": 0,
        "failures": [],
        "on_an_edge": [],
        "worst_error": {"float32": 0.0, "float64": 0.0, "rounded on the way": 0.0},
        "cpu_seconds": 0.0,
        "quantized_parameters": 0,
        "with_int8_activations": 0,
        "rows_of_plans": {},
        "programs_with_primitive": {},
        "occurrences_of_primitive": {},
    }


def _chunk(task: tuple[int, int]) -> dict[str, Any]:
    """The record of some programs, made in a process of the pool."""
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")  # numpy's, of float64 that becomes bfloat16
    record = _empty()
    first, count = task
    for number in range(first, first + count):
        _run(record, number)
    jax.clear_caches()
    return record


def _merge(record: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if key == "worst_error":
            record[key] = {kind: max(record[key][kind], e) for kind, e in value.items()}
        elif isinstance(value, dict):
            _count(record[key], value)
        else:
            record[key] += value


def _run(record: dict[str, Any], number: int) -> None:
    started = time.process_time()
    rng = random.Random(number)
    case = random_programs.program(lambda options: options[rng.randrange(len(options))])
    try:
        outcome = random_programs.check(case, number)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is recorded as a failure)
        what = f"{type(error).__name__}: {error}"
        record["failures"].append({"number": number, "error": what[:500]})
    else:
        _count(record["rows_of_plans"], outcome.statuses)
        _count(record["occurrences_of_primitive"], outcome.primitives)
        _count(record["programs_with_primitive"], dict.fromkeys(outcome.primitives, 1))
        if outcome.edge:
            record["on_an_edge"].append({"number": number, "difference": outcome.edge})
        record["quantized_parameters"] += outcome.quantized
        record["with_int8_activations"] += outcome.activations
        kind = "rounded on the way" if case.builder.rounding else case.builder.dtype
        record["worst_error"][kind] = max(record["worst_error"][kind], outcome.error)
    record["count"] += 1
    record["cpu_seconds"] += time.process_time() - started


def _count(total: dict[str, int], more: dict[str, int] | collections.Counter[str]) -> None:
    for key, n in more.items():
        total[key] = total.get(key, 0) + n


def _write(record: dict[str, Any], out: Path, given: argparse.Namespace) -> None:
    first = f" --first {given.first}" * bool(given.first)
    record["command"] = f"python -m benchmarks.random_programs --count {record['count']}{first}"
    for name in ("rows_of_plans", "programs_with_primitive", "occurrences_of_primitive"):
        record[name] = dict(sorted(record[name].items(), key=lambda item: (-item[1], item[0])))
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
