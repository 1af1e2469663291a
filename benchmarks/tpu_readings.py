"""Static cycles of what the TPU kernels do not do yet, to judge whether they should.

`python -m benchmarks.tpu_readings` writes results/tpu-readings.md: ways to read E2M1 (mxfp4) codes
at few rows, beside int4's and a bfloat16 product; and dynamic quantization of few rows in front,
by XLA and by the kernel. Groups' scales are left out on both sides. Needs libtpu; see
`benchmarks.tpu_aot`. No hardware is timed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_aot import Job, measure
from benchmarks.tpu_static import RESULTS

_COLUMNS = 1024
_ROWS, _SIZE = 16, 4096
READINGS = ("int4", "e2m1: float4_e2m1fn", "e2m1: bfloat16 arithmetic", "e2m1: float32 arithmetic")


def read(codes: jax.Array, how: str) -> jax.Array:
    """int4 codes as a bfloat16 operand; E2M1 is 0, 1, 2, 3, 4, 6, 8, 12 halves and a sign bit."""
    if how == "int4":
        return codes.astype(jnp.bfloat16)
    if how == "e2m1: float4_e2m1fn":
        return pltpu.bitcast(codes, jnp.float4_e2m1fn).astype(jnp.bfloat16)
    code = codes.astype(jnp.bfloat16 if "bfloat16" in how else jnp.float32)
    negative = code < 0
    u = jnp.where(negative, code + 8, code)
    halves = jnp.maximum(u, jnp.maximum(2 * u - 4, 4 * u - 16))
    return jnp.where(negative, -halves, halves).astype(jnp.bfloat16)


def product(how: str) -> tuple[Any, Any, int]:
    """x[16, 4096] times 4096 x 4096 codes, read so."""

    def body(x_ref: Any, codes_ref: Any, out_ref: Any) -> None:
        w = read(codes_ref[...], how)
        out_ref[...] = jnp.dot(x_ref[...], w, preferred_element_type=jnp.float32)

    def fn(x: jax.Array, codes: jax.Array) -> jax.Array:
        return pl.pallas_call(
            body,
            grid=(_SIZE // _COLUMNS,),
            in_specs=[
                pl.BlockSpec((_ROWS, _SIZE), lambda j: (0, 0)),
                pl.BlockSpec((_SIZE, _COLUMNS), lambda j: (0, j)),
            ],
            out_specs=pl.BlockSpec((_ROWS, _COLUMNS), lambda j: (0, j)),
            out_shape=jax.ShapeDtypeStruct((_ROWS, _SIZE), jnp.float32),
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=60 * 2**20),
        )(x, codes)

    struct = jax.ShapeDtypeStruct
    avals = struct((_ROWS, _SIZE), jnp.bfloat16), struct((_SIZE, _SIZE), jnp.int4)
    return fn, avals, _SIZE // _COLUMNS


def main() -> None:
    """Compiles, writes, prints."""
    jobs = [Job(how, "benchmarks.tpu_readings:product", {"how": how}) for how in READINGS]
    sizes = {"m": _ROWS, "k": _SIZE, "n": _SIZE}
    jobs.append(Job("bfloat16 weights", "benchmarks.tpu_cases:bfloat16", sizes))
    for name, kernel in (("x to int8: XLA", False), ("x to int8: kernel", True)):
        arguments = {"m": _ROWS, "k": _SIZE, "dtype": "int8", "kernel": kernel}
        jobs.append(Job(name, "benchmarks.tpu_cases:quantize_in_front", arguments))
    lines = ["| chip | what | estimated cycles | instructions of a step |", "|---|---|---|---|"]
    for chip in ("v5e", "v6e", "v7x"):
        got = measure(jobs, chip)
        for job in jobs:
            static = got[job.name]
            told = f"{static.cycles} | {static.bundles}"
            lines.append(
                f"| {chip} | {job.name} | {'does not compile |' if static.error else told} |"
            )
    text = "\n".join(lines) + "\n"
    (RESULTS / "tpu-readings.md").write_text(f"# 16 x 4096 x 4096\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
