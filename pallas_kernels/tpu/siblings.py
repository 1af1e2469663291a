"""`sibling_matmuls`: one x times several quantized weights, as one Pallas call on TPU.

Query, key and value; gate and up. The grid runs over the columns of all weights. Each weight has
its own operands, whose index maps stand still outside of its columns, so that nothing is fetched
or written twice. X is laid out once, and the fixed cost of a launch and of its first blocks, which
nothing hides, is paid once. Of several cores (megacore) each takes as many columns of every weight:
a block of a result that stands still is written back by its core at the end, so no core may have
passed it by. Called through `tpu.select` where the weights differ in their columns only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.body import matmul_body
from jaxquant.pallas_kernels.tpu.chips import Chip
from jaxquant.pallas_kernels.tpu.config import MatmulConfig, vmem_bytes
from jaxquant.pallas_kernels.tpu.heuristics import choose_config
from jaxquant.pallas_kernels.tpu.matmul import block_specs, kernel_name, kernel_operands
from jaxquant.pallas_kernels.tpu.prepare import scratch_shapes
from jaxquant.pallas_kernels.tpu.reading import LANES

_OF_ALL = ("x", "table", "x_scale")
_MIB = 2**20


def choose_sibling_config(problems: Sequence[MatmulProblem], chip: Chip) -> MatmulConfig:
    """The config for all: that of the narrowest weight, with VMEM for the blocks of each.

    Args:
      problems: the products; they differ in n only.
      chip: where they run.

    Raises:
      Unsupported: none fits; says why.
    """
    narrow = min(problems, key=lambda p: p.n)
    least = LANES * chip.cores
    if narrow.n < least:
        raise Unsupported(f"a weight of {narrow.n} columns: at least {least} share blocks")
    narrow = dataclasses.replace(narrow, n=narrow.n // least * LANES)  # those of one core
    config = choose_config(narrow, chip)
    needed = vmem_bytes(narrow, config) * len(problems)
    limit = int(chip.vmem_bytes * 0.9)
    if needed > limit:
        raise Unsupported(f"blocks of {len(problems)} weights at once do not fit {chip.name}")
    allowed = min(limit, max(16 * _MIB, -(-3 * needed // 2) // _MIB * _MIB))
    return dataclasses.replace(config, vmem_limit_bytes=allowed)


def sibling_matmuls(
    x: jax.Array,
    codes: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    zero_points: Sequence[jax.Array | None],
    *,
    problems: Sequence[MatmulProblem],
    config: MatmulConfig,
    cores: int = 1,
    x_scale: jax.Array | None = None,
    table: Sequence[float] | None = None,
    interpret: Any = False,
) -> list[jax.Array]:
    """The products of x with each weight; see `tpu.matmul.quantized_matmul`.

    Args:
      x: [m, k] floats, or int8 / float8 codes with `x_scale`.
      codes: [k, n] of each weight.
      scales: [k / group, n] of each.
      zero_points: likewise, or None.
      problems: the products; they differ in n only.
      config: of all.
      cores: how many share the columns of each weight.
      x_scale: [m, 1], float32.
      table: the 16 values of "table4" codes.
      interpret: as for pl.pallas_call.

    Returns:
      [m, n] of each.

    Raises:
      ValueError: an array does not have the shape or dtype that its problem states.
    """
    c, p = config, problems[0]
    depth = p.k // c.bk
    names: list[tuple[str, int | None]] = []  # with whose it is; None for all
    arrays: list[jax.Array] = []
    in_specs: list[pl.BlockSpec] = []
    out_specs: list[pl.BlockSpec] = []
    ranges: list[tuple[int, int]] = []
    for i, (own, *parts) in enumerate(zip(problems, codes, scales, zero_points, strict=True)):
        weight = dict(zip(("codes", "scale", "zero_point"), parts, strict=True))
        operands = kernel_operands({"x": x, "x_scale": x_scale, **weight}, table, own, c, interpret)
        first = ranges[-1][1] if ranges else 0
        ranges.append((first, first + pl.cdiv(pl.cdiv(own.n, c.bn), cores)))
        specs = _specs(own, c, *ranges[-1], depth)
        for name in operands:
            if name not in _OF_ALL or i == 0:
                names.append((name, None if name in _OF_ALL else i))
                arrays.append(operands[name])
                in_specs.append(specs[name])
        out_specs.append(specs["out"])
    scratch = scratch_shapes(p, c)
    names += [("out", i) for i in range(len(problems))] + [(name, None) for name in scratch]

    def kernel(*refs: Any) -> None:
        named = list(zip(names, refs, strict=True))
        column, step = pl.program_id(2), pl.program_id(3)
        for i, ((first, end), own) in enumerate(zip(ranges, problems, strict=True)):
            of_weight = {name: ref for (name, whose), ref in named if whose in (None, i)}

            @pl.when((column >= first) & (column < end))
            def _(refs: dict[str, Any] = of_weight, own: MatmulProblem = own) -> None:
                matmul_body(refs, own, c, step, column == 0)

    outs = pl.pallas_call(
        kernel,
        grid=(cores, pl.cdiv(p.m, c.bm), ranges[-1][1], depth),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct((p.m, own.n), jnp.dtype(own.out_dtype)) for own in problems
        ],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores > 1 else "arbitrary", *("arbitrary",) * 3),
            vmem_limit_bytes=c.vmem_limit_bytes,
        ),
        interpret=interpret,
        name=f"{len(problems)}_of_{kernel_name(p, c)}",
    )(*arrays)
    return list(outs)


def _specs(
    problem: MatmulProblem, config: MatmulConfig, first: int, end: int, depth: int
) -> dict[str, pl.BlockSpec]:
    """Blocks of one weight, whose columns are blocks `first` to `end` of all that a core has.

    Where a core's share has a block more than there are, it does the last one again.
    """
    share, blocks = end - first, pl.cdiv(problem.n, config.bn)

    def own_columns(core: Any, i: Any, j: Any, k: Any) -> Any:
        return jnp.minimum(core * share + jnp.clip(j - first, 0, share - 1), blocks - 1)

    def own_depth(core: Any, i: Any, j: Any, k: Any) -> Any:
        return k if depth == 1 else jnp.where(j < first, 0, jnp.where(j < end, k, depth - 1))

    def rows(core: Any, i: Any, j: Any, k: Any) -> Any:
        return i

    of_weight = block_specs(problem, config, rows=rows, columns=own_columns, depth=own_depth)
    plain = block_specs(
        problem,
        config,
        rows=rows,
        columns=lambda core, i, j, k: j,
        depth=lambda core, i, j, k: k,
    )
    return {name: (plain if name in _OF_ALL else of_weight)[name] for name in plain}
