"""`gated_matmul`: silu(x @ gate) * (x @ up) of two quantized weights, as one Pallas call on TPU.

The front of SwiGLU (Shazeer 2020, arXiv:2002.05202). Each step multiplies a block of x by a block
of each weight; the gate's sums stay on the chip, in float32, and are what the epilogue of the
other product multiplies by: neither product is written out. Called through `tpu.select` for what
`jaxquant.passes.fuse_epilogues` found in a model.
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
from jaxquant.pallas_kernels.tpu.heuristics import choose_config, fit
from jaxquant.pallas_kernels.tpu.matmul import block_specs, kernel_name, kernel_operands
from jaxquant.pallas_kernels.tpu.prepare import scratch_shapes
from jaxquant.pallas_kernels.tpu.reading import LANES

_OF_BOTH = ("x", "table", "x_scale")
_MIB = 2**20
# A weight by its parts: codes, scale, zero point or None.
Parts = tuple[jax.Array, jax.Array, jax.Array | None]


def choose_gated_config(problem: MatmulProblem, chip: Chip) -> MatmulConfig:
    """The config of one of the products, with all of k a block, and blocks of both that fit.

    Args:
      problem: one of the products; the other is like it.
      chip: where they run.

    Raises:
      Unsupported: none fits; says why.
    """
    p, limit = problem, int(chip.vmem_bytes * 0.9)
    wanted = dataclasses.replace(choose_config(p, chip), bk=p.k)
    for columns in (wanted.bn, wanted.bn // 2, wanted.bn // 4):
        if columns % LANES and columns != p.n:
            break
        config = fit(p, chip, dataclasses.replace(wanted, bn=columns))
        if config is None:
            continue
        needed = 2 * vmem_bytes(p, config)
        if config.bk == p.k and needed <= limit:
            allowed = min(limit, max(16 * _MIB, 3 * needed // 2))
            return dataclasses.replace(config, vmem_limit_bytes=allowed, stream=False)
    raise Unsupported(f"blocks of two weights with k = {p.k} do not fit the VMEM of {chip.name}")


def gated_matmul(
    x: jax.Array,
    gate: Parts,
    up: Parts,
    *,
    problem: MatmulProblem,
    config: MatmulConfig,
    biases: tuple[jax.Array, jax.Array] | None = None,
    x_scale: jax.Array | None = None,
    table: Sequence[float] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`silu(x @ gate + biases[0]) * (x @ up + biases[1])`; see `tpu.matmul.quantized_matmul`.

    Args:
      x: [m, k] floats, or int8 / float8 codes with `x_scale`.
      gate: codes [k, n], scale [k / group, n] and zero points of the one weight.
      up: likewise, of the other.
      problem: of each product; without gate and residual.
      config: as `choose_gated_config` makes it.
      biases: [n] of each product, where the problem has a bias.
      x_scale: [m, 1], float32.
      table: the 16 values of "table4" codes.
      interpret: as for pl.pallas_call.

    Returns:
      [m, n] of `problem.out_dtype`.

    Raises:
      ValueError: an array does not have the shape or dtype that the problem states, or the config
        cuts k.
    """
    p, c = problem, config
    if c.bk != p.k or p.gate or p.residual:
        raise ValueError(f"all of k is one block, and there is no other epilogue: {p}, {c}")
    operands: dict[tuple[str, int], jax.Array] = {}  # by name, and whose it is
    for i, parts in enumerate((gate, up)):
        weight = dict(zip(("codes", "scale", "zero_point"), parts, strict=True))
        if biases is not None:
            weight["bias"] = biases[i].reshape(1, -1)
        given = kernel_operands({"x": x, "x_scale": x_scale, **weight}, table, p, c, interpret)
        operands |= {(name, i): a for name, a in given.items() if not i or name not in _OF_BOTH}
    scratch = scratch_shapes(p, c)
    specs = block_specs(p, c, rows=lambda i, j: i, columns=lambda i, j: j, depth=lambda i, j: 0)
    multiplied = dataclasses.replace(p, gate=True)

    def kernel(*refs: Any) -> None:
        (*ins, out, opened), own = refs[: len(operands) + 2], refs[len(operands) + 2 :]
        shared = dict(zip(scratch, own, strict=True))
        named = [dict(shared), dict(shared)]
        for (name, i), ref in zip(operands, ins, strict=True):
            for of_weight in named if name in _OF_BOTH else named[i : i + 1]:
                of_weight[name] = ref
        new_rows = True if c.parallel else pl.program_id(1) == 0
        in_float32 = dataclasses.replace(p, out_dtype="float32")
        matmul_body(named[0] | {"out": opened}, in_float32, c, 0, new_rows)
        matmul_body(named[1] | {"out": out, "gate": opened}, multiplied, c, 0, False)

    shared_out: Any = "parallel" if c.parallel else "arbitrary"
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(p.m, c.bm), pl.cdiv(p.n, c.bn)),
        in_specs=[specs[name] for name, _ in operands],
        out_specs=specs["out"],
        out_shape=jax.ShapeDtypeStruct((p.m, p.n), jnp.dtype(p.out_dtype)),
        scratch_shapes=[pltpu.VMEM((c.bm, c.bn), jnp.float32), *scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(shared_out, shared_out),
            vmem_limit_bytes=c.vmem_limit_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * p.m * p.k * p.n,
            bytes_accessed=p.least_bytes + p.weight_bytes,
            transcendentals=p.m * p.n,
        ),
        interpret=interpret,
        name=f"gated_{kernel_name(p, c)}",
    )(*operands.values())
