"""The floor of a kernel on a chip: what its bytes, its matrix operations and its unpacking need.

Called by `benchmarks.tpu_static`. The floor is the largest of four times that could all overlap:

* bytes: everything moved once, over the bandwidth;
* matrix: multiply-adds over the peak of the operand's dtype, rows counted in eights;
* push: the weight goes into the matrix units register by register;
* vector: `UNPACK`, an ideal sequence of vector operations written down for each storage, operand
  and kind of chip, and the scaling of groups by the cheaper order.

The sequences hold what the arithmetic needs and no loads, stores, address computations or waits.
"""

from __future__ import annotations

import dataclasses
import math

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu import split
from jaxquant.pallas_kernels.tpu.chips import Chip

# A vector operation does 1024 lanes of 32 bits; so many fit in an instruction (the compiler's own
# list of slots, "VALU" and "XLU", in its dump of bundles).
_LANES = 1024
_VALU_SLOTS = {"v4": 2, "v5e": 4, "v5p": 4, "v6e": 4, "v7x": 4}
_XLU_SLOTS = {"v4": 2, "v5e": 3, "v5p": 3, "v6e": 2, "v7x": 2}
# bfloat16 weights pushed in a cycle; twice as many of 8 bits. A push takes a register of 2048. Up
# to v5 it keeps its slot for four cycles (v4 has two slots, v5 four: the schedules of every kernel
# count so). v6e and v7x have two units. On v7x pushes into both, back to back, are seen; on v6e
# never more than four in three instructions, even of bfloat16 weights that lie in VMEM (two pushes,
# one of them to prepare, keep a unit for three: tests/pallas_kernels/tpu/test_aot.py).
_PUSHED = {"v4": 1024, "v5e": 2048, "v5p": 2048, "v6e": 8192 / 3, "v7x": 4096}


@dataclasses.dataclass(frozen=True)
class Unpack:
    """An ideal sequence from stored codes to operands.

    Attributes:
      sequence: in words.
      valu: vector operations a code (on 32-bit lanes; packed ones serve several codes).
      xlu: operations of the cross-lane unit a code.
    """

    sequence: str
    valu: float
    xlu: float = 0.0


_NONE = Unpack("operands as stored", 0.0)
_BITS4 = Unpack(
    "a word of 8 codes: 4 x (shift, and, xor 128.0 and the sign), the first without shift", 11 / 8
)
_BITS2 = Unpack("a word of 16 codes: 8 x (and, or a power of two), 2 shifts", 18 / 16)
_NIBBLES2 = "a word of 16 codes: 2 x (and, xor), shift; "
_BITS3 = Unpack(
    "3 words of 32 codes: 16 x (and, or a power of two), 7 shifts; 9 for 2 codes across words", 1.5
)
_NIBBLES3 = "3 words of 32 codes: 12 x and, 9 shifts, 8 x or, 4 x xor; 4 for 2 codes across words; "
_BFLOAT16 = "a register of bfloat16, 2 codes a lane: one unpacking"
_FLOAT8 = "a register of float8, 4 codes a lane, from half a register: one unpacking"
_TABLE = Unpack(
    "a code: unpack where it points and the shift, pick, shift; 4 codes: unpack, 2 masks;"
    " 2 codes: narrow",
    21 / 4,
)
_TABLE_BYTES = Unpack(
    "4 codes: unpack and mask; 2 x (each byte twice, bit 4 of the upper, pick four bytes)", 8 / 4
)
_E2M1 = Unpack(
    "a word of 8 codes: 4 shifts, 4 or, 2 and; 4 x (2 x (shift, and), or), one without shift",
    29 / 8,
)
_CONVERTED = Unpack("a register of bfloat16, 2 codes a lane: one conversion", 0.5)
# (codes, operand, vector arithmetic on bfloat16) -> sequence. Asked for in this order: exact, then
# whatever the chip.
UNPACK: dict[tuple[str, str, bool | None], Unpack] = {
    ("int8", "int8", None): _NONE,
    ("int4", "int8", None): Unpack(
        "a register of int8 from a quarter of int4: one unpacking", 0.25
    ),
    ("int4", "float8", True): Unpack(_FLOAT8, 0.25),
    ("int4", "bfloat16", False): _BITS4,
    ("int4", "bfloat16", True): Unpack(_BFLOAT16, 0.5),
    ("int8", "bfloat16", False): Unpack("a code: unpack, to float32; half of a packing", 2.5),
    ("int8", "bfloat16", True): Unpack(_BFLOAT16, 0.5),
    ("int3", "bfloat16", False): _BITS3,
    ("int3", "bfloat16", True): Unpack(_NIBBLES3 + _BFLOAT16, 37 / 32 + 0.5),
    ("int3", "int8", None): Unpack(
        _NIBBLES3 + "a register of int8 from a quarter of int4: one unpacking", 37 / 32 + 0.25
    ),
    ("int2", "int8", None): Unpack("a word of 16 codes: 4 x and, 3 shifts", 7 / 16),
    ("int3", "float8", True): Unpack(_NIBBLES3 + _FLOAT8, 37 / 32 + 0.25),
    ("int2", "bfloat16", False): _BITS2,
    ("int2", "bfloat16", True): Unpack(_NIBBLES2 + _BFLOAT16, 5 / 16 + 0.5),
    ("int2", "float8", True): Unpack("a word of 16 codes: 2 x and, shift; 4 x pick", 7 / 16),
    ("int4", "int4", None): _NONE,
    ("table4", "bfloat16", True): _TABLE_BYTES,
    ("table4", "bfloat16", False): _TABLE,
    ("e2m1", "bfloat16", True): _TABLE_BYTES,
    ("e2m1", "bfloat16", False): _E2M1,
    ("float4", "bfloat16", None): _CONVERTED,
    ("float8", "float8", None): _NONE,
    ("float8", "bfloat16", False): Unpack(
        "a word of 4 codes: and, subtract; 2 x (2 of sign and exponent 0: 3 shifts in all, and; or;"
        " the rest: shift, and, or), with the sum of implied ones in the matrix units",
        16 / 4,
    ),
    ("float8", "bfloat16", True): Unpack(_BFLOAT16, 0.5),
}


