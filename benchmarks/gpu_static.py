"""What ptxas makes of the GPU's matmul kernels, for the H200, without one: registers and memory.

`python -m benchmarks.gpu_static` compiles every format for few rows and many, with the config that
the rules choose, and writes benchmarks/results/gpu-static-h200.json and a table. Nothing here is a
measurement on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax

from benchmarks.gpu_aot import Job, measure
from benchmarks.gpu_formats import FORMATS
from jaxquant.pallas_kernels.gpu.chips import CHIPS
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.gpu.heuristics import choose_config
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem

RESULTS = Path(__file__).parent / "results"
ROWS = (16, 64, 2048)


def main() -> None:
    """Compiles, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--n", type=int, default=8192)
    arguments = parser.parse_args()
    chip, jobs = CHIPS["H200"], {}
    for name, (fields, _) in FORMATS.items():
        for m in ROWS:
            problem = MatmulProblem(m, arguments.k, arguments.n, **fields)
            config = choose_config(problem, chip)
            jobs[name, m] = problem, config
    got = measure([_job(f"{n}, {m}", *both) for (n, m), both in jobs.items()])
    records = []
    for (name, m), (problem, config) in jobs.items():
        done = got[f"{name}, {m}"]
        if done.error:
            raise RuntimeError(f"{name}, {m} rows: {done.error}")
        step = config.tile_n * config.bk * STORAGE[problem.codes][1] // 8
        records.append(
            {
                "format": name,
                "rows": m,
                "config": dataclasses.asdict(config),
                "weight_bytes_in_flight": step * min(config.stages, config.steps(problem)),
                "kernel": dataclasses.asdict(done.kernels[0]),
            }
        )
    environment = {"jax": jax.__version__, "target": "H200", "k": arguments.k, "n": arguments.n}
    text = json.dumps({"environment": environment, "records": records}, indent=1)
    (RESULTS / "gpu-static-h200.json").write_text(text + "\n")
    print("| format | rows | block | k split | KiB in flight | registers | KiB shared |")
    print("|---|---|---|---|---|---|---|")
    for r in records:
        c, kernel = GpuConfig(**r["config"]), r["kernel"]
        flight, shared = r["weight_bytes_in_flight"] // 1024, kernel["shared"] // 1024
        print(
            f"| {r['format']} | {r['rows']} | {c.bm} x {c.tile_n} x {c.bk} | {c.split_k} | {flight}"
            f" | {kernel['registers']} | {shared} |"
        )


def _job(name: str, problem: MatmulProblem, config: GpuConfig) -> Job:
    fields = {"problem": dataclasses.asdict(problem), "config": dataclasses.asdict(config)}
    return Job(name, "benchmarks.gpu_cases:ours", fields)


if __name__ == "__main__":
    main()
