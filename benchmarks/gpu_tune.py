"""Times configs on the GPU at hand and writes the table that dispatch goes by.

`python -m benchmarks.gpu_tune [--formats ...] [--shapes KxN ...] [--rows ...] [--seconds 500]`
starts from the config that the rules choose, changes one field at a time and keeps what is faster
and still right, until nothing is; XLA's route is timed beside it. Entries go to
pallas_kernels/gpu/tables/<chip>.json, in which those of other products stay, so a table can be made
in parts. `--dry-run` counts candidates on any machine; it times and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_products import FORMATS, Case, Format, product, time_case, weights
from benchmarks.gpu_timing import program, require_gpu
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.gpu import tables
from jaxquant.pallas_kernels.gpu.chips import CHIPS, Chip, chip_of
from jaxquant.pallas_kernels.gpu.config import GpuConfig, shared_bytes
from jaxquant.pallas_kernels.problem import E2M1, MatmulProblem, Unsupported

TABLES = Path(tables.__file__).parent / "tables"
SHAPES = ("4096x4096", "4096x14336", "8192x8192", "8192x28672")
ROWS = (8, 16, 32, 64, 128, 512, 2048, 8192)
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
_ROUNDS = 2
# A config whose result differs by more than this from XLA's, relative to the largest, is dropped.
_TOLERANCE = 2.0**-6


def main() -> None:
    """Tunes what is asked for and writes the table after every product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no product then")
    parser.add_argument("--out", type=Path, default=TABLES)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    require_gpu(arguments.dry_run, "gpu_tune")
    device = jax.devices()[0]
    chip = CHIPS["H200"] if arguments.dry_run else chip_of(device.device_kind)
    if chip is None:
        raise SystemExit(f"{device.device_kind} is none of {', '.join(CHIPS)}")
    products = [
        Case(*map(int, shape.split("x")), m, form, "pallas")
        for form in arguments.formats
        for shape in arguments.shapes
        for m in arguments.rows
    ]
    if arguments.dry_run:
        for case in products:
            print(case, describe(case, chip))
        return
    path = arguments.out / f"{chip.name}.json"
    entries = list(tables.parse(path.read_text(), str(path), chip.name)) if path.exists() else []
    until = time.monotonic() + arguments.seconds
    for case in products:
        if time.monotonic() > until:
            break
        try:
            entry = tune(case, chip)
        except Unsupported as why:
            print(case, f"no kernel: {why}", file=sys.stderr)
            continue
        entries = [e for e in entries if not _same_product(e, entry)] + [entry]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tables.render(entries, chip.name, environment(device)))
        print(entry, file=sys.stderr)


def problem_of(case: Case) -> MatmulProblem:
    """The case as a kernel is asked for it."""
    form = FORMATS[case.form]
    qtype = get_qtype(form.qtype)
    codes = qtype.name if qtype.packed else "table4" if qtype.table else qtype.storage
    act = None if form.act is None else form.act.replace("float8_e4m3", "float8_e4m3fn")
    return MatmulProblem(
        case.m, case.k, case.n, codes, act or "bfloat16", form.group or 0, form.zero_point,
        x_scale=act is not None, e2m1=qtype.table == E2M1,
    )  # fmt: skip


def describe(case: Case, chip: Chip) -> str:
    """How many first steps there are from the rules' config."""
    from jaxquant.pallas_kernels.gpu.heuristics import choose_config

    try:
        config = choose_config(problem_of(case), chip)
    except Unsupported as why:
        return f"no kernel: {why}"
    count = sum(1 for field in CHOICES for _ in neighbours(problem_of(case), chip, config, field))
    return f"{count} candidates around {config}"


def neighbours(
    problem: MatmulProblem, chip: Chip, config: GpuConfig, field: str
) -> Iterator[GpuConfig]:
    """The configs that differ in one field and fit into shared memory."""
    if field == "scale" and (config.scale == "end" or config.operand == "int8"):
        return
    if field == "reading" and config.reading == "direct":
        return
    for value in CHOICES[field]:
        if field == "blocks":
            value *= chip.multiprocessors // config.cluster
        changed = dataclasses.replace(config, **{field: value})
        if changed != config and _runs(problem, chip, changed):
            yield changed


