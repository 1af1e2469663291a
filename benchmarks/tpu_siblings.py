"""Several weights with one x as one launch, by the compiler's schedules. No hardware is timed.

`python -m benchmarks.tpu_siblings` writes results/tpu-siblings.md. A launch of several weights has
a branch for each, of which a step takes one; the estimator of cycles counts all of them at every
step, so the length of a branch is compared instead with that of a weight's own kernel. What one
launch spares besides its own fixed cost: the first blocks of the other weights, which no work
before them hides. One launch for silu(gate) * up (`tpu.gated`) has an estimate; it is compared with
both products and the bytes of what follows them. Needs libtpu; see `benchmarks.tpu_aot`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_aot import Job, measure
from benchmarks.tpu_static import RESULTS
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.gated import choose_gated_config, gated_matmul
from jaxquant.pallas_kernels.tpu.heuristics import choose_config
from jaxquant.pallas_kernels.tpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.tpu.siblings import choose_sibling_config, sibling_matmuls

NOTE = (
    "Schedules of the TPU compiler (libtpu), no timing on hardware: instructions of a step of one"
    " weight's own kernel, and of one weight's branch in the launch of all; the launch's spills and"
    " VMEM; how long the first block of a weight takes to arrive, which its own launch waits for."
)
SETS = {"query, key, value": (4096, 1024, 1024), "gate, up": (14336, 14336)}
GATED = ((16, 14336), (1024, 4096))
GATED_NOTE = (
    "silu(gate) * up: the estimates of two products of their own, the bytes of what multiplies them"
    " afterwards (two results are read, one is written), and the estimate of one launch for all."
)
FORMATS: dict[str, dict[str, Any]] = {
    "w4a16 g128": {"codes": "int4", "group": 128},
    "w4a8 g128": {"codes": "int4", "group": 128, "x_dtype": "int8", "x_scale": True},
}


def siblings(product: dict[str, Any], columns: Sequence[int], chip: str) -> tuple[Any, Any, int]:
    """The products of one x with weights of so many columns; of one weight in its own kernel."""
    p = MatmulProblem(**product)
    problems = tuple(dataclasses.replace(p, n=n) for n in columns)
    struct = jax.ShapeDtypeStruct
    x = struct((p.m, p.k), jnp.dtype(p.x_dtype))
    codes = [struct((q.code_rows, q.n), jnp.dtype(STORAGE[q.codes][0])) for q in problems]
    scales = [struct((q.groups, q.n), jnp.float32) for q in problems]
    x_scale = struct((p.m, 1), jnp.float32) if p.x_scale else None

    def fn(x: Any, codes: Any, scales: Any, x_scale: Any) -> Any:
        if len(problems) == 1:
            config = choose_config(p := problems[0], CHIPS[chip])
            return quantized_matmul(
                x, codes[0], scales[0], problem=p, config=config, x_scale=x_scale
            )
        config = choose_sibling_config(problems, CHIPS[chip])
        zeros = [None] * len(codes)
        return sibling_matmuls(
            x,
            codes,
            scales,
            zeros,
            problems=problems,
            config=config,
            cores=CHIPS[chip].cores,
            x_scale=x_scale,
        )

    return fn, (x, codes, scales, x_scale), 0


def gated(product: dict[str, Any], chip: str) -> tuple[Any, Any, int]:
    """silu(x @ gate) * (x @ up) in one launch."""
    p = MatmulProblem(**product)
    config = choose_gated_config(p, CHIPS[chip])
    struct = jax.ShapeDtypeStruct
    x = struct((p.m, p.k), jnp.dtype(p.x_dtype))
    codes = struct((p.code_rows, p.n), jnp.dtype(STORAGE[p.codes][0]))
    weight = (codes, struct((p.groups, p.n), jnp.float32))
    x_scale = struct((p.m, 1), jnp.float32) if p.x_scale else None

    def fn(x: Any, gate: Any, up: Any, x_scale: Any) -> Any:
        both = (*gate, None), (*up, None)
        return gated_matmul(x, *both, problem=p, config=config, x_scale=x_scale)

    return fn, (x, weight, weight, x_scale), 0


def _gated_lines(chip: Chip) -> Iterator[str]:
    """Of few and of many rows: both products, what multiplies them, and the one launch."""
    bandwidth = chip.hbm_bandwidth * chip.cores / 1e6
    for (m, n), (label, fields) in itertools.product(GATED, FORMATS.items()):
        p = MatmulProblem(m, 4096, n, **fields)
        product = {"product": dataclasses.asdict(p), "chip": chip.name}
        one = {**product, "columns": [n]}
        jobs = [
            Job("one", "benchmarks.tpu_siblings:siblings", one),
            Job("gated", "benchmarks.tpu_siblings:gated", product),
        ]
        got = measure(jobs, chip.name)
        cells = [f"{chip.name}, {m} x 4096 x {n}, {label}"]
        moved = {"one": p.least_bytes, "gated": p.least_bytes + p.weight_bytes}
        for name, count in (("one", 2), ("gated", 1)):
            static = got[name]
            if static.cycles is None:
                cells.append(static.error or "no estimate")
                continue
            time = max(static.cycles / chip.clock * 1e6, moved[name] / bandwidth)
            cells.append(f"{count * time:.1f} us")
        cells.insert(2, f"{3 * 2 * m * n / bandwidth:.1f} us")
        cells.append(str(got["gated"].spills))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Compiles, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e", "v7x"], choices=list(CHIPS))
    parser.add_argument("--rows", nargs="+", type=int, default=[16])
    arguments = parser.parse_args()
    lines = [
        "| chip, weights, rows, format | alone | a branch | spills | VMEM | first block |",
        "|---|---|---|---|---|---|",
    ]
    for chip in arguments.chips:
        jobs, firsts = {}, {}
        for (title, columns), m in itertools.product(SETS.items(), arguments.rows):
            for label, fields in FORMATS.items():
                p = MatmulProblem(m, 4096, min(columns), **fields)
                given = {"product": dataclasses.asdict(p), "chip": chip}
                name = f"{chip}, {title}, {m}, {label}"
                for which in ([p.n], list(columns)):
                    jobs[name, len(which)] = Job(
                        f"{name} {len(which)}",
                        "benchmarks.tpu_siblings:siblings",
                        {**given, "columns": which},
                    )
                config = choose_config(p, CHIPS[chip])
                first = config.bk * config.bn * STORAGE[p.codes][1] // 8
                firsts[name] = first / CHIPS[chip].hbm_bandwidth * 1e6
        got = measure(list(jobs.values()), chip, profile=False)
        for (name, count), job in jobs.items():
            if count > 1:
                alone, one = got[jobs[name, 1].name], got[job.name]
                lines.append(
                    f"| {name} | {alone.error or alone.bundles} bundles |"
                    f" {one.error or one.bundles // count} bundles | {one.spills} |"
                    f" {one.vmem / 2**20:.0f} MiB | {firsts[name]:.1f} us |"
                )
    lines += ["", GATED_NOTE, "", "| chip, product, format | both | silu, times | gated | spills |"]
    lines.append("|---|---|---|---|---|")
    for chip in arguments.chips:
        lines += _gated_lines(CHIPS[chip])
    text = "\n".join(lines) + "\n"
    (RESULTS / "tpu-siblings.md").write_text(f"# Siblings\n\n{NOTE}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
