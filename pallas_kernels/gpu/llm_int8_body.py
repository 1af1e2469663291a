"""LLM.int8()'s two products in one launch: int8, then bfloat16 outliers on the scaled sums.

Called by `gpu.llm_int8`, which says what the arrays are. The int8 product is `gpu.body`'s loop.
What follows it in a block: the integer sums become float32 and get the rows' scales, the tensor
cores multiply the outliers in bfloat16 into a second accumulator, and both together get the
columns' scales. Outliers' blocks are on their way from before the loop.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.pallas_kernels.gpu import body, epilogue, matmul
from jaxquant.pallas_kernels.gpu.config import AXIS, GpuConfig
from jaxquant.pallas_kernels.problem import MatmulProblem

_BY_COLUMN = plgpu.Layout.WGMMA.reduce(1)
_BY_ROW = plgpu.Layout.WGMMA.reduce(0)


def two_part_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    x_scale: jax.Array,
    outliers: jax.Array,
    outlier_codes: jax.Array,
    *,
    problem: MatmulProblem,
    config: GpuConfig,
    interpret: Any = False,
) -> jax.Array:
    """`((x @ codes.T) * x_scale + outliers @ outlier_codes.T) * scale`.

    Args:
      x: int8 [m, k].
      codes: int8 [n, k].
      scale: [1, n] floats.
      x_scale: float32 [m, 1].
      outliers: bfloat16 [m, capacity], capacity a multiple of 64.
      outlier_codes: bfloat16 [n, capacity].
      problem: of the int8 product.
      config: of one part of k and one tile a block.
      interpret: False, or `plgpu.InterpretGPUParams()`.

    Returns:
      [m, n] of `problem.out_dtype`.

    Raises:
      ValueError: the config does more than that.
    """
    p, c = problem, config
    if (c.split_k, c.blocks, c.cluster, c.reading) != (1, 0, 1, "direct"):
        raise ValueError(f"config must have one part, one tile a block, no cluster: {config}")
    capacity = outliers.shape[1]
    rows, columns = matmul.padded(p, c)
    arrays = {
        "x": matmul.pad(x, rows, p.k),
        "codes": codes,
        "scale": matmul.pad(scale.astype(jnp.float32), 1, pl.cdiv(p.n, c.tile_n) * c.tile_n),
        "x_scale": matmul.pad(x_scale.reshape(1, -1), 1, pl.cdiv(p.m, c.bm) * c.bm),
        "outliers": matmul.pad(outliers, rows, capacity),
        "outlier_codes": matmul.pad(outlier_codes, columns, capacity),
    }
    tiled = body.tiling(capacity, jnp.bfloat16)
    scratch = body.scratch_types(p, c) | {
        "outliers_tile": plgpu.SMEM((c.bm, capacity), jnp.bfloat16, transforms=tiled),
        "outliers_barrier": plgpu.Barrier(),
        "codes_tile": plgpu.SMEM((c.warpgroups, c.bn, capacity), jnp.bfloat16, transforms=tiled),
        "codes_barrier": plgpu.Barrier(num_barriers=c.warpgroups),
    }
    names = (*arrays, "out", *scratch)

    def kernel_body(*refs: Any) -> None:
        _tile(dict(zip(names, refs, strict=True)), p, c, bool(interpret))

    kernel_body.__name__ = "llm_int8"  # what profilers call the kernel
    kernel = plgpu.kernel(
        kernel_body,
        out_type=jax.ShapeDtypeStruct((rows, columns), jnp.dtype(p.out_dtype)),
        scratch_types=list(scratch.values()),
        grid=(pl.cdiv(p.m, c.bm), pl.cdiv(p.n, c.tile_n)),
        grid_names=("row", "column"),
        num_threads=c.warpgroups + 1,
        thread_name=AXIS,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )
    return kernel(*arrays.values())[: p.m, : p.n]


def _tile(refs: body.Refs, problem: MatmulProblem, config: GpuConfig, interpret: bool) -> None:
    """The tile of a thread block."""
    place = lax.axis_index("row"), lax.axis_index("column"), 0
    step = functools.partial(body.multiply_step, refs, problem, config, interpret)
    around = functools.partial(_around, refs, problem, config)
    run = body.pipeline(problem, config, place, step, around)
    run(*(refs[name] for name in body.streamed(problem, config)))
    plgpu.wait_smem_to_gmem(0)


def _around(refs: body.Refs, problem: MatmulProblem, config: GpuConfig, run: Any) -> None:
    """What a computing warpgroup does around its loop."""
    c, own = config, lax.axis_index(AXIS)
    rows = pl.ds(lax.axis_index("row") * c.bm, c.bm)
    columns = pl.ds((lax.axis_index("column") * c.warpgroups + own) * c.bn, c.bn)
    shape = c.bn, c.bm
    codes_tile, codes_barrier = refs["codes_tile"].at[own], refs["codes_barrier"].at[own]
    plgpu.copy_gmem_to_smem(refs["outlier_codes"].at[columns], codes_tile, codes_barrier)

    @pl.when(own == 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(
            refs["outliers"].at[rows], refs["outliers_tile"], refs["outliers_barrier"]
        )

    x_scale = plgpu.load(refs["x_scale"].at[0, rows], layout=_BY_ROW, optimized=False)
    scale = plgpu.load(refs["scale"].at[0, columns], layout=_BY_COLUMN, optimized=False)

    def integers(acc: Any) -> jax.Array:
        run(acc)
        return acc[...]

    total = pl.run_scoped(integers, plgpu.ACC(shape, jnp.int32)).astype(jnp.float32)
    total = total * lax.broadcast_in_dim(x_scale, shape, [1])
    plgpu.barrier_wait(codes_barrier)
    plgpu.barrier_wait(refs["outliers_barrier"])

    def floats(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, codes_tile, refs["outliers_tile"].T)
        return acc[...]

    total = total + pl.run_scoped(floats, plgpu.ACC(shape, jnp.float32))
    # The rows' scales are in the sums already.
    rest = dataclasses.replace(problem, x_scale=False)
    out = epilogue.finish(total, {"scale": lax.broadcast_in_dim(scale, shape, [0])}, rest, config)
    out_tile = refs["out_tile"].at[own]
    turned = out_tile.T
    turned[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, refs["out"].at[rows, columns])
