"""Random architectures, folded and rotated in every way, and compared in float64.

    python -m benchmarks.random_folds --count 300

The architectures and what is asserted of each are those of `tests/passes/random_architectures.py`,
of which the tests run fewer. One follows from its number, so that one that fails can be run again
with ``--first N --count 1``. The record is written as the work goes on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import harness
from tests.passes import random_architectures

_EVERY = 20  # programs between two writes; compiled code is dropped then


def main() -> None:
    """Runs the architectures that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_folds")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first architecture")
    parser.add_argument("--out", type=Path, help="record (default: in benchmarks/results)")
    given = parser.parse_args()
    out = given.out or harness.RESULTS / f"random_folds-jax-{jax.__version__}.json"
    jax.config.update("jax_enable_x64", True)
    done: collections.Counter[str] = collections.Counter()
    choices: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    started = time.process_time()
    for count, number in enumerate(range(given.first, given.first + given.count), 1):
        model = random_architectures.architecture(number)
        choices.update(f"{k}={v}" for k, v in dataclasses.asdict(model).items())
        try:
            done += random_architectures.check(number)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is recorded as a failure)
            what = f"{type(error).__name__}: {error}"
            failures.append({"number": number, "error": what[:500]})
        if count % _EVERY == 0 or count == given.count:
            first = f" --first {given.first}" * bool(given.first)
            record = {
                "command": f"python -m benchmarks.random_folds --count {count}{first}",
                "environment": harness.environment(),
                "tolerance": random_architectures.TOLERANCE,
                "architectures": count,
                "failures": failures,
                "done": dict(sorted(done.items())),
                "choices": dict(sorted(choices.items())),
                "cpu_seconds": round(time.process_time() - started, 1),
            }
            out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{count} architectures, {len(failures)} failures: {dict(done)}", flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    main()
