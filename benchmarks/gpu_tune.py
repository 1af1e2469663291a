"""Times configs on the GPU at hand and writes the table that dispatch goes by.

`python -m benchmarks.gpu_tune [--formats ...] [--shapes KxN ...] [--rows ...] [--seconds 540]`
starts from the config that the rules choose, changes one field at a time and keeps what is faster
and still right, until nothing is; XLA's route is timed beside it. Products are taken in the order
of the figures that are asked for, then experts and LLM.int8(). Entries go to
pallas_kernels/gpu/tables/<chip>.json after every product, in which those of other products stay.
It all runs in a child (`gpu_supervise`): a config that hangs or dies is none, and a later call
with the same `--journal` repeats nothing. `--dry-run` counts candidates on any machine; it times
and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu import EXPERTS
from benchmarks.gpu_clock import Clock, problem_of
from benchmarks.gpu_products import CAPACITY, FORMATS, LLM_INT8, Case
from benchmarks.gpu_supervise import Journal, digest, key_of, leave_if_broken, supervise
from benchmarks.gpu_timing import require_gpu
from jaxquant.pallas_kernels.gpu import tables
from jaxquant.pallas_kernels.gpu.chips import CHIPS, Chip, chip_of
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.gpu.heuristics import at_most
from jaxquant.pallas_kernels.gpu.llm_int8 import choose_outlier_config
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem, Unsupported

TABLES = Path(tables.__file__).parent / "tables"
# In the order in which products are tuned.
SHAPES = ("8192x8192", "8192x28672", "4096x14336", "4096x4096")
ROWS = (16, 2048, 64, 1, 8192, 512, 32, 128)
EXPERT_FORMATS, EXPERT_ROWS = ("w4a16 g128", "w8a16", "nf4 g64"), (128, 8, 16384)
# What each field may become; each is tried with the others as they are.
CHOICES: dict[str, Sequence[Any]] = {
    "split_k": (1, 2, 3, 4, 6, 8, 12, 16),
    "bm": (8, 16, 32, 64, 128, 192, 256),
    "bn": (64, 128),
    "bk": (64, 128, 256, 512),
    "warpgroups": (1, 2, 3, 4),
    "stages": (2, 3, 4, 5, 6, 8, 10, 12),
    "scale": ("after", "before"),
    "reading": ("bits", "cast"),
    "cluster": (1, 2, 4),
    "blocks": (0, 1, 2),  # times the multiprocessors, in clusters
}
# Fields that kernels of several products have no choice in.
_FIXED = {"experts": ("cluster", "blocks"), LLM_INT8: ("cluster", "blocks", "split_k", "scale")}
_ROUNDS = 2
_PATIENCE = 240.0


def main() -> None:
    """Tunes what is asked for and writes the table after every product."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*FORMATS, LLM_INT8, "experts"]
    parser.add_argument("--formats", nargs="+", choices=every, default=every)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=TABLES)
    parser.add_argument("--journal", type=Path, default=None)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    cases = list(products(arguments))
    if arguments.dry_run:
        for case in cases:
            print(case, describe(case, CHIPS["H200"]))
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    require_gpu(False, "gpu_tune")
    if arguments.child:
        work(Journal(arguments.journal), cases, arguments.out)
        return
    own = f"jaxquant-gpu-tune-{digest('.py')}.jsonl"
    path = arguments.journal or Path(tempfile.gettempdir()) / own
    command = [sys.executable, "-m", "benchmarks.gpu_tune", *sys.argv[1:], "--child"]
    journal = supervise([*command, "--journal", str(path)], path, arguments.seconds, _PATIENCE)
    for key, result in journal.results.items():
        if isinstance(result, dict) and "died" in result:
            print(f"{key}: {result['died']}", file=sys.stderr)


def products(arguments: argparse.Namespace) -> Iterator[Case]:
    """What is tuned: rows first, so that every format has what its figures are asked at."""
    for m in arguments.rows:
        for form in arguments.formats:
            if form != "experts":
                for shape in arguments.shapes:
                    yield Case(*map(int, shape.split("x")), m, form, "pallas")
        if "experts" in arguments.formats and m == arguments.rows[0]:
            for experts, k, n in EXPERTS:
                for form in EXPERT_FORMATS:
                    for rows in EXPERT_ROWS:
                        yield Case(k, n, rows, form, "pallas", experts)


