"""Static figures of products with batch axes (an einsum over experts), beside XLA's own.

`python -m benchmarks.tpu_batched [--chips v5e v6e]` writes results/tpu-batched.{json,md}. No
hardware is timed. The kernel: the compiler's estimate (without one, bundles times steps, and what
quantizes x in front is not in it), or its bytes over the bandwidth where those take longer. XLA:
operation by operation, the larger of bundles times steps and HBM bytes over bandwidth (the
estimator aborts on its grouped int4): a lower bound. Needs libtpu; see `benchmarks.tpu_aot`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_aot import Job, Static, measure
from benchmarks.tpu_experts import report
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.heuristics import choose_config

NOTE = (
    "Estimates of the TPU compiler (libtpu), no timing on hardware. Kernel: max(estimate, bytes /"
    " bandwidth); *: bundles x steps for the estimate. XLA: its operations in turn,"
    " each max(bundles x steps, bytes / bandwidth)."
)
_EINSUM = (((2,), (1,)), ((0,), (0,)))


def product(
    m: int, k: int, n: int, experts: int, act: bool, chip: str, implementation: str
) -> tuple[Any, Any, int]:
    """`ebk,ekn->ebn` with int4 weights in groups of 128: by the kernel, or by XLA."""
    struct = jax.ShapeDtypeStruct
    w = QTensor(
        struct((experts, k, n), jnp.int4),
        struct((experts, k // 128, n), jnp.float32),
        qtype=get_qtype("int4"),
        dtype=jnp.dtype("bfloat16"),
        act=ActScheme() if act else None,
    )

    def fn(x: jax.Array, w: QTensor) -> jax.Array:
        return quantized_dot_general(x, w, _EINSUM, implementation=implementation or None)

    x_dtype = "int8" if act else "bfloat16"
    config = choose_config(MatmulProblem(m, k, n, "int4", x_dtype, 128, x_scale=act), CHIPS[chip])
    blocks = math.ceil(m / config.bm) * math.ceil(n / config.bn) * (k // config.bk)
    return fn, (struct((experts, m, k), jnp.bfloat16), w), experts * blocks


def figures(chip: Chip, shapes: list[tuple[int, int, int]], rows: list[int]) -> list[Any]:
    """A record for each shape (experts, k, n), number of rows and kind of input."""
    jobs, cases = [], []
    for experts, k, n in shapes:
        for m in rows:
            for act in (False, True):
                label = f"{experts}x{k}x{n}|{m}|{'w4a8' if act else 'w4a16'}"
                size = {"m": m, "k": k, "n": n, "experts": experts, "act": act}
                for how in ("pallas", "xla"):
                    arguments = {**size, "chip": chip.name, "implementation": how}
                    maker = "benchmarks.tpu_batched:product"
                    jobs.append(Job(f"{label}|{how}", maker, arguments, profile=how == "pallas"))
                cases.append((label, size))
    got = measure(jobs, chip.name)
    return [_record(chip, s, got[f"{n}|pallas"], got[f"{n}|xla"]) for n, s in cases]


def _record(chip: Chip, size: dict[str, Any], ours: Static, xla: Static) -> dict[str, Any]:
    bandwidth = chip.hbm_bandwidth * chip.cores
    weights = size["k"] * size["n"] * (0.5 + 4 / 128)
    rest = size["m"] * (size["k"] + size["n"]) * 2
    memory = size["experts"] * (weights + rest) / bandwidth
    clock = chip.clock * chip.cores
    in_turn = [
        max(step["bundles"] * step["steps"] / clock, step["bytes"] / bandwidth)
        for step in xla.sequence
    ]
    return {
        "chip": chip.name,
        "format": "w4a8 g128" if size["act"] else "w4a16 g128",
        **{name: size[name] for name in ("m", "k", "n", "experts")},
        "microseconds": max((ours.cycles or math.nan) / clock, memory) * 1e6,
        "memory_microseconds": memory * 1e6,
        "kernels": ours.kernels,
        "source": ours.source,
        "xla_at_least_microseconds": sum(in_turn) * 1e6,
        "errors": [s.error for s in (ours, xla) if s.error],
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| chip | experts, K x N | rows each | format | kernel | its bytes | XLA, at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        ratio = r["xla_at_least_microseconds"] / r["microseconds"]
        ours = "; ".join(r["errors"]) or f"{r['microseconds']:.1f} us"
        ours += "" if r["source"] == "estimate" else "*"
        lines.append(
            f"| {r['chip']} | {r['experts']}, {r['k']}x{r['n']} | {r['m']} | {r['format']} | {ours}"
            f" | {r['memory_microseconds']:.1f} us"
            f" | {r['xla_at_least_microseconds']:.1f} us, {ratio:.1f}x |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    report(
        "tpu-batched",
        "Products with batch axes",
        NOTE,
        figures,
        table,
        chips=("v5e", "v6e", "v7x"),
        shape="8x2048x2048",
        rows=(16, 256),
    )
