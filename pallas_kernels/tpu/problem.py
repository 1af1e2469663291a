"""What a kernel is asked for, and how it is to do it: two frozen records, apart from any body.

A `MatmulProblem` states the product by shapes and dtypes; a `MatmulConfig` fixes blocks and the
order of operations. `tpu.heuristics` chooses a config, `tpu.matmul` obeys it. Plain data: both can
be written to a table and read back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

# Stored codes by name: dtype of the array, bits a value, and for packed ones codes a byte row.
STORAGE = {
    "int8": ("int8", 8),
    "int4": ("int4", 4),
    "float8_e4m3fn": ("float8_e4m3fn", 8),
    "float8_e5m2": ("float8_e5m2", 8),
    "int3": ("uint8", 3),
    "int2": ("uint8", 2),
    "table4": ("int4", 4),
}
PACKED = ("int3", "int2")

# When scales meet the product: "end" once a column, on the output (one scale a column); "after"
# each group's dot, on its partial sums; "before" the dot, on the weight.
ScaleTime = Literal["end", "after", "before"]
# How codes become operands: "cast", XLA's conversion; "bits", shifted into the mantissa of
# bfloat16 numbers near 128, whose offset is subtracted from the sums; "gather", out of a table.
Reading = Literal["cast", "bits", "gather"]


@dataclasses.dataclass(frozen=True)
class MatmulProblem:
    """x[m, k] times a quantized weight [k, n].

    Attributes:
      m: rows of x.
      k: contracted values.
      n: columns.
      codes: a key of `STORAGE`; "table4" are int4 indices (code + 8) into 16 values.
      x_dtype: dtype name of x as the kernel gets it: floats, or int8 / float8 codes.
      group: contracted values that share a scale; k for a scale a column.
      zero_point: whether there are zero points.
      x_scale: whether every row of x has a scale.
      bias: whether a row is added to every row of the result.
      gate: whether the result is multiplied by silu of a second array.
      residual: whether an array is added last.
      out_dtype: dtype name of the result.
    """

    m: int
    k: int
    n: int
    codes: str
    x_dtype: str = "bfloat16"
    group: int = 0
    zero_point: bool = False
    x_scale: bool = False
    bias: bool = False
    gate: bool = False
    residual: bool = False
    out_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.codes not in STORAGE:
            raise ValueError(f"codes are one of {list(STORAGE)}, not {self.codes!r}")
        if self.group < 0 or (self.group and self.k % self.group):
            raise ValueError(f"groups of {self.group} do not divide k = {self.k}")
        if not self.group:
            object.__setattr__(self, "group", self.k)

    @property
    def groups(self) -> int:
        """Scales a column."""
        return self.k // self.group

    @property
    def code_rows(self) -> int:
        """Size of the stored array's first axis."""
        if self.codes in PACKED:
            return -(-self.k // 8) * STORAGE[self.codes][1]
        return self.k

    @property
    def code_bytes(self) -> int:
        """Bytes of the stored codes."""
        if self.codes in PACKED:
            return self.code_rows * self.n
        return -(-self.k * self.n * STORAGE[self.codes][1] // 8)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, float32 scales and zero points."""
        parts = 1 + int(self.zero_point)
        return self.code_bytes + 4 * parts * self.groups * self.n

    @property
    def least_bytes(self) -> int:
        """Bytes that must be moved once: the weight, x, the result, what the epilogue reads."""
        out = dtype_bytes(self.out_dtype) * self.m * self.n
        x = dtype_bytes(self.x_dtype) * self.m * self.k + 4 * self.m * self.x_scale
        extra = out * (self.gate + self.residual) + 4 * self.n * self.bias
        return self.weight_bytes + x + out + extra


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """Blocks and order of operations.

    Attributes:
      bm: rows a block; a multiple of 16 (32 for 8-bit x).
      bn: columns a block: a multiple of 128, or all of them.
      bk: contracted values a block: divides k, and whole groups or units of the reading.
      scale: when scales are applied.
      reading: how codes become operands.
      operand: dtype name in which the matrix units multiply: "bfloat16", "int8", "int4",
        "float8_e4m3fn" or "float8_e5m2".
      vmem_limit_bytes: what the compiler may use.
      parallel: blocks are shared out among several cores (megacore).
    """

    bm: int
    bn: int
    bk: int
    scale: ScaleTime
    reading: Reading
    operand: str = "bfloat16"
    vmem_limit_bytes: int = 16 * 2**20
    parallel: bool = False


def dtype_bytes(name: str) -> int:
    """Bytes of one element; int4 counts one byte where it is not stored packed."""
    return {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}.get(name, 1)


def vmem_bytes(problem: MatmulProblem, config: MatmulConfig) -> int:
    """An upper estimate of the VMEM a kernel takes: double-buffered blocks and its scratch.

    Args:
      problem: the product.
      config: its blocks.

    Returns:
      Bytes. The compiler's own figure is in `benchmarks/tpu_static.py`.
    """
    c, p = config, problem
    bits = STORAGE[p.codes][1]
    blocks = c.bm * c.bk * dtype_bytes(p.x_dtype) + c.bk * c.bn * bits // 8
    blocks += 4 * c.bn * max(8, p.groups) * (1 + p.zero_point)
    blocks += c.bm * c.bn * dtype_bytes(p.out_dtype) * (1 + p.gate + p.residual)
    blocks += 512 * c.bm * p.x_scale
    scratch = 4 * c.bm * c.bn
    if c.scale == "before":
        scratch += c.bk * c.bn * 6 + 4 * c.bm * c.bn
    if c.scale == "after":
        scratch += c.bm * c.bk * 2 * math.ceil(256 / max(1, min(p.group, 256))) * 3
    return 2 * blocks + scratch