def work(journal: Journal, cases: Sequence[Case], out: Path) -> None:
    """In the child: tunes the products that the journal does not have yet."""
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    if chip is None:
        raise SystemExit(f"{device.device_kind} is none of {', '.join(CHIPS)}")
    path = out / f"{chip.name}.json"
    entries = list(tables.parse(path.read_text(), str(path), chip.name)) if path.exists() else []
    for case in cases:
        done = key_of(done=dataclasses.asdict(case))
        if done in journal.results:
            continue
        try:
            entry = tune(case, chip, Clock(case, journal, require_gpu(False, "gpu_tune")))
        except Exception as why:  # noqa: BLE001  (whatever it is, the others are tuned)
            print(case, f"not tuned: {type(why).__name__}: {why}", file=sys.stderr, flush=True)
            journal.end(done, f"{type(why).__name__}: {why}"[:300])
            leave_if_broken()
            continue
        entries = [e for e in entries if not _same_product(e, entry)] + [entry]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tables.render(entries, chip.name, environment(device)))
        journal.end(done, dataclasses.asdict(entry))


def chosen(case: Case, chip: Chip) -> GpuConfig:
    """The config that the rules, or a table that is there, choose.

    Raises:
      Unsupported: none fits.
    """
    from jaxquant.pallas_kernels.gpu.heuristics import choose_config
    from jaxquant.pallas_kernels.gpu.ragged import choose_ragged_config

    if case.form == LLM_INT8:
        return choose_outlier_config(case.m, case.k, case.n, chip, CAPACITY)
    if case.experts:
        return choose_ragged_config(RaggedProblem(problem_of(case), case.experts), chip)
    return choose_config(problem_of(case), chip)


def describe(case: Case, chip: Chip) -> str:
    """How many first steps there are from the rules' config."""
    try:
        config = chosen(case, chip)
    except Unsupported as why:
        return f"no kernel: {why}"
    count = sum(1 for field in CHOICES for _ in neighbours(case, chip, config, field))
    return f"{count} candidates around {config}"


def neighbours(case: Case, chip: Chip, config: GpuConfig, field: str) -> Iterator[GpuConfig]:
    """The configs that differ in one field, and have fewer stages if they would not fit else."""
    problem = problem_of(case)
    if field == "scale" and (config.scale == "end" or config.operand == "int8"):
        return
    if field == "reading" and config.reading == "direct":
        return
    if field in _FIXED.get("experts" if case.experts else case.form, ()):
        return
    for value in CHOICES[field]:
        if field == "blocks":
            value *= chip.multiprocessors // config.cluster
        changed = dataclasses.replace(config, **{field: value})
        if changed == config or not _shares(problem, changed):
            continue
        fitting = at_most(problem, changed, _with_room(case, chip, changed))
        if fitting is None or (field == "stages" and fitting != changed):
            continue
        if dataclasses.replace(fitting, stages=changed.stages) == changed:  # it lost nothing else
            yield fitting


def _shares(problem: MatmulProblem, config: GpuConfig) -> bool:
    """Whether the blocks of a cluster share tiles out evenly."""
    tiles = -(-problem.n // config.tile_n)
    even = tiles % config.cluster == 0 and config.bm % (8 * config.cluster) == 0
    return config.cluster == 1 or even


def _with_room(case: Case, chip: Chip, config: GpuConfig) -> Chip:
    """The chip, less what a block has beside the product: LLM.int8()'s outliers."""
    own = 2 * CAPACITY * (config.bm + config.tile_n) if case.form == LLM_INT8 else 0
    return dataclasses.replace(chip, shared_bytes=chip.shared_bytes - own)


def tune(case: Case, chip: Chip, clock: Any) -> tables.Entry:
    """The fastest config found for a product, beside XLA.

    Args:
      case: the product.
      chip: where it runs.
      clock: `xla() -> microseconds`, `of(configs) -> [microseconds or None]`.

    Raises:
      RuntimeError: XLA's route does not run, or no config.
      Unsupported: no config fits.
    """
    best = chosen(case, chip)
    xla = clock.xla()
    (own,) = clock.of([best])
    fastest = math.inf if own is None else own  # another config may run where the rules' does not
    for _ in range(_ROUNDS):
        before = best
        for field in CHOICES:
            candidates = list(neighbours(case, chip, best, field))
            for candidate, took in zip(candidates, clock.of(candidates), strict=True):
                if took is not None and took < fastest:
                    best, fastest = candidate, took
        if best == before:
            break
    if fastest == math.inf:
        raise RuntimeError(f"no config near {best} runs and is right")
    outliers = CAPACITY if case.form == LLM_INT8 else 0
    problem = problem_of(case)
    return tables.entry_of(problem, best, fastest, xla, experts=case.experts, outliers=outliers)


def environment(device: Any) -> dict[str, Any]:
    """What the times depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jaxquant")}
    return {"command": "python -m benchmarks.gpu_tune", "device": device.device_kind, **versions}


def _same_product(one: tables.Entry, other: tables.Entry) -> bool:
    fields = ("codes", "x_dtype", "group", "zero_point", "experts", "outliers", "k", "n", "m")
    return all(getattr(one, f) == getattr(other, f) for f in fields)


if __name__ == "__main__":
    main()
