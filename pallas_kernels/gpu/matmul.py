"""`quantized_matmul`: the Mosaic GPU kernel on plain arrays, for Hopper.

Called by `jaxquant.pallas_kernels.gpu.select` and by whoever has codes and scales at hand. Rows and
columns that do not fill a block are zeros that the copy engine makes up, and are cut off by it; the
weight is never copied. The arithmetic is `gpu.body`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.pallas_kernels.gpu import epilogue, reading, reading_table
from jaxquant.pallas_kernels.gpu.body import matmul_body, scratch_types, streamed, sums_width
from jaxquant.pallas_kernels.gpu.config import AXIS, CLUSTER, GpuConfig, is_outside, out_dtype
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem

_TABLE = (reading_table.ENTRIES, reading_table.BANKS)


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    problem: MatmulProblem,
    config: GpuConfig,
    x_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    gate: jax.Array | None = None,
    residual: jax.Array | None = None,
    table: Sequence[float] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`act((x * x_scale) @ ((values - zero_point) * scale))`, act = bias, gate, residual.

    Products of integers have int32 sums within a group (a column if there are no groups), all
    others float32; x in float32 is rounded to bfloat16.

    Args:
      x: [m, k] floats; or int8 / float8 codes with `x_scale`.
      codes: [n, k] as `problem.codes` says, K minor.
      scale: [k / group, n] floats.
      zero_point: None, or of the scale's shape, in code units.
      problem: shapes and dtypes; must agree with the arrays.
      config: blocks and order of operations.
      x_scale: [m, 1], float32.
      bias: [n].
      gate: [m, n]: the result is multiplied by silu(gate).
      residual: [m, n], added last.
      table: the 16 values of "table4" codes, by code + 8; they are rounded to bfloat16.
      interpret: False, or `plgpu.InterpretGPUParams()`; the config must then be staged or direct.

    Returns:
      [m, n] of `problem.out_dtype`.

    Raises:
      ValueError: an array does not have the shape or dtype that the problem states.
    """
    given: dict[str, Any] = {
        "x": x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
        "codes": codes,
        "scale": scale.astype(jnp.float32),
        "zero_point": zero_point,
        "x_scale": x_scale,
        "bias": None if bias is None else bias.reshape(1, -1).astype(jnp.float32),
        "gate": gate,
        "residual": residual,
        "table": None if table is None else reading_table.pairs(table),
    }
    check_operands(given, problem)
    arrays = prepare_operands(given, problem, config)
    sums = _run(arrays, problem, config, interpret)[:, : problem.m, : problem.n]
    if not is_outside(problem, config):
        return sums[0]
    total = sums[0]
    for part in range(1, config.split_k):  # in order, so that runs agree to the last bit
        total = total + sums[part]
    parts = {name: given[name] for name in epilogue.names(problem, config) if name in given}
    if "x_sums" in epilogue.names(problem, config):
        parts["x_sums"] = row_sums(given["x"], problem.k)
    return epilogue.finish(total, parts, problem, config)


def prepare_operands(
    given: dict[str, Any], problem: MatmulProblem, config: GpuConfig
) -> dict[str, Any]:
    """The arrays that the kernel takes, by the names that the body knows.

    Those that are small are filled up with zeros where the copy engine's tiles or plain loads must
    not end within them: the rows of all to multiples of 8, vectors to whole blocks.
    """
    p, c = problem, config
    rows, columns = padded(p, c)
    x = reading.arrange(given["x"].astype(c.operand), p.codes, c)
    arrays = {"x": pad(x, rows, p.k), "codes": reading.stored(given["codes"], p.codes, c)}
    block_rows, block_columns = _up(p.m, c.bm), _up(p.n, c.tile_n)
    at_end = () if is_outside(p, c) else epilogue.names(p, c)
    for name in ("scale", "zero_point"):
        if name in streamed(p, c):
            arrays[name] = given[name]
    if p.codes == "table4":
        arrays["table"] = given["table"]
    for name in at_end:
        if name in epilogue.OVER_COLUMNS:
            arrays[name] = pad(given[name], 1, block_columns)
        elif name in epilogue.TILES:
            arrays[name] = pad(given[name].astype(p.out_dtype), rows, columns)
    if "x_scale" in at_end:
        arrays["x_scale"] = pad(given["x_scale"].reshape(1, -1), 1, block_rows)
    if "x_sums" in at_end:
        arrays["x_sums"] = pad(row_sums(given["x"], p.k).T, 1, block_rows)
    if "x_sums" in streamed(p, c):
        size = c.chunk(p)
        sums = row_sums(pad(given["x"], block_rows, p.k), size).T.reshape(-1, c.bm)
        sums = pad(sums, sums.shape[0], sums_width(c))
        arrays["x_sums"] = sums.reshape(pl.cdiv(p.k, size), -1)
    return arrays


