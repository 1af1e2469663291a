"""x as the body of the matmul kernel multiplies it: laid out, cut into parts, and summed.

Called by `tpu.body` once for a block of rows, before its first product. What is made here stays in
the kernel's scratch, which `scratch_shapes` asks for, as long as the rows do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu import e4m3, reading, split
from jaxquant.pallas_kernels.tpu.chunks import Chunks
from jaxquant.pallas_kernels.tpu.config import MatmulConfig, converts_once
from jaxquant.pallas_kernels.tpu.reading import LANES, SHUFFLED

Refs = dict[str, Any]

# Chunks of x are laid out in batches of so many results: one push of the permutation serves them
# all, and 32 of the 64 registers hold them.
_LAID_OUT_TOGETHER = 32 * 1024
_TILE_BYTES = 32  # of a register's rows, 128 lanes each


def corrections_of(problem: MatmulProblem, config: MatmulConfig) -> tuple[str, ...]:
    """Which sums over x's rows correct the product: "sums" times zero points, and "offsets"."""
    if config.scale == "before":
        return ()
    offsets = ("offsets",) if config.reading == "bits" else ()
    return (*offsets, "sums") if problem.zero_point else offsets


def scratch_shapes(problem: MatmulProblem, config: MatmulConfig) -> dict[str, Any]:
    """The VMEM that a kernel keeps for itself, by the names that `matmul_body` knows."""
    c, cut = config, Chunks.make(problem, config)
    shapes: dict[str, Any] = {}
    if c.bk != problem.k:
        whole = c.operand.startswith("int") and c.scale == "end" and cut.parts == 1
        shapes["acc"] = pltpu.VMEM((c.bm, c.bn), jnp.int32 if whole else jnp.float32)
    if c.reading in SHUFFLED or cut.copies > 1 or converts_once(problem, c):
        columns = _columns_laid_out(c, cut)
        rows = cut.count * _rows_laid_out(c, cut)
        shapes["laid_out"] = pltpu.VMEM((rows, columns), jnp.dtype(c.operand))
    sums = c.bm if c.scale == "end" else cut.count * cut.stack * c.bm
    for name in corrections_of(problem, c):
        shapes[name] = pltpu.VMEM((sums, LANES), jnp.float32)
    if split.needs_factor(problem, c):
        shapes["factor"] = pltpu.VMEM((c.bm, LANES), jnp.float32)
    if problem.codes == "int3":
        shapes["words"] = pltpu.VMEM((c.bn // LANES * (3 * c.bk // 32), LANES), jnp.uint32)
    return shapes


def _columns_laid_out(config: MatmulConfig, cut: Chunks) -> int:
    """Of x's chunks: "e4m3" has two operands below each other."""
    return cut.size * (2 if config.reading == "e4m3" else 1)


def _rows_laid_out(config: MatmulConfig, cut: Chunks) -> int:
    """From one chunk to the next: each begins where registers of the operand do."""
    tile = _TILE_BYTES // jnp.dtype(config.operand).itemsize
    return -(-cut.copies * config.bm // tile) * tile


def prepare(
    refs: Refs, problem: MatmulProblem, config: MatmulConfig, cut: Chunks, step: Any
) -> None:
    """Fills the scratch `laid_out` and sums: rows of chunk c, group g begin at (c stack + g) bm.

    Where x is cut into parts, those of a chunk follow each other in `laid_out`, each with all
    groups, and `factor` gets what they must be multiplied by to be x again.

    Permuting columns and summing rows are one product on the matrix units, with a permutation
    beside columns of what is summed; the matrix units are idle while codes are being unpacked.
    """
    shuffled, bm, size = config.reading in SHUFFLED, config.bm, cut.size
    sides = [reading.permutation(problem.codes, config.reading, size)] if shuffled else []
    if config.reading == "e4m3":
        sides = [e4m3.both_orders(size)]
    laid_out = _columns_laid_out(config, cut)
    corrections = corrections_of(problem, config)
    for name in corrections:
        summed = jnp.ones((size, LANES), jnp.float32)
        if name == "offsets":
            summed = reading.offsets(problem.codes, size, LANES, stored=True)
        sides += [_rows_of_group(summed, cut, g) for g in range(cut.stack)]
    whole = "bfloat16" if cut.parts > 1 else config.operand
    side = jnp.concatenate(sides, axis=1).astype(whole) if sides else None
    width = size if side is None else side.shape[1]
    batch = max(1, _LAID_OUT_TOGETHER // width // bm)
    up = counted = None
    if "factor" in refs:
        refs["factor"][...], up = split.factors(refs["x"][...], config.operand)
        counted = up if split.unit(config.operand) == 1 else up / split.unit(config.operand)
    totals: dict[str, jax.Array] = {}
    for first in range(0, cut.count, batch):
        chunks = range(first, min(first + batch, cut.count))
        parts = [refs["x"][:, c * size : (c + 1) * size].astype(whole) for c in chunks]
        x = y = jnp.concatenate(parts, axis=0)
        if side is not None:
            y = dot(x, side).astype(jnp.float32)
        if shuffled:
            x, y = y[:, :laid_out].astype(whole), y[:, laid_out:]
        for i, c in enumerate(chunks):
            own = slice(i * bm, (i + 1) * bm)
            if cut.parts > 1:
                copies = [_group_only(x[own], g, problem, config, cut) for g in range(cut.stack)]
                rows = pl.ds(c * _rows_laid_out(config, cut), cut.copies * bm)
                refs["laid_out"][rows, :] = split.separated(copies, up, config.operand)
            for g in range(cut.stack):
                if "laid_out" in refs and cut.parts == 1:
                    rows = pl.ds(c * _rows_laid_out(config, cut) + g * bm, bm)
                    refs["laid_out"][rows, :] = _group_only(x[own], g, problem, config, cut)
                rows = pl.ds((c * cut.stack + g) * bm, bm)
                for at, name in enumerate(corrections):
                    first_lane = (at * cut.stack + g) * LANES
                    sums = y[own, first_lane : first_lane + LANES]
                    if config.scale == "after":
                        refs[name][rows, :] = sums if counted is None else sums * counted
                    else:  # added up, and subtracted from totals that are as x is again
                        totals[name] = totals[name] + sums if name in totals else sums
    for name, total in totals.items():
        add(refs[name], total, step)


def _rows_of_group(summed: jax.Array, cut: Chunks, group: int) -> jax.Array:
    """What is summed, [size, 128], with zeros outside the stored rows of one of the groups."""
    if cut.stack == 1:
        return summed
    row = lax.broadcasted_iota(jnp.int32, summed.shape, 0)
    return jnp.where(row // (cut.size // cut.stack) == group, summed, 0.0)


def _group_only(
    x: jax.Array, group: int, problem: MatmulProblem, config: MatmulConfig, cut: Chunks
) -> jax.Array:
    """X with zeros outside one of the chunk's groups."""
    if cut.stack == 1:
        return x
    row = lax.broadcasted_iota(jnp.int32, (1, cut.size), 1)
    if config.reading in SHUFFLED:
        row = reading.source_row(problem.codes, config.reading, row)
    mask = (row // problem.group == group).astype(jnp.float32)
    return (x.astype(jnp.float32) * mask).astype(x.dtype)


def add(ref: Any, value: jax.Array, step: Any) -> None:
    """Adds to a reference over the steps of the last axis of the grid: at the first, to zeros."""

    @pl.when(step == 0)
    def _() -> None:
        ref[...] = jnp.zeros_like(ref)

    ref[...] += value  # one use of the sums: the compiler adds while it multiplies


def x_chunk(refs: Refs, config: MatmulConfig, cut: Chunks, chunk: int) -> jax.Array:
    """X of one chunk, laid out: [parts * stack * bm, size]."""
    if "laid_out" in refs:
        first = chunk * _rows_laid_out(config, cut)
        return refs["laid_out"][first : first + cut.copies * config.bm, :]
    return refs["x"][:, chunk * cut.size : (chunk + 1) * cut.size].astype(config.operand)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[m, k] x [k, n] with int32 sums of integers, else float32."""
    sums = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=sums)
