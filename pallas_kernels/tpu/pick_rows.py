"""`pick_rows`: rows of a table with few columns, by index: scales of a quantized embedding.

Called by the lowering of `jaxquant.core.structure.pick`. XLA keeps such a table [rows, groups]
column by column on TPU, since row by row every row would be padded to 128 lanes, and copies all of
it into the other order before it gathers. Here the transpose, which moves nothing, is read in tiles
of 128 rows: one for each index, the next one on its way while a row is picked from the last.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MOST_PICKED = 128
_DTYPES = ("float32", "bfloat16", "int8")  # exact in float32


def worth(picked: int, rows: int, groups: int, dtype: Any) -> bool:
    """Whether fetching a tile for each index beats XLA's copy of the table.

    A tile takes about as long to come as 1024 rows to be copied.

    Args:
      picked: how many rows are looked up.
      rows: rows of the table.
      groups: its columns.
      dtype: of its values.
    """
    few = picked <= MOST_PICKED and picked * 1024 <= rows
    return few and 1 < groups < LANES and jnp.dtype(dtype).name in _DTYPES


def pick_rows(table: jax.Array, index: jax.Array, *, interpret: Any = False) -> jax.Array:
    """`table[index]`.

    Args:
      table: [rows, groups], float32, bfloat16 or int8.
      index: integers [picked], at most 128; those out of bounds are clamped.
      interpret: as for pl.pallas_call.

    Returns:
      [picked, groups] of the table's dtype.
    """
    rows, groups = table.shape
    picked = index.shape[0]
    index = jnp.clip(index.astype(jnp.int32), 0, rows - 1)
    across = table.T
    if not interpret:  # else XLA moves all of it into VMEM on v7x
        across = pltpu.with_memory_space_constraint(across, pltpu.HBM)

    def kernel(index: Any, tile: Any, out: Any) -> None:
        i = pl.program_id(0)
        lane = lax.broadcasted_iota(jnp.int32, (groups, LANES), 1)
        own = jnp.where(lane == index[i] % LANES, tile[...].astype(jnp.float32), 0.0)
        column = jnp.sum(own, axis=1, keepdims=True)
        out[...] = jnp.where(lane == i, column, out[...])

    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(picked,),
            in_specs=[pl.BlockSpec((groups, LANES), lambda i, index: (0, index[i] // LANES))],
            out_specs=pl.BlockSpec((groups, LANES), lambda i, index: (0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((groups, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=picked * groups * LANES,
            bytes_accessed=picked * groups * LANES * table.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="pick_rows",
    )(index, across)
    return out.T[:picked].astype(table.dtype)
