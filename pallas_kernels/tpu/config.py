"""How the matmul kernel is to do a product on a TPU: a frozen record, apart from any body.

`tpu.heuristics` chooses a `MatmulConfig`, `tpu.matmul` obeys it. Plain data: it can be written to a
table and read back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, dtype_bytes

# When scales meet the product: "end" once a column, on the output (one scale a column); "after"
# each group's dot, on its partial sums; "before" the dot, on the weight.
ScaleTime = Literal["end", "after", "before"]
# How codes become operands: "cast", XLA's conversion; "staged", the same, but where the weight is
# scaled in float32 its codes go there by way of bfloat16, which holds them exactly; "bits", shifted
# into the mantissa of bfloat16 numbers, whose offset is subtracted from the sums; "nibbles", int2
# and int3 codes become words of int4, and those are converted; "pairs", two int2 codes a look-up
# (`tpu.pairs`); "bytes", int8 by way of float32; "e4m3", float8 by its bits (`tpu.e4m3`); "table",
# "bytes of table", "e2m1" and "float4", out of a table of 16 values (`tpu.lookup`).
Reading = Literal[
    "cast",
    "staged",
    "bits",
    "nibbles",
    "pairs",
    "bytes",
    "e4m3",
    "table",
    "bytes of table",
    "e2m1",
    "float4",
]

_FEW_ROWS = 64


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Blocks and order of operations.

    Attributes:
      bm: rows a block: 8, or a multiple of 16.
      bn: columns a block: a multiple of 128, or all of them.
      bk: contracted values a block: divides k, and whole groups or units of the reading.
      scale: when scales are applied.
      reading: how codes become operands.
      operand: dtype name in which the matrix units multiply: "bfloat16", "int8", "int4",
        "float8_e4m3fn" or "float8_e5m2".
      vmem_limit_bytes: what the compiler may use.
      parallel: blocks are shared out among several cores (megacore).
      stream: the kernel fetches its codes itself (`tpu.stream`): a block of rows, all of k a block,
        whole blocks of columns, scales after. Of `tpu.matmul` alone: where rows are grouped by
        expert, and for several weights at once, it has no effect.
      codes_in_hbm: XLA must leave the codes in HBM (`tpu.placement`).
      scaled_in: dtype name in which a weight is scaled before the dot. In bfloat16 scales are
        rounded to it, and products once more: for E2M1, exact where scales are powers of two.
    """

    bm: int
    bn: int
    bk: int
    scale: ScaleTime
    reading: Reading
    operand: str = "bfloat16"
    vmem_limit_bytes: int = 16 * 2**20
    parallel: bool = False
    stream: bool = False
    codes_in_hbm: bool = False
    scaled_in: Literal["float32", "bfloat16"] = "float32"


def converts_once(problem: MatmulProblem, config: MatmulConfig) -> bool:
    """Whether rows of x are converted once, and kept, not again for each block of columns.

    Where the matrix units take no float8, converting it takes five vector operations a value: of
    many rows as many as of the weight. Megacore may begin with any block of columns.
    """
    emulated = problem.x_dtype.startswith("float8") and config.operand == "bfloat16"
    return emulated and config.bm > _FEW_ROWS and not config.parallel


def vmem_bytes(problem: MatmulProblem, config: MatmulConfig) -> int:
    """An upper estimate of the VMEM a kernel takes: double-buffered blocks and its scratch.

    Args:
      problem: the product.
      config: its blocks.

    Returns:
      Bytes. The compiler's own figure is in `benchmarks/tpu_static.py`.
    """
    c, p = config, problem
    bits = 8 if c.stream else STORAGE[p.codes][1]  # scratch holds an int4 code a byte
    blocks = c.bm * c.bk * dtype_bytes(p.x_dtype) + c.bk * c.bn * bits // 8
    blocks += 4 * c.bn * max(8, p.groups) * (1 + p.zero_point)
    blocks += c.bm * c.bn * dtype_bytes(p.out_dtype) * (1 + p.gate + p.residual)
    blocks += 512 * c.bm * p.x_scale
    scratch = 4 * c.bm * c.bn
    if c.scale == "before":  # the scaled weight, x in the order of the reading, more sums
        scratch += 2 * c.bk * (c.bn + c.bm) + 4 * c.bm * c.bn
    if c.scale == "after" and (
        p.group < 128 or c.reading not in ("cast", "float4", "table", "bytes of table")
    ):
        scratch += c.bm * c.bk * 2 * math.ceil(256 / max(1, min(p.group, 256))) * 3
    if converts_once(p, c):
        scratch += 2 * c.bm * c.bk
    if c.operand != "bfloat16" and p.x_dtype != c.operand:  # x in parts
        scratch += 4 * max(c.bm, 16) * c.bk
    return 2 * blocks + scratch
