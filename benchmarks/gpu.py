"""The figures of the GPU kernels: products beside bf16, XLA and peers, and a whole decode step.

`python -m benchmarks.gpu` on a machine with an NVIDIA GPU. Results go to
benchmarks/results/gpu-<chip>.json and .md; what is in the JSON from the same environment is kept,
so `--only`, `--shapes`, `--rows`, `--formats` and `--seconds` measure a part at a time, and
`--peer-python` adds the libraries of another Python (`benchmarks.gpu_peers`). Every time is taken
in two passes over all cases; the slower of the two is shown. How is said in
`benchmarks.gpu_timing`. `--dry-run` runs it all on small shapes on any machine and times nothing.
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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_report
from benchmarks.gpu_products import FORMATS, Case, random_weight, time_case
from benchmarks.gpu_timing import Timer, Timing, require_gpu

RESULTS = Path(__file__).parent / "results"
PARTS = ("copy", "products", "prepare", "decoder", "peers")
SHAPES = ("4096x4096", "4096x14336", "8192x8192", "8192x28672")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
DECODERS = (("bf16", 1), ("w4a16_g128", 1), ("bf16", 16), ("w4a16_g128", 16))
# A dry run's own: every format once, the smallest that its groups and packing allow.
SMALL_SHAPES, SMALL_ROWS = ("256x128",), (1, 16)
_PASSES = 2


class Record:
    """What was measured so far, in a file."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"environment": environment, "rows": [], "decoder": []}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept.get("environment") == environment:
                self.data = kept

    def times(self, case: Case) -> list[Any]:
        """The passes of a case; whatever is appended is recorded."""
        key = dataclasses.asdict(case)
        for row in self.data["rows"]:
            if row["case"] == key:
                return row["passes"]
        self.data["rows"].append({"case": key, "passes": []})
        return self.data["rows"][-1]["passes"]

    def write(self) -> None:
        """Writes the JSON, and the tables beside it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(gpu_report.report(self.data))


def main() -> None:
    """Measures what is asked for, writes it, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", help="KxN", default=None)
    parser.add_argument("--rows", nargs="+", type=int, default=None)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop products then")
    parser.add_argument("--peer-python", help="a Python with PyTorch and peers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # other processes measure first
    timer = require_gpu(arguments.dry_run, "gpu")
    if not arguments.dry_run:  # the second pass, and the next call, need not compile again
        cache = Path(tempfile.gettempdir()) / "jaxquant-gpu-figures"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    shapes = arguments.shapes or (SMALL_SHAPES if arguments.dry_run else SHAPES)
    rows = arguments.rows or (SMALL_ROWS if arguments.dry_run else ROWS)
    sizes = [tuple(map(int, shape.split("x"))) for shape in shapes]
    name = "dry-run" if arguments.dry_run else jax.devices()[0].device_kind.split()[1]
    record = Record(arguments.out / f"gpu-{name}.json", environment())
    parts = set(arguments.only)
    if "decoder" in parts:
        record.data["decoder"] = [
            decoder(recipe, batch, layers, arguments.dry_run)
            for layers in ("stacked", "apart")
            for recipe, batch in DECODERS
        ]
    if "peers" in parts and arguments.peer_python:
        asked = [(k, n, m) for k, n in sizes for m in rows]
        record.data["peers"] = [peers(arguments.peer_python, asked) for _ in range(_PASSES)]
    record.write()
    if "copy" in parts:
        record.data["copy"] = [copy_bandwidth(timer, arguments.dry_run) for _ in range(_PASSES)]
    if "products" in parts:
        cases = list(all_cases(sizes, rows, arguments.formats))
        measure_products(record, cases, timer, time.monotonic() + arguments.seconds)
    if "prepare" in parts:
        record.data["prepare"] = [prepare_cost(arguments.dry_run) for _ in range(_PASSES)]
    record.write()
    print(gpu_report.report(record.data))


def all_cases(sizes: Any, rows: Any, formats: Any) -> Iterator[Case]:
    """Weights are shared by neighbours: every shape and format has all its rows in a row."""
    for k, n in sizes:
        for m in rows:
            yield Case(k, n, m, "bf16", "bf16")
        for form in formats:
            for m in rows:
                for route in ("pallas", "xla"):
                    yield Case(k, n, m, form, route)


def measure_products(record: Record, cases: list[Case], timer: Timer, until: float) -> None:
    """Adds passes to the cases that have too few, until the time is over."""
    for passes in range(1, _PASSES + 1):
        for case in cases:
            times = record.times(case)
            if len(times) >= passes or time.monotonic() > until:
                continue
            result = time_case(case, timer, "cuda")
            timing = None if result.timing is None else dataclasses.asdict(result.timing)
            times.append({"timing": timing, "bytes": result.bytes, "note": result.note})
            print(passes, case, timing or result.note or "not measured", file=sys.stderr)
        record.write()


def copy_bandwidth(timer: Timer, dry_run: bool) -> float | None:
    """Bytes a second of copying 4 GiB on the device: each byte is read and written."""
    size = 2**12 if dry_run else 2**30
    x = jnp.zeros(size, jnp.uint32)
    compiled = jax.jit(lambda x: x + jnp.uint32(1)).lower(x).compile()
    timing: Timing | None = timer(compiled, (x,), 1)
    return None if timing is None else 2 * x.nbytes / (timing.device * 1e-6)


def prepare_cost(dry_run: bool) -> dict[str, Any]:
    """Seconds and bytes of laying out one large int4 weight that lies as a checkpoint gives it."""
    import jaxquant as jq

    k, n = (256, 128) if dry_run else (8192, 28672)
    weight = random_weight(jax.random.key(0), k, n, FORMATS["w4a16 g128"], "cpu")
    jax.block_until_ready(jq.prepare(weight, "cuda").codes)  # compiles
    start = time.perf_counter()
    jax.block_until_ready(jq.prepare(weight, "cuda").codes)
    seconds = None if dry_run else time.perf_counter() - start
    return {"bytes": weight.nbytes, "seconds": seconds}


def decoder(recipe: str, batch: int, layers: str, dry_run: bool) -> dict[str, Any]:
    """A decode step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_decoder", recipe, str(batch)]
    command += ["--layers", layers] + ["--dry-run"] * dry_run
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=RESULTS.parent.parent
    )
    if done.returncode:
        return {"recipe": recipe, "batch": batch, "layers": layers, "error": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def peers(python: str, asked: Any) -> list[dict[str, Any]]:
    """What another Python's libraries need for the same products."""
    done = subprocess.run(
        [python, str(Path(__file__).parent / "gpu_peers.py")],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they explain a number."""
    device = jax.devices()[0]
    versions = {
        name: importlib.metadata.version(name) for name in ("jaxquant", "jax", "jaxlib", "flax")
    }
    return {
        "device": device.device_kind,
        "runtime": str(getattr(device.client, "platform_version", "")).replace("\n", " "),
        "python": platform.python_version(),
        **versions,
    }


if __name__ == "__main__":
    main()
