"""The figures of the GPU kernels: products beside bf16, XLA and peers, and a whole decode step.

`python -m benchmarks.gpu` on a machine with an NVIDIA GPU; `--seconds` (540) bounds it, and the
same command again goes on where it was stopped. What was measured is kept, piece by piece, in
benchmarks/results/gpu-<chip>.jsonl, from which gpu-<chip>.json and the tables of gpu-<chip>.md are
made; another jax, driver, kernel or table begins anew. Products, experts, LLM.int8(), copying and
preparing are timed in a child (`gpu_supervise`: a kernel that hangs or dies costs its own figure
only), each in two passes of which the slower is shown; every decode step has a process of its own,
and so have the libraries of another Python (`--peer-python`, `gpu_peers`). `--only`, `--shapes`,
`--rows` and `--formats` measure parts. How is said in `gpu_timing`. `--dry-run` runs it all on
small shapes on any machine and times nothing.
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
from benchmarks.gpu_products import FORMATS, LLM_INT8, Case, random_weight, time_case
from benchmarks.gpu_supervise import Journal, digest, key_of, leave_if_broken, supervise
from benchmarks.gpu_timing import Timer, Timing, require_gpu

RESULTS = Path(__file__).parent / "results"
IN_CHILD = ("copy", "products", "llm_int8", "experts", "prepare")
PARTS = (*IN_CHILD, "decoder", "peers")
# In the order in which they are measured: large ones, and the rows that figures are asked for.
SHAPES = ("8192x8192", "8192x28672", "4096x14336", "4096x4096")
ROWS = (16, 2048, 1, 64, 8, 8192, 4, 512, 2, 32, 128)
PEER_ROWS = (1, 16, 64, 2048)
# Experts, their k and n: Qwen3-30B-A3B's, and rows of 1, 16 and 2048 tokens of 8 experts each.
EXPERTS = ((128, 2048, 768), (128, 768, 2048))
EXPERT_ROWS = (128, 8, 16384)
EXPERT_FORMATS = ("w4a16 g128", "w8a16", "nf4 g64", "w4a8 g128")
DECODERS = tuple(
    (recipe, batch, layers)
    for layers in ("stacked", "apart")
    for batch in (1, 16)
    for recipe in ("bf16", "w4a16_g128")
)
# A dry run's own: every format once, the smallest that its groups and packing allow.
SMALL_SHAPES, SMALL_ROWS, SMALL_EXPERTS = ("256x128",), (1, 16), ((4, 256, 128),)
_PASSES = 2
_PATIENCE = 180.0
# Seconds of the longest decode step's process: 8B random weights are made, and a step compiled.
_DECODER = 240.0


def main() -> None:
    """Measures what is asked for, writes it, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", help="KxN", default=None)
    parser.add_argument("--rows", nargs="+", type=int, default=None)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--peer-python", help="a Python with PyTorch and peers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--journal", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # other processes measure
    timer = require_gpu(arguments.dry_run, "gpu")
    if arguments.journal:
        work(Journal(arguments.journal), arguments, timer)
        return
    until = time.monotonic() + arguments.seconds
    name = "dry-run" if arguments.dry_run else jax.devices()[0].device_kind.split()[1]
    path = arguments.out / f"gpu-{name}.jsonl"
    begin(path)
    for step in (in_child, decoders, peers):
        try:
            step(path, arguments, until)
        except RuntimeError as error:  # the others are measured none the less
            print(error, file=sys.stderr)
        write(path)
    print(path.with_suffix(".md").read_text())


def begin(path: Path) -> None:
    """Goes on with a journal from the same environment, or begins a new one."""
    here = environment()
    if Journal(path).results.get("environment") != here:
        path.unlink(missing_ok=True)
        Journal(path).end("environment", here)


def in_child(path: Path, arguments: argparse.Namespace, until: float) -> None:
    """What is timed in a process that may die."""
    if not set(arguments.only) & set(IN_CHILD):
        return
    if arguments.dry_run:
        work(Journal(path), arguments, require_gpu(True, "gpu"))
        return
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--journal", str(path)]
    supervise(command, path, until - time.monotonic(), _PATIENCE)


def work(journal: Journal, arguments: argparse.Namespace, timer: Timer) -> None:
    """In the child: every piece that is not in the journal yet."""
    if not arguments.dry_run:  # the second pass, and the next process, need not compile again
        cache = Path(tempfile.gettempdir()) / "jaxquant-gpu-figures"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    parts, dry_run = set(arguments.only), arguments.dry_run
    for number in range(1, _PASSES + 1):
        if "copy" in parts:
            key = key_of(part="copy", number=number)
            journal.once(key, lambda: copy_bandwidth(timer, dry_run))
        for case in cases_of(arguments):
            fields = dataclasses.asdict(case)

            def timed(case: Case = case) -> dict[str, Any]:
                result = time_case(case, timer, "cuda")
                timing = None if result.timing is None else dataclasses.asdict(result.timing)
                return {"timing": timing, "bytes": result.bytes, "note": result.note}

            one = journal.once(key_of(part="product", number=number, **fields), timed)
            if one.get("note") and not dry_run:
                leave_if_broken()
        if "prepare" in parts:
            key = key_of(part="prepare", number=number)
            journal.once(key, lambda: prepare_cost(dry_run))


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """Products in the order in which they are timed; neighbours share a weight."""
    dry_run, parts = arguments.dry_run, set(arguments.only)
    shapes = arguments.shapes or (SMALL_SHAPES if dry_run else SHAPES)
    sizes = [tuple(map(int, shape.split("x"))) for shape in shapes]
    rows = arguments.rows or (SMALL_ROWS if dry_run else ROWS)
    for first in (True, False):  # of all, the rows that figures are asked for come first
        some = rows[:4] if first else rows[4:]
        if "products" in parts:
            yield from plain_cases(sizes, some, arguments.formats)
        if "llm_int8" in parts:
            for k, n in sizes:
                yield from (Case(k, n, m, LLM_INT8, r) for m in some for r in ("pallas", "xla"))
        if "experts" in parts and first:
            own = arguments.rows or (SMALL_ROWS if dry_run else EXPERT_ROWS)
            for experts in SMALL_EXPERTS if dry_run else EXPERTS:
                yield from expert_cases(*experts, own, arguments.formats)