@dataclasses.dataclass(frozen=True)
class Floor:
    """Microseconds that each resource needs.

    Attributes:
      times: by resource: "bytes", "matrix", "push", "vector".
    """

    times: dict[str, float]

    @property
    def microseconds(self) -> float:
        """The largest."""
        return max(self.times.values())

    @property
    def bound(self) -> str:
        """Which it is."""
        return max(self.times, key=lambda name: self.times[name])


def floor(problem: MatmulProblem, operand: str, chip: Chip) -> Floor:
    """The floor of a product.

    Args:
      problem: the product.
      operand: dtype name in which the matrix units multiply.
      chip: where.

    Returns:
      Times of all its cores together.
    """
    p = problem
    size, weights = {"bfloat16": 2.0, "int4": 0.5}.get(operand, 1.0), p.k * p.n
    rows = math.ceil(p.m / 8) * 8
    fast = {"int8": 2, "int4": 4}.get(operand, 1)
    if chip.name == "v7x" and operand.startswith("float8"):
        fast = 2
    if p.x_dtype not in (operand, "int4") and not p.x_dtype.startswith(operand[:6]):
        rows *= split.PARTS.get(operand, 1)
    codes = p.codes
    if p.e2m1:
        codes = "float4" if chip.converts_float4 else "e2m1"
    way = unpack(codes, operand, chip)
    valu = weights * way.valu + _scaling(p, chip)
    cycles = {
        "matrix": rows * weights / (chip.macs_per_cycle * fast),
        "push": weights / (_PUSHED[chip.name] * 2 / size),
        "vector": max(
            valu / (_LANES * _VALU_SLOTS[chip.name]),
            weights * way.xlu / (_LANES * _XLU_SLOTS[chip.name]),
        ),
    }
    times = {name: c / chip.cores / chip.clock * 1e6 for name, c in cycles.items()}
    times["bytes"] = p.least_bytes / (chip.hbm_bandwidth * chip.cores) * 1e6
    return Floor(times)


def unpack(codes: str, operand: str, chip: Chip) -> Unpack:
    """The written sequence of a storage, operand and chip."""
    key = ("float8" if codes.startswith("float8") else codes,)
    key += ("float8" if operand.startswith("float8") else operand,)
    found = UNPACK.get((*key, chip.has_bf16_vpu)) or UNPACK.get((*key, None))
    if found is None:
        raise KeyError(f"no sequence is written for {codes} as {operand}")
    return found


def _scaling(problem: MatmulProblem, chip: Chip) -> float:
    """Lane operations of group scales: two a partial sum, or one a weight (a pair in bfloat16)."""
    if problem.groups == 1:
        return 0.0
    rows = math.ceil(problem.m / 8) * 8
    after = 2 * rows * problem.n * problem.groups
    before = problem.k * problem.n * (0.5 if chip.has_bf16_vpu else 1.0)
    return min(after, before)
