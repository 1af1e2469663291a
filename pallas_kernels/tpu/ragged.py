"""`ragged_matmul`: rows grouped by expert times quantized experts, as one Pallas call on TPU.

Called by `jaxquant.pallas_kernels.ragged` through dispatch. Tiles of rows are fixed; where an
expert's rows end within a tile, the tile is visited once more for the next expert, and each visit
writes its own rows only. The grid runs over blocks of columns, visits, and blocks of contracted
values, so that a tile of the result stays on the chip until its last visit, and an expert without
rows is never read. How many visits there are depends on `group_sizes`, and so does the grid. The
arithmetic of a visit is `tpu.body`, as for one weight. The idea of visits is that of the megablox
kernels that come with JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem
from jaxquant.pallas_kernels.tpu.body import matmul_body
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.matmul import block_specs, kernel_name, kernel_operands
from jaxquant.pallas_kernels.tpu.prepare import scratch_shapes


class Visits(NamedTuple):
    """What each step of the grid's second axis does; int32 arrays with room for the most visits.

    Attributes:
      total: how many there are, [1].
      tile: the tile of rows.
      expert: whose rows are multiplied.
      start: the expert's first row.
      end: the row behind its last; `start` again where no row of the tile is anyone's.
    """

    total: jax.Array
    tile: jax.Array
    expert: jax.Array
    start: jax.Array
    end: jax.Array


def make_visits(group_sizes: jax.Array, rows: int, bm: int) -> Visits:
    """Plans the visits: every tile is visited, in order, and no expert without rows is.

    Args:
      group_sizes: integers [experts]; their sum is at most `rows`.
      rows: rows of x.
      bm: rows a tile.
    """
    experts, tiles = group_sizes.shape[0], pl.cdiv(rows, bm)
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    first = (ends - sizes) // bm
    counts = jnp.where(sizes > 0, (ends - 1) // bm - first + 1, 0)
    # Tiles behind the last group come last, for the last expert, so that none is read for them.
    behind = pl.cdiv(ends[-1:], bm)
    counts = jnp.concatenate([counts, tiles - behind])
    first = jnp.concatenate([first, behind])
    starts = jnp.concatenate([ends - sizes, ends[-1:]])
    last = jnp.max(jnp.where(sizes > 0, jnp.arange(experts, dtype=jnp.int32), 0), keepdims=True)
    expert = jnp.concatenate([jnp.arange(experts, dtype=jnp.int32), last])
    until = jnp.cumsum(counts, dtype=jnp.int32)
    visit = jnp.arange(tiles + experts, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(visit[:, None] >= until, axis=1), experts)
    tile = jnp.minimum(first[group] + visit - (until - counts)[group], tiles - 1)
    ends = jnp.concatenate([ends, ends[-1:]])
    return Visits(until[-1:], tile, expert[group], starts[group], ends[group])


def ragged_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    group_sizes: jax.Array,
    problem: RaggedProblem,
    config: MatmulConfig,
    x_scale: jax.Array | None = None,
    table: Sequence[float] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`(x * x_scale)[r] @ ((values - zero_point) * scale)[expert of r]` for every row r.

    Args:
      x: [m, k] floats, or int8 / float8 codes with `x_scale`; the first group_sizes[0] rows belong
        to expert 0, and so on.
      codes: [experts, k, n] as `problem.product.codes` says; packed ones [experts, bytes, n].
      scale: [experts, k / group, n] floats.
      zero_point: None, or of the scale's shape, in code units.
      group_sizes: integers [experts].
      problem: shapes and dtypes; must agree with the arrays.
      config: blocks and order of operations.
      x_scale: [m, 1], float32.
      table: the 16 values of "table4" codes.
      interpret: as for pl.pallas_call.

    Returns:
      [m, n]; rows behind the last group are zero.

    Raises:
      ValueError: an array does not have the shape or dtype that the problem states.
    """
    p, c, experts = problem.product, config, problem.experts
    if group_sizes.shape != (experts,):
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, for {experts} experts")
    given = {"x": x, "codes": codes, "scale": scale, "zero_point": zero_point, "x_scale": x_scale}
    operands = kernel_operands(given, table, p, c, interpret, experts)
    visits = make_visits(group_sizes, p.m, c.bm)
    several = pl.cdiv(p.m, c.bm) > 1
    scratch = scratch_shapes(p, c)
    shared: Any = "parallel" if c.parallel else "arbitrary"
    names = (*Visits._fields[1:], *operands, "out", *scratch)

    def kernel(*refs: Any) -> None:
        _visit(dict(zip(names, refs, strict=True)), p, c, several)

    specs = block_specs(
        p,
        c,
        rows=lambda j, v, k, tile, *_: tile[v],
        columns=lambda j, v, k, *_: j,
        depth=lambda j, v, k, *_: k,
        expert=lambda j, v, k, tile, expert, *_: expert[v],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Visits._fields) - 1,
            grid=(pl.cdiv(p.n, c.bn), visits.total[0], p.k // c.bk),
            in_specs=[specs[name] for name in operands],
            out_specs=specs["out"],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((p.m, p.n), jnp.dtype(p.out_dtype)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(shared, "arbitrary", "arbitrary"),
            vmem_limit_bytes=c.vmem_limit_bytes,
        ),
        interpret=interpret,
        name=f"ragged_{kernel_name(p, c)}",
    )(*visits[1:], *operands.values())


def _visit(
    refs: dict[str, Any], problem: MatmulProblem, config: MatmulConfig, several: bool
) -> None:
    """One step: `several` tiles of rows there are, or one."""
    visit, step = pl.program_id(1), pl.program_id(2)
    tile, start, end = (refs[name][visit] for name in ("tile", "start", "end"))
    before = refs["tile"][jnp.maximum(visit - 1, 0)]
    first = (visit == 0) | (tile != before)
    new_rows = first
    if not several and not config.parallel:
        new_rows = first & (pl.program_id(0) == 0)

    def write(out: Any, values: jax.Array) -> None:
        row = tile * config.bm + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        others = jnp.where(first, 0.0, out[...].astype(jnp.float32))
        own = jnp.where((row >= start) & (row < end), values.astype(jnp.float32), others)
        out[...] = own.astype(out.dtype)

    @pl.when(start < end)
    def _() -> None:
        matmul_body(refs, problem, config, step, new_rows, write)

    @pl.when((start == end) & (step == 0))
    def _() -> None:
        refs["out"][...] = jnp.zeros_like(refs["out"])