def padded(problem: MatmulProblem, config: GpuConfig) -> tuple[int, int]:
    """Rows and columns of what the kernel writes, a little more than there are if they are odd."""
    return _up(problem.m, 8), _up(problem.n, config.bn)


def row_sums(x: jax.Array, size: int) -> jax.Array:
    """Float32 [m, chunks]: sums of x over chunks of so many columns."""
    m, k = x.shape
    wide = x.astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)
    wide = pad(wide, m, _up(k, size))
    return wide.reshape(m, -1, size).sum(-1).astype(jnp.float32)


def pad(array: jax.Array, rows: int, columns: int) -> jax.Array:
    """The matrix with zeros behind it, up to so many rows and columns."""
    if array.shape == (rows, columns):
        return array
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, columns - array.shape[1])))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _run(
    arrays: dict[str, Any], problem: MatmulProblem, config: GpuConfig, interpret: Any
) -> jax.Array:
    """The kernel: [split_k, m, n] of `config.out_dtype`."""
    p, c = problem, config
    scratch = scratch_types(p, c)
    names = (*arrays, "out", *scratch)

    def body(*refs: Any) -> None:
        matmul_body(dict(zip(names, refs, strict=True)), p, c, bool(interpret))

    body.__name__ = kernel_name(p, c)  # what profilers call the kernel
    rows, columns = pl.cdiv(p.m, c.bm), pl.cdiv(p.n, c.tile_n * c.cluster)
    grid: dict[str, int] = {"row": rows, "column": columns, "part": c.split_k}
    if c.blocks:
        grid = {"block": min(c.blocks, rows * columns * c.split_k)}
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.split_k, *padded(p, c)), jnp.dtype(out_dtype(p, c))),
        scratch_types=list(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=(c.cluster,) if c.cluster > 1 else (),
        cluster_names=(CLUSTER,) if c.cluster > 1 else (),
        num_threads=c.warpgroups + 1,
        thread_name=AXIS,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )
    return kernel(*arrays.values())


def check_operands(given: dict[str, Any], problem: MatmulProblem) -> None:
    """Raises ValueError where arrays are not the problem's; names them, and both shapes."""
    p = problem
    shapes = {
        "x": (p.m, p.k),
        "codes": (p.n, p.code_rows),
        "scale": (p.groups, p.n),
        "zero_point": (p.groups, p.n) if p.zero_point else None,
        "x_scale": (p.m, 1) if p.x_scale else None,
        "bias": (1, p.n) if p.bias else None,
        "gate": (p.m, p.n) if p.gate else None,
        "residual": (p.m, p.n) if p.residual else None,
        "table": _TABLE if p.codes == "table4" else None,
    }
    for name, shape in shapes.items():
        got = None if given[name] is None else tuple(given[name].shape)
        if got != shape:
            raise ValueError(f"{name} has shape {got}; the problem says {shape}: {problem}")
    for name, dtype in (("x", p.x_dtype), ("codes", STORAGE[p.codes][0])):
        if given[name].dtype != jnp.dtype(dtype):
            raise ValueError(f"{name} is {given[name].dtype}; the problem says {dtype}")


def kernel_name(problem: MatmulProblem, config: GpuConfig) -> str:
    """What profilers call the kernel."""
    group = "channel" if problem.groups == 1 else f"g{problem.group}"
    return f"{problem.codes}_{group}_{problem.x_dtype}_{config.scale}_{config.reading}"
