"""Quantized matmuls of several formats and shapes against float32, in CPU time.

    python -m benchmarks.primitives

CPU time of the process (not time on the clock) makes the ratios stable on a machine with other
load. Candidates run in random order, so that none always follows the one that empties the caches.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import harness, peer_qwix
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme

SHAPES = [(1, 2048, 2048), (16, 2048, 2048), (256, 2048, 2048), (2048, 384, 1024)]
INT8, FP8 = ActScheme(), ActScheme("float8_e4m3")
# name: qtype, group size (None: per channel), activations
FORMATS: dict[str, tuple[str, int | None, ActScheme | None]] = {
    "w8a8": ("int8", None, INT8),
    "w4a8": ("int4", None, INT8),
    "w4a8_g128": ("int4", 128, INT8),
    "fp8": ("float8_e4m3", None, FP8),
    "w8a16": ("int8", None, None),
    "w4a16_g128": ("int4", 128, None),
}


def candidates(rows: int, inner: int, outer: int) -> dict[str, Callable[[], Any]]:
    """Compiled calls by name."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (rows, inner)), jax.random.normal(keys[1], (inner, outer))
    dims = (((1,), (0,)), ((), ()))
    multiply = jax.jit(lambda x, w: quantized_dot_general(x, w, dims))
    floats = jax.jit(lambda x, w: x @ w)
    calls = {"float32": lambda: floats(x, w)}
    for name, (qtype, group, act) in FORMATS.items():
        quantized = quantize_array(w, qtype, (group or inner, 1)).replace(act=act)
        calls[name] = lambda q=quantized: multiply(x, q)
    theirs, their_w = peer_qwix.matmul_w8a8(w)
    theirs = jax.jit(theirs)
    calls["Qwix w8a8"] = lambda: theirs(their_w, x)
    return calls


def race(
    calls: dict[str, Callable[[], Any]], rounds: int = 25, repeats: int = 4
) -> dict[str, float]:
    """How many times as fast as float32 each call is: median of the rounds' ratios."""
    for call in calls.values():
        for _ in range(2):
            jax.block_until_ready(call())
    rng, order = random.Random(0), list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            start = time.process_time()
            for _ in range(repeats):
                jax.block_until_ready(calls[name]())
            seconds[name].append(time.process_time() - start)
    return {
        name: statistics.median(f / s for f, s in zip(seconds["float32"], took, strict=True))
        for name, took in seconds.items()
    }


def main() -> None:
    """Prints a table: formats down, shapes across."""
    columns = {shape: race(candidates(*shape)) for shape in SHAPES}
    rows = [
        {"format": name} | {" x ".join(map(str, s)): f"{r[name]:.2f}" for s, r in columns.items()}
        for name in next(iter(columns.values()))
    ]
    print("\n".join(harness.table(rows)))


if __name__ == "__main__":
    main()