def _runs(problem: MatmulProblem, chip: Chip, config: GpuConfig) -> bool:
    """Whether blocks fit into shared memory, and share tiles out evenly within a cluster."""
    tiles = -(-problem.n // config.tile_n)
    even = tiles % config.cluster == 0 and config.bm % (8 * config.cluster) == 0
    return shared_bytes(problem, config) <= chip.shared_bytes and (config.cluster == 1 or even)


def tune(case: Case, chip: Chip) -> tables.Entry:
    """The fastest config found for a product, beside XLA."""
    from jaxquant.pallas_kernels.gpu.heuristics import choose_config

    problem = problem_of(case)
    xla = time_case(dataclasses.replace(case, route="xla"), require_gpu(False, "gpu_tune"), "cuda")
    if xla.timing is None:
        raise RuntimeError(f"XLA's route of {case} was not timed: {xla.note}")
    best = choose_config(problem, chip)
    fastest = microseconds(case, problem, best)
    if fastest is None:
        raise RuntimeError(f"the rules' config of {case} does not run or is wrong: {best}")
    for _ in range(_ROUNDS):
        before = best
        for field in CHOICES:
            for candidate in neighbours(problem, chip, best, field):
                took = microseconds(case, problem, candidate)
                if took is not None and took < fastest:
                    best, fastest = candidate, took
        if best == before:
            break
    return tables.entry_of(problem, best, fastest, xla.timing.device)


@functools.cache
def microseconds(case: Case, problem: MatmulProblem, config: GpuConfig) -> float | None:
    """Device time of a call; None where the config does not compile or is wrong."""
    ws = weights(case.k, case.n, case.form, "cuda")
    xs = [
        jax.random.normal(key, (case.m, case.k), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(1), len(ws))
    ]
    fn = functools.partial(multiply, form=FORMATS[case.form], problem=problem, config=config)
    sets = list(zip(xs, ws, strict=True))
    try:
        got = np.asarray(jax.jit(fn)(xs[0], ws[0]), np.float32)
        compiled = jax.jit(program(fn)).lower(sets).compile()
    except Exception:  # noqa: BLE001  (a candidate that the compiler refuses is none)
        return None
    want = expected(case)
    if not np.abs(got - want).max() <= _TOLERANCE * np.abs(want).max():
        return None
    timing = require_gpu(False, "gpu_tune")(compiled, (sets,), len(sets))
    return None if timing is None else timing.device


@functools.cache
def expected(case: Case) -> np.ndarray:
    """XLA's result for the first weight."""
    w = weights(case.k, case.n, case.form, "cuda")[0]
    key = jax.random.split(jax.random.key(1), len(weights(case.k, case.n, case.form, "cuda")))[0]
    x = jax.random.normal(key, (case.m, case.k), jnp.bfloat16)
    return np.asarray(jax.jit(functools.partial(product, implementation="xla"))(x, w), np.float32)


def multiply(
    x: jax.Array, w: QTensor, *, form: Format, problem: MatmulProblem, config: GpuConfig
) -> jax.Array:
    """The kernel by this config, with the quantization of x where the format has one."""
    from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul

    x_scale = None
    if form.act is not None:
        x, x_scale = quantize_activation(x, ActQuant(problem.x_dtype, (1,)))
    return quantized_matmul(
        x, w.codes.T, w.scale, w.zero_point, problem=problem, config=config, x_scale=x_scale,
        table=w.qtype.table,
    )  # fmt: skip


def environment(device: Any) -> dict[str, Any]:
    """What the times depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jaxquant")}
    return {"command": "python -m benchmarks.gpu_tune", "device": device.device_kind, **versions}


def _same_product(one: tables.Entry, other: tables.Entry) -> bool:
    fields = ("codes", "x_dtype", "group", "zero_point", "k", "n", "m")
    return all(getattr(one, f) == getattr(other, f) for f in fields)


if __name__ == "__main__":
    main()
