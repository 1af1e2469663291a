"""`quantized_matmul`: the Pallas TPU kernel on plain arrays.

Called by `jaxquant.pallas_kernels.dispatch` and by whoever has codes and scales at hand. What a
block has beyond the rows and columns of the product is arbitrary, meets no other row or column, and
is cut off by Pallas; contracted values fill their blocks: a config is chosen so (`tpu.heuristics`).
The arithmetic is `tpu.body`; nothing here depends on a device, so it can be interpreted on CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import E2M1, PACKED, STORAGE, MatmulProblem
from jaxquant.pallas_kernels.tpu import stream
from jaxquant.pallas_kernels.tpu.body import matmul_body
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.lookup import TABLE_ROWS, table_rows
from jaxquant.pallas_kernels.tpu.placement import placed
from jaxquant.pallas_kernels.tpu.prepare import scratch_shapes
from jaxquant.pallas_kernels.tpu.reading import LANES

_ORDER = ("x", "codes", "scale", "zero_point", "table", "x_scale", "bias", "gate", "residual")
_CORES = 2  # of a device with several: v4 and v5p


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    problem: MatmulProblem,
    config: MatmulConfig,
    x_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    gate: jax.Array | None = None,
    residual: jax.Array | None = None,
    table: Sequence[float] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`act((x * x_scale) @ ((values - zero_point) * scale))`, act = bias, gate, residual.

    Products of integers have int32 sums within a group (a column if there are no groups), all
    others float32; x in float32 is rounded to bfloat16, as XLA's default precision does on TPU.

    Args:
      x: [m, k] floats; or int8 / float8 codes with `x_scale`.
      codes: [k, n] as `problem.codes` says; packed ones [bytes, n].
      scale: [k / group, n] floats.
      zero_point: None, or of the scale's shape, in code units; integers or floats.
      problem: shapes and dtypes; must agree with the arrays.
      config: blocks and order of operations.
      x_scale: [m, 1], float32.
      bias: [n].
      gate: [m, n]: the result is multiplied by silu(gate).
      residual: [m, n], added last.
      table: the 16 values of "table4" codes.
      interpret: as for pl.pallas_call.

    Returns:
      [m, n] of `problem.out_dtype`.

    Raises:
      ValueError: an array does not have the shape or dtype that the problem states.
    """
    given = {
        "x": x,
        "codes": codes,
        "scale": scale,
        "zero_point": zero_point,
        "x_scale": x_scale,
        "bias": None if bias is None else bias.reshape(1, -1),
        "gate": gate,
        "residual": residual,
    }
    operands = kernel_operands(given, table, problem, config, interpret)
    grid = pl.cdiv(problem.m, config.bm), pl.cdiv(problem.n, config.bn), problem.k // config.bk
    # With one block of rows each core has columns of its own and prepares x once, at its first.
    apart = config.parallel and grid[0] == 1 and grid[1] % _CORES == 0
    share = grid[1] // _CORES
    if apart:
        grid = _CORES, share, grid[2]
    scratch = scratch_shapes(problem, config)
    if config.stream:
        scratch |= stream.scratch(problem.code_rows, config.bn, codes.dtype)
    everything = (*operands, "out", *scratch)

    def kernel(*refs: Any) -> None:
        new_rows = True if config.parallel and not apart else pl.program_id(1) == 0
        named = dict(zip(everything, refs, strict=True))
        if not config.stream:
            matmul_body(named, problem, config, pl.program_id(2), new_rows)
            return
        named, await_part = stream.fetch(named, pl.program_id(1), grid[1])
        matmul_body(named, problem, config, 0, new_rows, await_part=await_part)

    specs = block_specs(
        problem,
        config,
        rows=lambda i, j, k: 0 if apart else i,
        columns=lambda i, j, k: i * share + j if apart else j,
        depth=lambda i, j, k: k,
    )
    if config.stream:
        specs["codes"] = pl.BlockSpec(memory_space=pltpu.HBM)
    shared: Any = "parallel" if config.parallel else "arbitrary"
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs[name] for name in operands],
        out_specs=specs["out"],
        out_shape=jax.ShapeDtypeStruct((problem.m, problem.n), jnp.dtype(problem.out_dtype)),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(shared, "arbitrary" if apart else shared, "arbitrary"),
            vmem_limit_bytes=config.vmem_limit_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * problem.m * problem.k * problem.n,
            bytes_accessed=problem.least_bytes,
            transcendentals=problem.m * problem.n * problem.gate,
        ),
        interpret=interpret,
        name=kernel_name(problem, config),
    )(*operands.values())


