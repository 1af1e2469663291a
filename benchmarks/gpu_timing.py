"""How GPU programs are timed: by the durations of their kernels, with inputs that no cache holds.

Called by `benchmarks.gpu` and `benchmarks.gpu_tune`. A product of a few rows takes less time than
its launch, so a clock around calls would time launches. CUPTI, through JAX's own profiler for
Mosaic GPU, reports how long each kernel of a compiled program ran on the device: `device` is their
sum, without launches and without gaps between kernels; `wall` is the clock around the same program,
with both. One program makes many calls, each on other arrays, one after the other: together they
are several times the L2 cache, so that every call reads its weight from memory.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

# Weights of one program together, in bytes: four times the L2 of an H200 as CUDA reports it.
ROTATION_BYTES = 240 * 10**6
_MOST_CALLS = 64
_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call, medians over repetitions.

    Attributes:
      device: kernels only.
      wall: with launches and gaps.
      kernels: how many a call launches.
    """

    device: float
    wall: float
    kernels: float


Timer = Callable[[Any, Sequence[Any], int], Timing | None]


def rotation(weight_bytes: int) -> int:
    """How many sets of arrays one program calls a function on."""
    return max(2, min(_MOST_CALLS, -(-ROTATION_BYTES // max(weight_bytes, 1))))


def program(fn: Callable[..., jax.Array]) -> Callable[[Sequence[Any]], list[jax.Array]]:
    """Calls `fn` on each set of arguments in turn: no call starts before the last one is done.

    All results are returned, or XLA would not compute them.
    """
    once = jax.jit(fn)  # one body in the program, however often it is called

    def run(sets: Sequence[Any]) -> list[jax.Array]:
        outs = [once(*sets[0])]
        for arguments in sets[1:]:
            arguments, outs[-1] = lax.optimization_barrier((arguments, outs[-1]))
            outs.append(once(*arguments))
        return outs

    return run


def measure(compiled: Any, arguments: Sequence[Any], calls: int) -> Timing | None:
    """Times a compiled program on the GPU at hand.

    Args:
      compiled: of `program`, or any other.
      arguments: its arguments.
      calls: how many calls it makes.
    """
    from jax.experimental.mosaic.gpu import profiler

    timed = profiler.measure(compiled, aggregate=False, iterations=_REPEATS)
    _, runs = timed(*arguments)
    if runs is None:
        raise RuntimeError("CUPTI reported no kernel: is another profiler attached?")
    walls = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        walls.append(time.perf_counter() - start)
    device = statistics.median(sum(ms for _, ms in run) for run in runs)
    return Timing(
        1e3 * device / calls, 1e6 * statistics.median(walls) / calls, len(runs[0]) / calls
    )


def run_once(compiled: Any, arguments: Sequence[Any], calls: int) -> Timing | None:
    """Stands in for `measure` where nothing is to be timed: runs the program, reports nothing."""
    jax.block_until_ready(compiled(*arguments))
    return None


def require_gpu(dry_run: bool, script: str) -> Timer:
    """The timer for the machine.

    Raises:
      SystemExit: there is no CUDA GPU, and this is no dry run.
    """
    if dry_run:
        return run_once
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        raise SystemExit(
            f"benchmarks.{script} times kernels on an NVIDIA GPU; this machine has"
            f" {device.device_kind}. --dry-run checks the script itself, and times nothing"
        )
    return measure
