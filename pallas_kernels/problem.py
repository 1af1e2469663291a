"""What a matmul kernel is asked for: a frozen record of shapes and dtypes, of no platform.

`as_matrix.flatten` makes a `MatmulProblem` of a dot_general; each platform's heuristics choose a
config for it, or raise `Unsupported` with the reason. Plain data: it can be written to a table.
"""

from __future__ import annotations

import dataclasses

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
# The table of E2M1 floats (mxfp4, nvfp4) by code + 8: codes are their bits, as int4.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*(-v for v in _E2M1), *_E2M1)


class Unsupported(ValueError):
    """No kernel does this product; the message is the reason."""


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
      e2m1: the table of "table4" codes is `E2M1`.
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
    e2m1: bool = False

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
class RaggedProblem:
    """Rows grouped by expert, times quantized experts [experts, k, n].

    Attributes:
      product: of all rows with one expert; has no bias, gate or residual.
      experts: how many there are.
    """

    product: MatmulProblem
    experts: int


def dtype_bytes(name: str) -> int:
    """Bytes of one element; int4 counts one byte where it is not stored packed."""
    return {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}.get(name, 1)
