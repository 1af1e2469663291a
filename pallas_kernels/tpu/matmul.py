"""`quantized_matmul`: the Pallas TPU kernel on plain arrays.

Called by `jaxquant.pallas_kernels.dispatch` and by whoever has codes and scales at hand. Rows and
columns that do not fill a block are cut off by Pallas; contracted values must, and a config is
chosen so that they do (`tpu.heuristics`). The arithmetic is `tpu.body`; nothing here depends on
a device, so it can be interpreted on CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import PACKED, STORAGE, MatmulProblem
from jaxquant.pallas_kernels.tpu.body import matmul_body, scratch_shapes
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.reading import LANES

_ORDER = ("x", "codes", "scale", "zero_point", "table", "x_scale", "bias", "gate", "residual")


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
        "x": x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
        "codes": codes,
        # Single rows are read at any place, which only 32-bit arrays allow.
        "scale": scale.astype(jnp.float32),
        "zero_point": None if zero_point is None else zero_point.astype(jnp.float32),
        "table": None if table is None else _table_rows(table),
        "x_scale": x_scale,
        "bias": None if bias is None else bias.reshape(1, -1),
        "gate": gate,
        "residual": residual,
    }
    _check(given, problem)
    names = tuple(name for name in _ORDER if given[name] is not None)
    arrays: list[Any] = [given[name] for name in names]
    if config.bm > problem.m:  # a block of more rows than there are
        arrays = [_pad_rows(a, n, problem, config.bm) for a, n in zip(arrays, names, strict=True)]
    rows = max(problem.m, config.bm)
    scratch = scratch_shapes(problem, config)
    everything = (*names, "out", *scratch)

    def kernel(*refs: Any) -> None:
        matmul_body(dict(zip(everything, refs, strict=True)), problem, config)

    specs = _block_specs(problem, config)
    shared: Any = "parallel" if config.parallel else "arbitrary"
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, config.bm), pl.cdiv(problem.n, config.bn), problem.k // config.bk),
        in_specs=[specs[name] for name in names],
        out_specs=specs["out"],
        out_shape=jax.ShapeDtypeStruct((rows, problem.n), jnp.dtype(problem.out_dtype)),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(shared, shared, "arbitrary"),
            vmem_limit_bytes=config.vmem_limit_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * problem.m * problem.k * problem.n,
            bytes_accessed=problem.least_bytes,
            transcendentals=problem.m * problem.n * problem.gate,
        ),
        interpret=interpret,
        name=_name(problem, config),
    )(*arrays)
    return out[: problem.m]


def _block_specs(problem: MatmulProblem, config: MatmulConfig) -> dict[str, pl.BlockSpec]:
    c = config
    code_rows = c.bk
    if problem.codes in PACKED:
        code_rows = c.bk // 8 * STORAGE[problem.codes][1]
    column = functools.partial(pl.BlockSpec, index_map=lambda i, j, k: (0, j))
    result = functools.partial(pl.BlockSpec, index_map=lambda i, j, k: (i, j))
    return {
        "x": pl.BlockSpec((c.bm, c.bk), lambda i, j, k: (i, k)),
        "codes": pl.BlockSpec((code_rows, c.bn), lambda i, j, k: (k, j)),
        "scale": column((problem.groups, c.bn)),
        "zero_point": column((problem.groups, c.bn)),
        "table": pl.BlockSpec((8, LANES), lambda i, j, k: (0, 0)),
        "x_scale": pl.BlockSpec((c.bm, 1), lambda i, j, k: (i, 0)),
        "bias": column((1, c.bn)),
        "gate": result((c.bm, c.bn)),
        "residual": result((c.bm, c.bn)),
        "out": result((c.bm, c.bn)),
    }


def _check(given: dict[str, Any], problem: MatmulProblem) -> None:
    p = problem
    shapes = {
        "x": (p.m, p.k),
        "codes": (p.code_rows, p.n),
        "scale": (p.groups, p.n),
        "zero_point": (p.groups, p.n) if p.zero_point else None,
        "table": (8, LANES) if p.codes == "table4" else None,
        "x_scale": (p.m, 1) if p.x_scale else None,
        "bias": (1, p.n) if p.bias else None,
        "gate": (p.m, p.n) if p.gate else None,
        "residual": (p.m, p.n) if p.residual else None,
    }
    for name, shape in shapes.items():
        got = None if given[name] is None else tuple(given[name].shape)
        if got != shape:
            raise ValueError(f"{name} has shape {got}; the problem says {shape}: {problem}")
    for name, dtype in (("x", p.x_dtype), ("codes", STORAGE[p.codes][0])):
        if given[name].dtype != jnp.dtype(dtype):
            raise ValueError(f"{name} is {given[name].dtype}; the problem says {dtype}")


def _table_rows(table: Sequence[float]) -> jax.Array:
    if len(table) != 16:
        raise ValueError(f"a table of 4-bit codes has 16 values, not {len(table)}")
    row = jnp.pad(jnp.asarray(table, jnp.float32), (0, LANES - 16))
    return jnp.broadcast_to(row, (8, LANES))


def _pad_rows(array: jax.Array, name: str, problem: MatmulProblem, rows: int) -> jax.Array:
    if name not in ("x", "x_scale", "gate", "residual"):
        return array
    return jnp.pad(array, ((0, rows - problem.m), (0, 0)))


def _name(problem: MatmulProblem, config: MatmulConfig) -> str:
    group = "channel" if problem.groups == 1 else f"g{problem.group}"
    return f"{problem.codes}_{group}_{problem.x_dtype}_{config.scale}_{config.reading}"
