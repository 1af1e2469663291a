"""The body of the matmul kernel: what the warpgroups of a thread block do.

Called by `gpu.matmul`. One warpgroup loads blocks of x, codes and scales, several stages ahead; the
others each multiply some columns of the weight, as the tensor cores' left operand, with all rows
of the block of x. So a tile comes out transposed, [columns, rows], and is turned when it is stored.
`gpu.reading` makes operands of codes, `gpu.epilogue` finishes the sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.pallas_kernels.gpu import epilogue, reading, reading_table
from jaxquant.pallas_kernels.gpu.config import (
    AXIS,
    CLUSTER,
    GpuConfig,
    is_outside,
    needs_sums,
    out_dtype,
)
from jaxquant.pallas_kernels.gpu.layouts import scales_by_lane
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, dtype_bytes

Refs = dict[str, Any]

# Registers of the loading warpgroup; the others share what it leaves.
_MEMORY_REGISTERS = 80
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(1)
_BY_ROW = plgpu.Layout.WGMMA.reduce(0)


def streamed(problem: MatmulProblem, config: GpuConfig) -> tuple[str, ...]:
    """Arrays whose blocks the loading warpgroup brings, step by step."""
    names = ["x", "codes"]
    if config.scale != "end":
        names.append("scale")
    sums = needs_sums(problem, config)
    if problem.zero_point and not (sums and config.scale == "end"):
        names.append("zero_point")
    if sums and config.scale != "end":
        names.append("x_sums")
    return tuple(names)


def sums_width(config: GpuConfig) -> int:
    """Sums of x that a block of rows has: the copy engine takes no less than 128 bytes."""
    return max(config.bm, 32)


def scratch_types(problem: MatmulProblem, config: GpuConfig) -> Refs:
    """Shared memory and barriers that a kernel keeps for itself, by name."""
    c = config
    out = jnp.dtype(out_dtype(problem, c))
    tile = plgpu.SMEM((c.warpgroups, c.bm, c.bn), out, transforms=tiling(c.bn, out))
    types: Refs = {"out_tile": tile}
    if not is_outside(problem, c):
        for name in epilogue.TILES:
            if getattr(problem, name):
                types[f"{name}_tile"] = tile
                types[f"{name}_barrier"] = plgpu.Barrier(num_barriers=c.warpgroups)
    if problem.codes == "table4":
        shape = (reading_table.ENTRIES, reading_table.BANKS)
        types["table_pairs"] = plgpu.SMEM(shape, jnp.int32)
        types["table_barrier"] = plgpu.Barrier(num_arrivals=1)
    if c.staged:
        operand = jnp.dtype(c.operand)
        transforms = tiling(math.gcd(c.chunk(problem), problem.k), operand)
        types["staging"] = plgpu.SMEM((c.warpgroups, c.bn, c.bk), operand, transforms=transforms)
    return types


def matmul_body(refs: Refs, problem: MatmulProblem, config: GpuConfig, interpret: bool) -> None:
    """All tiles of a thread block.

    Args:
      refs: references by name: arrays in device memory (x [m, k], codes [n, elements], the others
        as `gpu.matmul` prepares them, out [split_k, m, n]) and what `scratch_types` says.
      problem: the whole product.
      config: blocks and order.
      interpret: the body is interpreted, not compiled.
    """
    rows = pl.cdiv(problem.m, config.bm)
    columns = pl.cdiv(problem.n, config.tile_n * config.cluster)
    names = streamed(problem, config)
    sources = [refs[name] for name in names]

    def nothing(*_: Any) -> None:
        """Stands where only the pipeline's allocations are asked for."""

    some = pipeline(problem, config, (0, 0, 0), nothing, nothing)

    @functools.partial(
        pl.run_scoped, allocations=some.get_allocations(*sources), collective_axes=AXIS
    )
    def _(allocations: Any) -> None:
        if "table" in refs:
            bring_table(refs)

        def tile(row: Any, column: Any, part: Any) -> None:
            if config.cluster > 1:
                column = column * config.cluster + lax.axis_index(CLUSTER)
            place = row, column, part
            step = functools.partial(multiply_step, refs, problem, config, interpret)
            around = functools.partial(around_tile, refs, problem, config, place)
            run = pipeline(problem, config, place, step, around)
            run(*sources, allocations=allocations)

        if not config.blocks:
            tile(lax.axis_index("row"), lax.axis_index("column"), lax.axis_index("part"))
            return

        @plgpu.nd_loop((columns * rows * config.split_k,), collective_axes="block")
        def _(loop: Any) -> None:
            (index,) = loop.index
            part, index = lax.div(index, columns * rows), lax.rem(index, columns * rows)
            tile(lax.rem(index, rows), lax.div(index, rows), part)

    plgpu.wait_smem_to_gmem(0)


