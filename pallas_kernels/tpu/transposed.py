"""`transposed_matmul`: rows times the transpose of a quantized weight, as a Pallas call on TPU.

The gradient of a product for its input: y [m, n] times codes [k, n] transposed, with the codes as
they are stored for the product itself. Scales vary along the result's columns and along what is
summed, so that they can meet nothing but the weight: each block is scaled on the chip as
`tpu.body` does it before a dot, and the matrix units take it transposed. Called through
`tpu.select`, where XLA would write the weight out in bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.body import scaled_block
from jaxquant.pallas_kernels.tpu.chips import Chip
from jaxquant.pallas_kernels.tpu.chunks import Chunks
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import near_divisor
from jaxquant.pallas_kernels.tpu.matmul import block_specs, kernel_name
from jaxquant.pallas_kernels.tpu.placement import placed
from jaxquant.pallas_kernels.tpu.reading import LANES

_CODES = ("int4", "int8", "float8_e4m3fn", "float8_e5m2")
_MIB = 2**20
_MOST_ROWS, _COLUMNS, _SUMMED = 512, 512, 4096


def choose_transposed_config(problem: MatmulProblem, chip: Chip) -> MatmulConfig:
    """Blocks of rows (bm), of what is summed (bn), and of the result's columns (bk).

    Args:
      problem: of the product itself, whose weight is [k, n].
      chip: where it runs.

    Raises:
      Unsupported: none fit; says why.
    """
    p = problem
    if p.codes not in _CODES:
        raise Unsupported(f"{p.codes} codes have no kernel that takes them transposed")
    if p.group % 32 or p.n % LANES:
        raise Unsupported(
            f"a transposed weight needs groups (now {p.group}) in multiples of 32 and n (now"
            f" {p.n}) in multiples of {LANES}"
        )
    bm = min(_MOST_ROWS, -(-p.m // 16) * 16)
    bn = p.n if p.n <= _SUMMED else near_divisor(p.n, _SUMMED)
    granule = math.lcm(LANES, p.group)
    bk = max((b for b in range(granule, _COLUMNS + 1, granule) if p.k % b == 0), default=p.k)
    if p.n % bn or bk % p.group:
        raise Unsupported(f"blocks of {bk} x {bn} do not divide a weight of {p.k} x {p.n}")
    staged = chip.has_bf16_vpu and p.codes in ("int4", "int8")
    config = MatmulConfig(bm, bn, bk, "before", "staged" if staged else "cast")
    needed, limit = _vmem_bytes(p, config), int(chip.vmem_bytes * 0.9)
    if needed > limit:
        raise Unsupported(f"blocks of {bm} x {bk} x {bn} do not fit the VMEM of {chip.name}")
    allowed = min(limit, max(16 * _MIB, needed * 3 // 2))
    return dataclasses.replace(
        config,
        vmem_limit_bytes=allowed,
        parallel=chip.cores > 1,
        codes_in_hbm=chip.copies_operands,
    )


def _vmem_bytes(problem: MatmulProblem, config: MatmulConfig) -> int:
    """An upper estimate: blocks twice, sums, and a block of the weight in float32 and bfloat16."""
    p, c = problem, config
    blocks = 2 * c.bm * c.bn + c.bk * c.bn * STORAGE[p.codes][1] // 8 + 4 * c.bm * c.bk
    blocks += 4 * c.bn * max(8, p.groups) * (1 + p.zero_point)
    return 2 * blocks + 4 * c.bm * c.bk + 6 * c.bk * c.bn


def transposed_matmul(
    y: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    problem: MatmulProblem,
    config: MatmulConfig,
    interpret: Any = False,
) -> jax.Array:
    """`y @ ((values - zero_point) * scale).T`, with float32 sums.

    The weight is rounded to bfloat16 once it is scaled, and float32 y to bfloat16.

    Args:
      y: [m, n] floats.
      codes: [k, n] as `problem.codes` says.
      scale: [k / group, n] floats.
      zero_point: None, or of the scale's shape, in code units; integers or floats.
      problem: of the product y is a gradient of.
      config: as `choose_transposed_config` makes it.
      interpret: as for pl.pallas_call.

    Returns:
      [m, k] of `problem.out_dtype`.

    Raises:
      ValueError: an array does not have the shape that the problem states.
    """
    p, c = problem, config
    arrays = {"x": y.astype(jnp.bfloat16), "codes": codes, "scale": scale.astype(jnp.float32)}
    wanted = {"x": (p.m, p.n), "codes": (p.k, p.n), "scale": (p.groups, p.n)}
    if zero_point is not None:
        arrays["zero_point"] = zero_point.astype(jnp.float32)
        wanted["zero_point"] = wanted["scale"]
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}; the problem says {shape}")
    rows = max(p.m, c.bm)
    arrays["x"] = jnp.pad(arrays["x"], ((0, rows - p.m), (0, 0)))
    arrays = placed(arrays, c, interpret)
    cut, steps = Chunks.make(p, c), p.n // c.bn

    def kernel(*refs: Any) -> None:
        named = dict(zip((*arrays, "out", "acc"), refs, strict=True))
        w = scaled_block(named, p, c, cut, pl.program_id(1))
        part = lax.dot_general(
            named["x"][...], w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        step, acc = pl.program_id(2), named["acc"]

        @pl.when(step == 0)
        def _() -> None:
            acc[...] = part

        @pl.when(step > 0)
        def _() -> None:
            acc[...] += part

        @pl.when(step == steps - 1)
        def _() -> None:
            named["out"][...] = acc[...].astype(p.out_dtype)

    specs = block_specs(
        p, c, rows=lambda i, j, s: i, columns=lambda i, j, s: s, depth=lambda i, j, s: j
    )
    specs["x"] = pl.BlockSpec((c.bm, c.bn), lambda i, j, s: (i, s))
    shared: Any = "parallel" if c.parallel else "arbitrary"
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, c.bm), p.k // c.bk, steps),
        in_specs=[specs[name] for name in arrays],
        out_specs=pl.BlockSpec((c.bm, c.bk), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, p.k), jnp.dtype(p.out_dtype)),
        scratch_shapes=[pltpu.VMEM((c.bm, c.bk), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(shared, shared, "arbitrary"),
            vmem_limit_bytes=c.vmem_limit_bytes,
        ),
        interpret=interpret,
        name=f"transposed_{kernel_name(p, c)}",
    )(*arrays.values())
    return out[: p.m]