def expert_cases(experts: int, k: int, n: int, rows: Any, formats: Any) -> Iterator[Case]:
    """Rows grouped by expert; `rows` are all of them."""
    yield from (Case(k, n, m, "bf16", "bf16", experts) for m in rows)
    for form in EXPERT_FORMATS:
        if form in formats:
            for m in rows:
                yield from (Case(k, n, m, form, route, experts) for route in ("pallas", "xla"))


def plain_cases(sizes: Any, rows: Any, formats: Any) -> Iterator[Case]:
    """Every shape and format has all its rows in a row."""
    for k, n in sizes:
        yield from (Case(k, n, m, "bf16", "bf16") for m in rows)
        for form in formats:
            yield from (Case(k, n, m, form, route) for m in rows for route in ("pallas", "xla"))


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


def decoders(path: Path, arguments: argparse.Namespace, until: float) -> None:
    """Decode steps, each in a process of its own; what failed is tried again by the next call."""
    journal = Journal(path)
    for recipe, batch, layers in DECODERS if "decoder" in arguments.only else ():
        key = key_of(part="decoder", recipe=recipe, batch=batch, layers=layers)
        left = until - time.monotonic()
        if left <= 0 or "milliseconds" in journal.results.get(key, {}):
            continue
        journal.end(key, decoder(recipe, batch, layers, arguments.dry_run, min(left, _DECODER)))


def decoder(recipe: str, batch: int, layers: str, dry_run: bool, seconds: float) -> dict[str, Any]:
    """A decode step in a process of its own; the error, if there is one."""
    command = [sys.executable, "-m", "benchmarks.gpu_decoder", recipe, str(batch)]
    command += ["--layers", layers] + ["--dry-run"] * dry_run
    what = {"recipe": recipe, "batch": batch, "layers": layers}
    root = RESULTS.parent.parent
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=root, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return what | {"error": f"not done in {seconds:.0f} seconds"}
    if done.returncode:
        return what | {"error": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def peers(path: Path, arguments: argparse.Namespace, until: float) -> None:
    """What another Python's libraries need for the same products; a line is kept at once."""
    left = until - time.monotonic()
    if "peers" not in arguments.only or not arguments.peer_python or left <= 0:
        return
    journal = Journal(path)
    shapes = arguments.shapes or (SMALL_SHAPES if arguments.dry_run else SHAPES)
    rows = arguments.rows or (SMALL_ROWS if arguments.dry_run else PEER_ROWS)
    asked = [(*map(int, shape.split("x")), m) for shape in shapes for m in rows]
    measured = [one for one in journal.results.values() if "us" in (one or ())]
    done = [[one[name] for name in ("library", "form", "k", "n", "m")] for one in measured]
    command = [arguments.peer_python, str(Path(__file__).parent / "gpu_peers.py")]
    command += ["--seconds", str(left)] + ["--dry-run"] * arguments.dry_run
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as lines:
        given.write(json.dumps({"asked": asked, "done": done}))
        given.seek(0)
        try:
            subprocess.run(command, stdin=given, stdout=lines, check=False, timeout=left + 5)
        except subprocess.TimeoutExpired:
            print("peers were stopped at the end of the time", file=sys.stderr)
        lines.seek(0)
        for line in lines.read().splitlines():
            if line.startswith("{"):
                one = json.loads(line)
                names = ("library", "form", "k", "n", "m")
                journal.end(key_of(part="peer", **{n: one.get(n) for n in names}), one)


def write(path: Path) -> None:
    """Makes the JSON and the tables of the journal."""
    data = record(Journal(path))
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(gpu_report.report(data))


def record(journal: Journal) -> dict[str, Any]:
    """The journal as `gpu_report` takes it: rows with their passes, and what else there is."""
    data: dict[str, Any] = {"environment": journal.results["environment"], "rows": []}
    data |= {name: [] for name in ("copy", "prepare", "decoder", "peers")}
    rows: dict[str, dict[str, Any]] = {}
    for key, result in journal.results.items():
        if key == "environment":
            continue
        fields = json.loads(key)
        part = fields.pop("part")
        if part != "product":
            died = isinstance(result, dict) and "died" in result
            if not died:
                data[f"{part}s" if part == "peer" else part].append(result)
            continue
        fields.pop("number")
        if "died" in result:
            result = {"timing": None, "bytes": 0, "note": result["died"][:300]}
        row = rows.setdefault(key_of(**fields), {"case": fields, "passes": []})
        row["passes"].append(result)
    return data | {"rows": list(rows.values())}


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
        "kernels": digest(".py", ".json"),  # and their tables
        **versions,
    }


if __name__ == "__main__":
    main()
