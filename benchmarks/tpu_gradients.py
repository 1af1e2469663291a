"""Gradients of products with int4 weights on TPU by static figures: our kernel and XLA's lowering.

`python -m benchmarks.tpu_gradients` writes results/tpu-gradients.md: the gradient for the input of
a product with groups of 128; how long by the compiler's account (as in `benchmarks.tpu_static`; no
hardware is timed), and how many bytes of intermediate results XLA keeps in HBM: the weight in
bfloat16, where it is written out. Needs libtpu; see `benchmarks.tpu_aot`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_aot import Job, Static, measure
from benchmarks.tpu_programs import Program, time_of
from benchmarks.tpu_static import RESULTS
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.transposed import choose_transposed_config, transposed_matmul

_GROUP = 128
SIZES = ((16, 4096, 4096), (1024, 4096, 4096), (1024, 4096, 14336))


def xla_gradient(m: int, k: int, n: int) -> tuple[Any, Any, int]:
    """XLA's lowering of the gradient of x[m, k] times an int4 weight for x."""
    struct = jax.ShapeDtypeStruct
    weight = QTensor(
        struct((k, n), jnp.int4),
        struct((k // _GROUP, n), jnp.float32),
        qtype=get_qtype("int4"),
        dtype=jnp.dtype("bfloat16"),
    )

    def fn(y: jax.Array, w: QTensor) -> jax.Array:
        dims = (((1,), (1,)), ((), ()))
        return quantized_dot_general(y, w, dims, implementation="xla")

    return fn, (struct((m, n), jnp.bfloat16), weight), 0


def ours(problem: dict[str, Any], chip: str) -> tuple[Any, Any, int]:
    """`transposed_matmul` with the config that it gets on the chip."""
    p = MatmulProblem(**problem)
    c = choose_transposed_config(p, CHIPS[chip])
    struct = jax.ShapeDtypeStruct
    shapes = {
        "y": struct((p.m, p.n), jnp.bfloat16),
        "codes": struct((p.k, p.n), jnp.dtype(STORAGE[p.codes][0])),
        "scale": struct((p.groups, p.n), jnp.float32),
    }
    if p.zero_point:
        shapes["zero_point"] = shapes["scale"]

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return transposed_matmul(**arrays, problem=p, config=c)

    steps = math.ceil(p.m / c.bm) * (p.k // c.bk) * (p.n // c.bn)
    return fn, (shapes,), math.ceil(steps / CHIPS[chip].cores)


def _row(chip: Chip, m: int, k: int, n: int) -> str:
    problem = MatmulProblem(m, k, n, "int4", group=_GROUP)
    theirs = Job("xla", "benchmarks.tpu_gradients:xla_gradient", {"m": m, "k": k, "n": n})
    jobs = [theirs]
    try:
        choose_transposed_config(problem, chip)
        arguments = {"problem": dataclasses.asdict(problem), "chip": chip.name}
        jobs.append(Job("ours", "benchmarks.tpu_gradients:ours", arguments))
    except Unsupported:
        pass
    got = measure(jobs, chip.name)
    cells = [chip.name, f"{m} x {k} x {n}", _shown(chip, problem, got.get("ours"))]
    cells += [_shown(chip, problem, got["xla"]), f"{got['xla'].temporaries / 1e6:.0f} MB"]
    return f"| {' | '.join(cells)} |"


def _shown(chip: Chip, problem: MatmulProblem, static: Static | None) -> str:
    if static is None or static.error:
        return "none"
    item = Program("gradient", problem, None, Job("", "", {}), 1.0)
    time = time_of(chip, item, static)
    return f"{'>= ' * time.at_least}{time.microseconds:.1f} us"


def main() -> None:
    """Compiles, prints, and writes after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--chips", nargs="+", default=["v6e", "v7x", "v5p", "v4"], choices=list(CHIPS)
    )
    given = parser.parse_args()
    lines = ["| chip | m x k x n | kernel | XLA | XLA's HBM temporaries |", "|---|---|---|---|---|"]
    for m, k, n in SIZES:
        for chip in given.chips:
            lines.append(_row(CHIPS[chip], m, k, n))
            print(lines[-1], flush=True)
            text = "\n".join(["# Gradients for the input, int4 g128", "", *lines]) + "\n"
            (RESULTS / "tpu-gradients.md").write_text(text)


if __name__ == "__main__":
    main()
