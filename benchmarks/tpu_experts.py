"""Static figures of products of rows grouped by expert, beside XLA's own. No hardware is timed.

`python -m benchmarks.tpu_experts [--chips v5e v6e]` writes results/tpu-experts.{json,md}.
The kernel: schedule of a visit (bundles, by the compiler) times the visits of rows that are spread
evenly, or the bytes of the experts in use over the bandwidth, whichever takes longer. XLA: its
bytes alone, a floor (the estimator has no cycles for its fusion), with the experts it writes out in
bfloat16 as the compiler reports them. Needs libtpu; see `benchmarks.tpu_aot`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_aot import Job, Static, compiler, measure
from benchmarks.tpu_static import RESULTS
from jaxquant.core.primitives import quantized_ragged_dot
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, RaggedProblem, dtype_bytes
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.heuristics import choose_ragged_config
from jaxquant.pallas_kernels.tpu.ragged import ragged_matmul

NOTE = (
    "Estimates of the TPU compiler (libtpu), no timing on hardware. Kernel: max(bundles a visit x"
    " visits / clock, bytes of the experts in use / bandwidth). XLA: bytes / bandwidth, a floor."
)
FORMATS: dict[str, dict[str, Any]] = {
    "w4a16 g128": {"codes": "int4", "group": 128},
    "w4a8 g128": {"codes": "int4", "group": 128, "x_dtype": "int8", "x_scale": True},
    "w8a8": {"codes": "int8", "x_dtype": "int8", "x_scale": True},
}


def kernel(product: dict[str, Any], experts: int, chip: str) -> tuple[Any, Any, int]:
    """`ragged_matmul` with the chip's config; the steps are those of one visit."""
    problem = RaggedProblem(MatmulProblem(**product), experts)
    p, config = problem.product, choose_ragged_config(problem, CHIPS[chip])
    struct = jax.ShapeDtypeStruct
    arrays = {
        "x": struct((p.m, p.k), jnp.dtype(p.x_dtype)),
        "codes": struct((experts, p.code_rows, p.n), jnp.dtype(STORAGE[p.codes][0])),
        "scale": struct((experts, p.groups, p.n), jnp.float32),
        "group_sizes": struct((experts,), jnp.int32),
    }
    if p.zero_point:
        arrays["zero_point"] = struct((experts, p.groups, p.n), jnp.int8)
    if p.x_scale:
        arrays["x_scale"] = struct((p.m, 1), jnp.float32)

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return ragged_matmul(**arrays, problem=problem, config=config)

    return fn, (arrays,), math.ceil(p.n / config.bn) * (p.k // config.bk)


def product(
    m: int, k: int, n: int, experts: int, codes: str, group: int, act: bool, implementation: str
) -> tuple[Any, Any, int]:
    """`quantized_ragged_dot` on a QTensor: what dispatch makes of it, or what is forced."""
    struct = jax.ShapeDtypeStruct
    w = QTensor(
        struct((experts, k, n), jnp.dtype(codes)),
        struct((experts, k // (group or k), n), jnp.float32),
        qtype=get_qtype(codes),
        dtype=jnp.dtype("bfloat16"),
        act=ActScheme() if act else None,
    )

    def fn(x: jax.Array, w: QTensor, sizes: jax.Array) -> jax.Array:
        return quantized_ragged_dot(x, w, sizes, implementation=implementation or None)

    return fn, (struct((m, k), jnp.bfloat16), w, struct((experts,), jnp.int32)), 0


def figures(
    chip: Chip, shapes: list[tuple[int, int, int]], rows: list[int]
) -> list[dict[str, Any]]:
    """A record for each format, shape (experts, k, n) and number of rows."""
    cases, jobs = [], []
    for experts, k, n in shapes:
        for m in rows:
            for label, fields in FORMATS.items():
                p = RaggedProblem(MatmulProblem(m, k, n, **fields), experts)
                name = f"{label}|{experts}x{k}x{n}|{m}"
                arguments = {"experts": experts, "chip": chip.name}
                ours = {"product": dataclasses.asdict(p.product), **arguments}
                jobs.append(Job(name, "benchmarks.tpu_experts:kernel", ours))
                xla = {"m": m, "k": k, "n": n, "experts": experts, "codes": p.product.codes}
                xla |= {"group": fields.get("group", 0), "act": p.product.x_scale}
                xla["implementation"] = "xla"
                jobs.append(Job(f"{name}|xla", "benchmarks.tpu_experts:product", xla))
                cases.append((name, label, p))
    got = measure(jobs, chip.name, profile=False)
    return [_record(chip, label, p, got[name], got[f"{name}|xla"]) for name, label, p in cases]


def _record(
    chip: Chip, label: str, problem: RaggedProblem, ours: Static, xla: Static
) -> dict[str, Any]:
    p, config = problem.product, choose_ragged_config(problem, chip)
    used = min(problem.experts, p.m)
    ends = [math.ceil(p.m * (e + 1) / used) for e in range(used)]
    visits = sum(
        (end - 1) // config.bm - start // config.bm + 1
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    )
    cycles = (ours.cycles or 0) * visits / chip.cores
    rest = p.m * (p.k * dtype_bytes(p.x_dtype) + p.n * dtype_bytes(p.out_dtype))
    bandwidth = chip.hbm_bandwidth * chip.cores
    memory = (p.weight_bytes * used + rest) / bandwidth
    moved = p.weight_bytes * problem.experts + 2 * xla.temporaries + rest
    return {
        "chip": chip.name,
        "experts": problem.experts,
        "k": p.k,
        "n": p.n,
        "rows": p.m,
        "format": label,
        "tile_rows": config.bm,
        "visits": visits,
        "microseconds": max(cycles / chip.clock, memory) * 1e6,
        "bound": "memory" if memory > cycles / chip.clock else "cycles",
        "xla_floor_microseconds": moved / bandwidth * 1e6,
        "xla_temporaries": xla.temporaries,
        "errors": [s.error for s in (ours, xla) if s.error],
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| chip | experts, K x N | rows | format | tile, visits | kernel | XLA, at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        shape = f"{r['experts']}, {r['k']}x{r['n']}"
        ours = "; ".join(r["errors"]) or f"{r['microseconds']:.1f} us ({r['bound']})"
        ratio = r["xla_floor_microseconds"] / r["microseconds"]
        xla = f"{r['xla_floor_microseconds']:.1f} us, {ratio:.1f}x"
        lines.append(
            f"| {r['chip']} | {shape} | {r['rows']} | {r['format']} |"
            f" {r['tile_rows']}, {r['visits']} | {ours} | {xla} |"
        )
    return "\n".join(lines) + "\n"


def report(
    name: str,
    title: str,
    note: str,
    figures: Callable[[Chip, list[Any], list[int]], list[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], str],
    *,
    chips: Sequence[str],
    shape: str,
    rows: Sequence[int],
) -> None:
    """A script's main: asks for chips, shapes and rows, measures, writes results/`name`, prints."""
    parser = argparse.ArgumentParser(description=note)
    parser.add_argument("--chips", nargs="+", default=chips, choices=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", default=[shape], help="experts x K x N")
    parser.add_argument("--rows", nargs="+", type=int, default=rows)
    arguments = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in arguments.shapes]
    records = [
        record
        for chip in arguments.chips
        for record in figures(CHIPS[chip], shapes, arguments.rows)
    ]
    about = {"note": note, "compiler": compiler(), "jax": jax.__version__}
    text = json.dumps({**about, "rows": records}, indent=1)
    stem = RESULTS / name
    stem.with_suffix(".json").write_text(text + "\n")
    stem.with_suffix(".md").write_text(f"# {title}\n\n{note}\n\n{table(records)}")
    print(table(records))


if __name__ == "__main__":
    report(
        "tpu-experts",
        "Experts",
        NOTE,
        figures,
        table,
        chips=("v5e", "v6e"),
        shape="8x4096x4096",
        rows=(16, 256, 2048),
    )