def bring_table(refs: Refs) -> None:
    """Copies the table's pairs to shared memory, once a block."""

    @pl.when(lax.axis_index(AXIS) == 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(refs["table"], refs["table_pairs"], refs["table_barrier"])

    plgpu.barrier_wait(refs["table_barrier"])


def pipeline(
    problem: MatmulProblem,
    config: GpuConfig,
    place: tuple[Any, Any, Any],
    step: Callable[..., Any],
    around: Callable[..., Any],
) -> Any:
    """The loop over contracted blocks of one tile; `place` is (block of x's rows, tile, part)."""
    row, column, part = place
    c = config
    count = c.steps(problem)
    first = part * count
    groups = max(1, c.bk // problem.group)
    operand = jnp.dtype(c.operand)

    def group_of(k: Any) -> Any:
        return first + k if c.bk >= problem.group else lax.div((first + k) * c.bk, problem.group)

    cut = c.chunk(problem) if c.reading == "direct" else c.bk
    words = functools.partial(reading.elements, codes=problem.codes, config=c)
    cut = math.gcd(cut, problem.k)
    element_bits = STORAGE[problem.codes][1] * cut // words(cut)
    # Rows of three words a lane lie without conflicts of banks as they are.
    as_they_are = problem.codes == "int3"
    specs = {
        "x": plgpu.BlockSpec(
            (c.bm, c.bk),
            lambda k: (row, first + k),
            transforms=tiling(math.gcd(c.chunk(problem), problem.k), operand),
            collective_axes=(CLUSTER,) if c.cluster > 1 else None,
        ),
        "codes": plgpu.BlockSpec(
            (c.tile_n, words(c.bk)),
            lambda k: (column, first + k),
            transforms=() if as_they_are else _tiled_bits(words(cut), element_bits),
        ),
        "scale": plgpu.BlockSpec((groups, c.tile_n), lambda k: (group_of(k), column)),
        "zero_point": plgpu.BlockSpec((groups, c.tile_n), lambda k: (group_of(k), column)),
        "x_sums": plgpu.BlockSpec(
            (c.bk // c.chunk(problem), sums_width(c)), lambda k: (first + k, row)
        ),
    }
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(count,),
        memory_registers=_MEMORY_REGISTERS,
        in_specs=[specs[name] for name in streamed(problem, config)],
        wg_axis=AXIS,
        num_compute_wgs=c.warpgroups,
        max_concurrent_steps=c.stages,
        compute_context=around,
    )


def around_tile(
    refs: Refs,
    problem: MatmulProblem,
    config: GpuConfig,
    place: tuple[Any, Any, Any],
    run: Callable[[Any], Any],
) -> None:
    """What a computing warpgroup does around its loop: its tile from nothing to its place."""
    c = config
    row, column, part = place
    own = lax.axis_index(AXIS)
    rows = pl.ds(row * c.bm, c.bm)
    columns = pl.ds((column * c.warpgroups + own) * c.bn, c.bn)
    shape = c.bn, c.bm
    wanted = () if is_outside(problem, c) else epilogue.names(problem, c)
    for name in epilogue.TILES:
        if name in wanted:
            plgpu.copy_gmem_to_smem(
                refs[name].at[rows, columns],
                refs[f"{name}_tile"].at[own],
                refs[f"{name}_barrier"].at[own],
            )
    given = {}
    for name in wanted:
        if name in epilogue.OVER_COLUMNS:
            vector = plgpu.load(refs[name].at[0, columns], layout=_BY_COLUMN, optimized=False)
            given[name] = lax.broadcast_in_dim(vector, shape, [0])
        elif name in epilogue.OVER_ROWS:
            vector = plgpu.load(refs[name].at[0, rows], layout=_BY_ROW, optimized=False)
            given[name] = lax.broadcast_in_dim(vector, shape, [1])
    if c.scale == "after":
        total = run(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA))
    else:

        def accumulate(acc: Any) -> jax.Array:
            run(acc)
            return acc[...]

        total = pl.run_scoped(accumulate, plgpu.ACC(shape, _sums_dtype(c)))
    for name in epilogue.TILES:
        if name in wanted:
            plgpu.barrier_wait(refs[f"{name}_barrier"].at[own])
            turned = refs[f"{name}_tile"].at[own].T
            given[name] = plgpu.layout_cast(
                plgpu.load(turned, layout=plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA
            )
    if is_outside(problem, c):
        out = total.astype(out_dtype(problem, c))
    else:
        out = epilogue.finish(total, given, problem, c)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    turned = refs["out_tile"].at[own].T
    turned[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs["out_tile"].at[own], refs["out"].at[part, rows, columns])


def multiply_step(
    refs: Refs,
    problem: MatmulProblem,
    config: GpuConfig,
    interpret: bool,
    _: Any,
    *blocks_and_carry: Any,
) -> Any:
    """One block of contracted values: adds its product to the carry, sums or their accumulator."""
    *blocks, carry = blocks_and_carry
    c, own = config, lax.axis_index(AXIS)
    block = dict(zip(streamed(problem, config), blocks, strict=True))
    columns = pl.ds(own * c.bn, c.bn)
    size = c.chunk(problem)
    weight = None
    if c.reading != "direct":
        weight = reading.load(block["codes"].at[columns], problem.codes, c, interpret)
    for i in range(c.bk // size):
        at = pl.ds(i * size, size)
        x = block["x"].at[:, at].T
        group: Refs = {
            name: _of_chunk(block[name], i, c.lane_groups(problem), columns, interpret)
            for name in ("scale", "zero_point")
            if name in block
        }
        if weight is None:
            operand: Any = block["codes"].at[columns, at]
        else:
            width = reading.elements(size, problem.codes, c)
            part = weight[:, i * width : (i + 1) * width]
            operand = _operand(part, group, problem, c, interpret, refs.get("table_pairs"))
            if c.staged:
                staging = refs["staging"].at[own, :, at]
                staging[...] = operand
                plgpu.commit_smem()
                operand = staging
        if c.scale != "after":
            plgpu.wgmma(carry, operand, x)
            if c.staged:
                plgpu.wgmma_wait(0)
            continue

        def multiply(acc: Any, operand: Any = operand, x: Any = x) -> jax.Array:
            plgpu.wgmma(acc, operand, x)
            return acc[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((c.bn, c.bm), _sums_dtype(c)))
        given = {"scale": lax.broadcast_in_dim(group["scale"], sums.shape, [0])}
        if "x_sums" in block:
            by_row = plgpu.load(block["x_sums"].at[i, : c.bm], layout=_BY_ROW)
            given["x_sums"] = lax.broadcast_in_dim(by_row, sums.shape, [1])
            zero = group["zero_point"].astype(jnp.float32)
            given["zero_point"] = lax.broadcast_in_dim(zero, sums.shape, [0])
        carry = carry + epilogue.scaled(sums.astype(jnp.float32), given, problem, c)
    plgpu.wgmma_wait(0)
    return carry


def _of_chunk(block: Any, i: int, groups: int, columns: Any, interpret: bool) -> jax.Array:
    """Scales or zero points of the i-th chunk: [bn], or [groups, bn] where lanes have their own."""
    if groups == 1:
        return plgpu.load(block.at[i, columns], layout=_BY_COLUMN)
    own = block.at[pl.ds(i * groups, groups), columns]
    return own[...] if interpret else plgpu.load(own, layout=scales_by_lane(groups))


def _operand(
    codes: jax.Array,
    group: Refs,
    problem: MatmulProblem,
    config: GpuConfig,
    interpret: bool,
    table: Any,
) -> jax.Array:
    """The operand of a chunk, less its offset and zero points, and scaled if scales come before."""
    out = reading.convert(codes, problem.codes, config, interpret, table)
    if config.operand != "bfloat16":
        return out

    def spread(rows: jax.Array) -> jax.Array:
        if rows.ndim == 2:
            return reading.spread_by_lane(rows, out.shape[1], interpret)
        return lax.broadcast_in_dim(rows, out.shape, [0])

    words = reading.words_of(problem.codes, config)
    offset = words.offset
    if words.factor != 1.0:
        out = out * jnp.bfloat16(words.factor)
    if "zero_point" in group:
        zero = (group["zero_point"].astype(jnp.float32) + offset).astype(jnp.bfloat16)
        out = out - spread(zero)
    elif offset:
        out = out - jnp.bfloat16(offset)
    if config.scale == "before":
        out = out * spread(group["scale"].astype(jnp.bfloat16))
    return out


def _sums_dtype(config: GpuConfig) -> Any:
    return jnp.int32 if config.operand == "int8" else jnp.float32


def tiling(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How a block of this dtype lies in shared memory, as wgmma reads it."""
    return _tiled_bits(columns, dtype_bytes(jnp.dtype(dtype).name) * 8)


def _tiled_bits(columns: int, bits: int) -> tuple[Any, ...]:
    """How a block lies in shared memory, so that its columns can be cut at multiples of these."""
    swizzle = plgpu.find_swizzle(columns * bits)
    tiled: Any = plgpu.TilingTransform  # (mypy takes jax's transforms for abstract)
    swizzled: Any = plgpu.SwizzleTransform
    return tiled((8, swizzle * 8 // bits)), swizzled(swizzle)