def kernel_operands(
    given: dict[str, Any],
    table: Sequence[float] | None,
    problem: MatmulProblem,
    config: MatmulConfig,
    interpret: Any,
    experts: int = 0,
) -> dict[str, jax.Array]:
    """What is passed to a kernel, in its order: cast and checked.

    Args:
      given: arrays by name, None for those that are not there.
      table: the 16 values of "table4" codes.
      problem: must agree with the arrays.
      config: its reading of a table, and where operands lie.
      interpret: as for pl.pallas_call.
      experts: size of the leading axis of the weight's parts; 0 for none.

    Raises:
      ValueError: an array does not have the shape or dtype that the problem states.
    """
    arrays = dict(given)
    if arrays["x"].dtype == jnp.float32:
        arrays["x"] = arrays["x"].astype(jnp.bfloat16)
    for name in ("scale", "zero_point"):  # single rows are read anywhere: for 32-bit arrays only
        if arrays[name] is not None:
            arrays[name] = arrays[name].astype(jnp.float32)
    arrays["table"] = _table_operand(table, problem, config)
    _check(arrays, problem, (experts,) if experts else ())
    if problem.x_scale and _lies(problem, config):
        arrays["x_scale"] = arrays["x_scale"].reshape(1, problem.m)
    operands = {name: arrays[name] for name in _ORDER if arrays.get(name) is not None}
    return placed(operands, config, interpret)


def _lies(problem: MatmulProblem, config: MatmulConfig) -> bool:
    """Whether the rows' scales are passed as a row, in which arrays of one column lie in memory.

    The kernel would have them copied to a column otherwise, by an operation of its own.
    """
    return problem.m <= config.bm <= LANES


def block_specs(
    problem: MatmulProblem,
    config: MatmulConfig,
    *,
    rows: Callable[..., Any],
    columns: Callable[..., Any],
    depth: Callable[..., Any],
    expert: Callable[..., Any] | None = None,
) -> dict[str, pl.BlockSpec]:
    """The blocks of each array, by name.

    Args:
      problem: the product.
      config: sizes of blocks.
      rows: from the grid's indices to that of a block of rows.
      columns: likewise, of columns.
      depth: likewise, of contracted values.
      expert: likewise, of the expert, where the weight's parts have such an axis in front.
    """
    c = config
    code_rows = c.bk
    if problem.codes in PACKED:
        code_rows = c.bk // 8 * STORAGE[problem.codes][1]

    def of_weight(size: int, at: Callable[..., Any]) -> pl.BlockSpec:
        if expert is None:
            return pl.BlockSpec((size, c.bn), lambda *g: (at(*g), columns(*g)))
        return pl.BlockSpec((None, size, c.bn), lambda *g: (expert(*g), at(*g), columns(*g)))

    scales = of_weight(problem.groups, lambda *g: 0)
    result = pl.BlockSpec((c.bm, c.bn), lambda *g: (rows(*g), columns(*g)))
    row_scales = pl.BlockSpec((c.bm, 1), lambda *g: (rows(*g), 0))
    if _lies(problem, c):
        row_scales = pl.BlockSpec((1, problem.m), lambda *g: (0, 0))
    return {
        "x": pl.BlockSpec((c.bm, c.bk), lambda *g: (rows(*g), depth(*g))),
        "codes": of_weight(code_rows, depth),
        "scale": scales,
        "zero_point": scales,
        "table": pl.BlockSpec((TABLE_ROWS, LANES), lambda *g: (0, 0)),
        "x_scale": row_scales,
        "bias": pl.BlockSpec((1, c.bn), lambda *g: (0, columns(*g))),
        "gate": result,
        "residual": result,
        "out": result,
    }


def _check(given: dict[str, Any], problem: MatmulProblem, leading: tuple[int, ...]) -> None:
    p = problem
    shapes = {
        "x": (p.m, p.k),
        "codes": (*leading, p.code_rows, p.n),
        "scale": (*leading, p.groups, p.n),
        "zero_point": (*leading, p.groups, p.n) if p.zero_point else None,
        "x_scale": (p.m, 1) if p.x_scale else None,
        "bias": (1, p.n) if p.bias else None,
        "gate": (p.m, p.n) if p.gate else None,
        "residual": (p.m, p.n) if p.residual else None,
    }
    for name, shape in shapes.items():
        array = given.get(name)
        got = None if array is None else tuple(array.shape)
        if got != shape:
            raise ValueError(f"{name} has shape {got}; the problem says {shape}: {problem}")
    for name, dtype in (("x", p.x_dtype), ("codes", STORAGE[p.codes][0])):
        if given[name].dtype != jnp.dtype(dtype):
            raise ValueError(f"{name} is {given[name].dtype}; the problem says {dtype}")


def _table_operand(
    table: Sequence[float] | None, problem: MatmulProblem, config: MatmulConfig
) -> jax.Array | None:
    """The table as its reading takes it; None where the reading knows the values."""
    if (table is not None) != (problem.codes == "table4"):
        raise ValueError(f"{problem.codes} codes: table is {table}")
    if table is None:
        return None
    if config.reading in ("table", "bytes of table"):
        return table_rows(config.reading, table)
    if tuple(table) != E2M1:
        raise ValueError(f"reading {config.reading!r} is for E2M1 values, not {table}")
    return None


def kernel_name(problem: MatmulProblem, config: MatmulConfig) -> str:
    """A name for profiles."""
    group = "channel" if problem.groups == 1 else f"g{problem.group}"
    return f"{problem.codes}_{group}_{problem.x_dtype}_{config.scale}_{config.reading}"
