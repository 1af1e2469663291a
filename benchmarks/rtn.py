"""Speed of quantizing one stacked weight by rounding to nearest.

    python -m benchmarks.rtn [layers] [rows] [columns]

Throughput is float32 input bytes by wall time and by CPU time (best of 3), which a busy machine
disturbs less. tests/algorithms/test_rtn.py bounds the temporaries.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxquant.algorithms.rtn import quantize_weight
from jaxquant.core.schemes import WeightScheme

SCHEMES = (
    WeightScheme("int8"),
    WeightScheme("int4", group_size=128),
    WeightScheme("int4", group_size=128, symmetric=False),
    WeightScheme("int4", group_size=128, range="percentile"),
    WeightScheme("int4", group_size=128, range="mse"),
    WeightScheme("int3", group_size=64),
    WeightScheme("int2", group_size=64),
    WeightScheme("int1", group_size=64),
    WeightScheme("float8_e4m3"),
    WeightScheme("nf4"),
    WeightScheme("nf4", double_quant=True),
    WeightScheme("mxfp4"),
    WeightScheme("nvfp4"),
)


def measure(w: jax.Array, scheme: WeightScheme) -> tuple[float, float, float, float]:
    """MB/s by wall time, MB/s by CPU time, seconds of the first call, bits a weight."""
    blocks = (1, scheme.group_size or w.shape[1], 1)
    times = []
    for _ in range(4):
        wall, cpu = time.perf_counter(), time.process_time()
        q = jax.block_until_ready(quantize_weight(w, scheme, blocks, stack_axes=(0,)))
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    megabytes = w.nbytes / 1e6
    best_wall, best_cpu = (min(column) for column in zip(*times[1:], strict=True))
    return megabytes / best_wall, megabytes / best_cpu, times[0][0], 8 * q.nbytes / q.size


def main() -> None:
    shape = tuple(map(int, sys.argv[1:])) or (4, 2048, 1024)
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    table = Table(title=f"rtn of float32 {list(shape)}, jax {jax.__version__}")
    for column in ("scheme", "MB/s wall", "MB/s per CPU second", "first call s", "bits a weight"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for scheme in SCHEMES:
        wall, cpu, first, bits = measure(w, scheme)
        table.add_row(str(scheme), f"{wall:.0f}", f"{cpu:.0f}", f"{first:.2f}", f"{bits:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
