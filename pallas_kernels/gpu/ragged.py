"""`ragged_matmul`: rows grouped by expert times quantized experts, as one Mosaic GPU kernel.

For Hopper; the body is that of `gpu.body`, whose thread blocks here read in a small array which
expert's weight to take. The grid has room for the most tiles of rows that `group_sizes` may come
to; blocks behind the last tile return at once, and an expert without rows is never read.

A tile has rows of one expert only: XLA gathers each expert's rows into tiles of their own in front,
and gathers the result's rows back behind. Tiles of x as it lies would have to begin at multiples of
8 rows, since so x is tiled in shared memory, so that an expert with a few rows across such a border
would be read twice; and to store a part of a tile takes a copy for each power of two. The gathers
cost one more pass over x and one over the result: at decode a few percent of the experts' bytes; of
many rows `2 * m * (k * x's bytes + n * the result's)`, written and read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.pallas_kernels.gpu import epilogue, reading_table, tables
from jaxquant.pallas_kernels.gpu.body import (
    around_tile,
    bring_table,
    multiply_step,
    pipeline,
    scratch_types,
    streamed,
)
from jaxquant.pallas_kernels.gpu.chips import Chip
from jaxquant.pallas_kernels.gpu.config import AXIS, GpuConfig, is_outside, out_dtype
from jaxquant.pallas_kernels.gpu.heuristics import at_most, choose_config, parts
from jaxquant.pallas_kernels.gpu.matmul import (
    check_operands,
    kernel_name,
    padded,
    prepare_operands,
    row_sums,
)
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem, Unsupported

# Arrays of which every expert has its own.
_WEIGHT = ("codes", "scale", "zero_point")


class Tiles(NamedTuple):
    """Which rows are multiplied together; int32 arrays.

    Attributes:
      expert: of each tile; the number of experts where there is no tile, [tiles].
      row: of x at each place of the tiles, any row where no row is wanted, [tiles * bm].
      place: of each row of x; behind the tiles for rows behind the last group, [m].
    """

    expert: jax.Array
    row: jax.Array
    place: jax.Array


def most_tiles(rows: int, experts: int, bm: int) -> int:
    """Tiles that are enough for any sizes of groups: one for each expert, and all full ones."""
    used = min(rows, experts)
    return used + (rows - used) // bm


def make_tiles(group_sizes: jax.Array, rows: int, bm: int) -> Tiles:
    """Plans the tiles: in order of experts, all of an expert's but the last one full.

    Args:
      group_sizes: integers [experts]; their sum is at most `rows`.
      rows: rows of x.
      bm: rows a tile.
    """
    experts = group_sizes.shape[0]
    tiles = most_tiles(rows, experts, bm)
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    counts = (sizes + bm - 1) // bm
    until = jnp.cumsum(counts, dtype=jnp.int32)
    # An expert's rows less their places are one number for all of them.
    shift = (ends - sizes) - (until - counts) * bm

    def owner(index: jax.Array, borders: jax.Array) -> jax.Array:
        return jnp.sum(index[:, None] >= borders, axis=1, dtype=jnp.int32)

    expert = owner(jnp.arange(tiles, dtype=jnp.int32), until)
    own_shift = shift[jnp.minimum(expert, experts - 1)]
    place = jnp.arange(tiles * bm, dtype=jnp.int32).reshape(tiles, bm)
    row = jnp.clip(place + own_shift[:, None], 0, rows - 1).reshape(-1)
    every = jnp.arange(rows, dtype=jnp.int32)
    of_row = owner(every, ends)
    place = every - shift[jnp.minimum(of_row, experts - 1)]
    return Tiles(expert, row, jnp.where(of_row < experts, place, tiles * bm))


def choose_ragged_config(problem: RaggedProblem, chip: Chip) -> GpuConfig:
    """The config for rows grouped by expert: what was timed on the chip, else by one expert's.

    Which rows go where is not known; blocks are for twice the rows of even groups, so that most
    experts are read once. k is split where tiles of experts and columns are too few for the chip's
    multiprocessors, as in decoding one sequence.

    Args:
      problem: all rows, and how many experts there are.
      chip: where it runs.

    Raises:
      Unsupported: no config fits; says why.
    """
    rows = min(problem.product.m, pl.cdiv(2 * problem.product.m, problem.experts))
    product = dataclasses.replace(problem.product, m=rows)
    entry = tables.find(problem.product, chip, experts=problem.experts)
    if entry is not None and entry.config is not None:
        timed = at_most(product, entry.config, chip)
        if timed is not None:
            return timed
    config = dataclasses.replace(choose_config(product, chip), split_k=1, blocks=0, cluster=1)
    tiles = most_tiles(problem.product.m, problem.experts, config.bm)
    tiles *= pl.cdiv(product.n, config.tile_n)
    config = dataclasses.replace(config, split_k=parts(config.steps(product), tiles, chip))
    fitting = at_most(product, config, chip)  # a part of k may have had fewer stages than it all
    if fitting is None:
        raise Unsupported(f"no blocks of {product} fit {chip.name}'s shared memory")
    return fitting


def ragged_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    group_sizes: jax.Array,
    problem: RaggedProblem,
    config: GpuConfig,
    x_scale: jax.Array | None = None,
    table: Sequence[float] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`(x * x_scale)[r] @ ((values - zero_point) * scale)[expert of r]` for every row r.

    Args:
      x: [m, k] floats, or int8 / float8 codes with `x_scale`; the first group_sizes[0] rows belong
        to expert 0, and so on.
      codes: [experts, n, k] as `problem.product.codes` says, K minor; packed ones
        [experts, n, bytes].
      scale: [experts, k / group, n] floats.
      zero_point: None, or of the scale's shape, in code units.
      group_sizes: integers [experts].
      problem: shapes and dtypes; must agree with the arrays.
      config: blocks and order of operations; its cluster is 1, its blocks 0.
      x_scale: [m, 1], float32.
      table: the 16 values of "table4" codes.
      interpret: as for `gpu.matmul.quantized_matmul`.

    Returns:
      [m, n]; rows behind the last group are zero.

    Raises:
      ValueError: an array does not have the shape or dtype that the problem states, or the config
        is for one weight only.
    """
    p, c, experts = problem.product, config, problem.experts
    if group_sizes.shape != (experts,):
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, for {experts} experts")
    if (c.cluster, c.blocks) != (1, 0):
        raise ValueError(f"config must have cluster 1 and blocks 0: {c}")
    rows: dict[str, Any] = {
        "x": x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
        "x_scale": x_scale,
        "table": None if table is None else reading_table.pairs(table),
        **dict.fromkeys(("bias", "gate", "residual")),
    }
    weight = {"codes": codes, "scale": scale.astype(jnp.float32), "zero_point": zero_point}
    for name, array in weight.items():
        if array is not None and array.shape[0] != experts:
            raise ValueError(f"{name} has shape {array.shape}, for {experts} experts")

    tiles = make_tiles(group_sizes, p.m, c.bm)
    tiled = dataclasses.replace(p, m=tiles.row.shape[0])

    def prepare(own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        check_operands(rows | own, p)
        gathered = {n: None if rows[n] is None else rows[n][tiles.row] for n in ("x", "x_scale")}
        arrays = prepare_operands(rows | gathered | own, tiled, c)
        weight = {name: arrays.pop(name) for name in _WEIGHT if name in arrays}
        return weight, arrays

    own, common = jax.vmap(prepare, out_axes=(0, None))(weight)
    sums = _run({"expert": tiles.expert, **own, **common}, tiled, c, experts, interpret)
    sums = sums[:, :, : p.n]
    out = _finish(sums, tiles, rows, weight, tiled, c) if is_outside(p, c) else sums[0]
    return out.at[tiles.place].get(mode="fill", fill_value=0)


def _finish(
    sums: jax.Array,
    tiles: Tiles,
    rows: dict[str, Any],
    weight: dict[str, Any],
    problem: MatmulProblem,
    config: GpuConfig,
) -> jax.Array:
    """Adds the parts of k [parts, tiles * bm, n] in order, and what the kernel would do at the end.

    Args:
      sums: of the kernel.
      tiles: whose rows they are.
      rows: arrays with a row for each of x.
      weight: arrays of every expert.
      problem: of the tiles.
      config: of the kernel.
    """
    total = sums[0]
    for part in range(1, config.split_k):
        total = total + sums[part]
    wanted = epilogue.names(problem, config)
    given: dict[str, Any] = {}
    owner = jnp.minimum(tiles.expert, weight["codes"].shape[0] - 1)
    for name in set(wanted) & set(epilogue.OVER_COLUMNS):
        given[name] = weight[name][owner]  # [tiles, 1, n]: one a column
    if "x_scale" in wanted:
        given["x_scale"] = rows["x_scale"][tiles.row].reshape(-1, config.bm, 1)
    if "x_sums" in wanted:
        sums_of_rows = row_sums(rows["x"], problem.k)[tiles.row]
        given["x_sums"] = sums_of_rows.reshape(-1, config.bm, 1)
    shape = (owner.shape[0], config.bm, problem.n)
    return epilogue.finish(total.reshape(shape), given, problem, config).reshape(-1, problem.n)


def _run(
    arrays: dict[str, Any], problem: MatmulProblem, config: GpuConfig, experts: int, interpret: Any
) -> jax.Array:
    """The kernel: [split_k, tiles * bm, n and a little more]."""
    p, c = problem, config
    scratch = scratch_types(p, c)
    names = (*arrays, "out", *scratch)

    def body(*refs: Any) -> None:
        _body(dict(zip(names, refs, strict=True)), p, c, experts, bool(interpret))

    body.__name__ = f"ragged_{kernel_name(p, c)}"  # what profilers call the kernel
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.split_k, *padded(p, c)), jnp.dtype(out_dtype(p, c))),
        scratch_types=list(scratch.values()),
        grid=(p.m // c.bm, pl.cdiv(p.n, c.tile_n), c.split_k),
        grid_names=("row", "column", "part"),
        num_threads=c.warpgroups + 1,
        thread_name=AXIS,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )
    return kernel(*arrays.values())


def _body(
    refs: dict[str, Any], problem: MatmulProblem, config: GpuConfig, experts: int, interpret: bool
) -> None:
    """The tile of a thread block, if there is one."""
    row = lax.axis_index("row")
    place = row, lax.axis_index("column"), lax.axis_index("part")
    expert = refs["expert"][row]
    own = refs | {name: refs[name].at[expert] for name in _WEIGHT if name in refs}
    sources = [own[name] for name in streamed(problem, config)]
    step: Callable[..., Any] = functools.partial(multiply_step, own, problem, config, interpret)
    around = functools.partial(around_tile, own, problem, config, place)
    run = pipeline(problem, config, place, step, around)

    @functools.partial(
        pl.run_scoped, allocations=run.get_allocations(*sources), collective_axes=AXIS
    )
    def _(allocations: Any) -> None:
        if "table" in refs:
            bring_table(refs)

        @pl.when(expert < experts)
        def _() -> None:
            run(*sources, allocations=allocations)

    plgpu.wait_smem_to_gmem(0)
