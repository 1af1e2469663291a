"""Which config a product gets on a chip: by the chip's table, else by rules.

`choose_config` is asked by dispatch and by the benchmarks. `tpu.table` holds what a search found
better than the rules, which follow from the compiler's static schedules (docs/tpu.md has figures):

* One scale a column: on the output. Groups, few rows: after each group's dot, since scaling
  partial sums costs rows and scaling the weight costs the weight. Groups, many rows: before.
* Without vector arithmetic on bfloat16 (v4, v5e, v5p) the compiler's int4 conversion is what
  bounds a product of few rows; reading bits is not. With it, a register of int4 is converted to
  bfloat16 in one step, and from there to float32 in two; to float32 at once takes more.
* Few rows stream the weight: about 2 MiB of codes a step hide the fixed cost of a step, and the
  first block, which nothing hides, is still short.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxquant.pallas_kernels.problem import (
    PACKED,
    STORAGE,
    MatmulProblem,
    RaggedProblem,
    Unsupported,
    dtype_bytes,
)
from jaxquant.pallas_kernels.tpu import table
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.chunks import Chunks
from jaxquant.pallas_kernels.tpu.config import MatmulConfig, Reading, ScaleTime, vmem_bytes
from jaxquant.pallas_kernels.tpu.reading import LANES, SHUFFLED, UNITS
from jaxquant.pallas_kernels.tpu.stream import PARTS

# Up to this many rows x stays whole and the weight streams.
DECODE_ROWS = 64
# "after" pays up to this many rows with float operands, and on 256-wide matrix units with int8; and
# up to so many copies of rows where several groups share a chunk (a copy for each).
AFTER_ROWS = 128
_AFTER_COPIES = 64
# x is cut into two parts (`tpu.split`) up to so many copies of rows: each needs sums of its own.
_SPLIT_ROWS = 32
# It is cut into three parts of int8 where they fit into one register, or into two on chips whose
# vector units convert int4 to bfloat16 in one step, too, and are left some time for more sums.
_INTEGER_ROWS, _WIDE_INTEGER_ROWS = 8, 16
# Tiles of rows grouped by expert: at most so many; and the rows of v5e whose product takes as long
# as unpacking a weight and pushing it into the matrix units.
_MOST_TILE_ROWS = 512
_ROWS_WORTH_READING = 48
# All of k is one block of few rows up to here: what is prepared for the rows is then so once.
_MOST_DEPTH = 16384
_STEP_BYTES = 2 * 2**20
_MIB = 2**20
# Kernels that fetch their codes themselves: up to so many rows, so many codes a block or more (a
# wait costs more than half of a smaller block takes to come), on these chips.
_STREAM_ROWS = 16
_STREAM_CODES = 4 * 2**20
_STREAMS = ("v5e", "v6e")


def choose_config(problem: MatmulProblem, chip: Chip) -> MatmulConfig:
    """The config for a product on a chip.

    Args:
      problem: the product.
      chip: where it runs.

    Returns:
      A config that fits the chip's VMEM.

    Raises:
      Unsupported: no config fits; says why.
    """
    _check_supported(problem)
    return _from_table(problem, chip) or by_rules(problem, chip)


def by_rules(problem: MatmulProblem, chip: Chip) -> MatmulConfig:
    """The config that the rules give, whatever the table says; as `choose_config`."""
    operand = _operand(problem, chip)
    scale = _scale_time(problem, chip, operand)
    if scale == "before":
        operand = "bfloat16"
    reading = _reading(problem, chip, operand, scale)
    for bm, bn, bk in _targets(problem, chip, scale):
        config = fit(problem, chip, MatmulConfig(bm, bn, bk, scale, reading, operand))
        if config is not None:
            return config
    raise Unsupported(f"no blocks of {problem} fit the {chip.vmem_bytes >> 20} MiB of {chip.name}")


def _from_table(problem: MatmulProblem, chip: Chip) -> MatmulConfig | None:
    entry = table.find(problem, chip.name)
    if entry is None:
        return None
    e = entry
    try:
        return fit(problem, chip, MatmulConfig(e.bm, e.bn, e.bk, e.scale, e.reading, e.operand))
    except Unsupported:  # its blocks do not divide this product; the rules look for some that do
        return None


def choose_ragged_config(problem: RaggedProblem, chip: Chip) -> MatmulConfig:
    """The config for rows grouped by expert: that of a tile of rows with one expert.

    A tile is multiplied once for each expert with rows in it, about m / tile + experts times in
    all, each as long as reading the expert's weight (worth some rows) and multiplying a tile. The
    least of that is at the root of the rows an expert times what reading is worth.

    Args:
      problem: the product.
      chip: where it runs.

    Raises:
      Unsupported: no config fits; says why.
    """
    p = problem.product
    worth = _ROWS_WORTH_READING * chip.macs_per_cycle // CHIPS["v5e"].macs_per_cycle
    best = round(math.log2(math.sqrt(p.m / problem.experts * worth)))
    rows = min(max(2**best, DECODE_ROWS), _MOST_TILE_ROWS, p.m)
    return choose_config(dataclasses.replace(p, m=rows), chip)


def _check_supported(problem: MatmulProblem) -> None:
    p = problem
    shortest = 16 if p.e2m1 else 32
    if p.groups > 1 and p.group % shortest:
        raise Unsupported(f"groups of {p.group} are no multiple of {shortest}")
    granule = _granule(p)
    if p.codes in PACKED and (p.k % granule or p.n % LANES):
        raise Unsupported(
            f"packed {p.codes} codes need k (now {p.k}) in multiples of {granule} and n (now"
            f" {p.n}) in multiples of {LANES}"
        )
    if p.codes == "table4" and p.k % LANES:
        raise Unsupported(f"4-bit tables need k (now {p.k}) in multiples of {LANES}")


def _operand(problem: MatmulProblem, chip: Chip) -> str:
    if problem.x_dtype == problem.codes == "int4" and "int4" in chip.mxu_dtypes:
        return "int4"
    integers = {problem.x_dtype, problem.codes} <= {"int8", "int4"}
    if integers and "int8" in chip.mxu_dtypes:
        return "int8"
    floats = problem.x_dtype.startswith("float8") and problem.codes == problem.x_dtype
    if floats and "float8" in chip.mxu_dtypes:
        return problem.x_dtype
    copies = max(1, LANES // problem.group)
    few = _up(problem.m, 16) * copies <= _SPLIT_ROWS
    if problem.codes in ("int4", "int2") and few and chip.int4_to_float8:
        return "float8_e4m3fn"
    return "int8" if _cuts_into_integers(problem, chip) else "bfloat16"


def _cuts_into_integers(problem: MatmulProblem, chip: Chip) -> bool:
    """Whether x is cut into parts of int8 (`tpu.split`)."""
    wide = chip.has_bf16_vpu
    if problem.codes not in ("int8", "int4", "int3", "int2") or "int8" not in chip.mxu_dtypes:
        return False
    if wide and problem.codes == "int3":  # unpacking bounds it either way
        return False
    copies = max(1, LANES // problem.group)
    return _rows(problem.m) * copies <= (_WIDE_INTEGER_ROWS if wide else _INTEGER_ROWS)


def _scale_time(problem: MatmulProblem, chip: Chip, operand: str) -> ScaleTime:
    if problem.groups == 1:
        return "end"
    if operand.startswith("int") and not chip.has_bf16_vpu and problem.group >= LANES:
        return "after"  # integer dots are worth more than the scaling of partial sums
    copies = LANES // problem.group
    if copies > 1 and problem.e2m1 and (chip.has_bf16_vpu or problem.group < 32):
        return "before"  # in bfloat16; of the shortest groups there would be eight copies of rows
    if copies > 1:
        # Values of a table take most of the vector operations there are: none are left for scales.
        looked_up = problem.codes == "table4" and not problem.e2m1
        most = _AFTER_COPIES * (2 if looked_up else 1)
        return "after" if problem.m * copies <= most else "before"
    return "after" if problem.m <= AFTER_ROWS else "before"


def _reading(problem: MatmulProblem, chip: Chip, operand: str, scale: ScaleTime) -> Reading:
    p = problem
    if p.codes == "table4":
        if p.e2m1 and chip.converts_float4:
            return "float4"
        if chip.gathers_bytes:
            return "bytes of table"
        if p.e2m1:
            return "e2m1"
        if not chip.gathers_sublanes:
            raise Unsupported(f"{chip.name} does not gather within registers, as tables need")
        return "table"
    if p.codes in PACKED:
        if p.codes == "int2" and chip.gathers_bytes and dtype_bytes(operand) == 1:
            return "pairs"
        return "nibbles" if chip.has_bf16_vpu or operand == "int8" else "bits"
    if scale == "before" and chip.has_bf16_vpu and p.codes in ("int4", "int8"):
        return "staged"
    fits = p.k % LANES == 0 and (p.groups == 1 or LANES % p.group == 0 or p.group % LANES == 0)
    pays = not chip.has_bf16_vpu and p.m <= DECODE_ROWS // 2 and scale != "before"
    if chip.mxu_dtypes == ("bfloat16",):  # v4: its conversions take four times as long
        pays = True
        if p.codes == "int8" and fits:
            return "bytes"
    by_bits = p.codes == "float8_e4m3fn" and operand == "bfloat16" and not chip.has_bf16_vpu
    few = p.m <= DECODE_ROWS // 2 and scale != "before"  # two operands: twice the multiply-adds
    if by_bits and few and fits and p.group % LANES == 0:
        return "e4m3"
    return "bits" if p.codes == "int4" and operand == "bfloat16" and fits and pays else "cast"


def _granule(problem: MatmulProblem) -> int:
    """A block's contracted values are a multiple of this, or all of them."""
    base = LANES
    if problem.codes in UNITS:
        base = max(base, UNITS[problem.codes])
    return base if problem.groups == 1 else math.lcm(base, problem.group)


def _targets(
    problem: MatmulProblem, chip: Chip, scale: ScaleTime
) -> tuple[tuple[int, int, int], ...]:
    """Blocks (bm, bn, bk) to try, best first; `fit` cuts them to the product's size."""
    if problem.m <= DECODE_ROWS:
        columns = 8 * _STEP_BYTES // STORAGE[problem.codes][1] // min(problem.k, 4096)
        columns = min(max(columns // 256 * 256, 256), 1024)
        blocks = [(columns, 4096), (256, 2048), (128, 1024)]
        if problem.k > 4096 and chip.vmem_bytes > 16 * _MIB:
            deep = 2 * columns * 4096 // problem.k // 256 * 256
            blocks.insert(0, (min(max(deep, 256), 1024), _MOST_DEPTH))
        return tuple((problem.m, *block) for block in blocks)
    # Whole columns of k where they fit: sums then stay in the matrix units' queue.
    if chip.vmem_bytes <= 16 * _MIB:
        few = (256, 256, 2048), (256, 256, 512), (64, 128, 256)
        return (256, 1024, 2048), (256, 512, 2048), *few
    smaller = (512, 512, 4096), (512, 512, 1024), (256, 256, 512), (128, 128, 256)
    deep = 8192 if dtype_bytes(problem.x_dtype) > 1 else 16384
    if chip.has_bf16_vpu:
        before = (512, 1024, 8192)
        if chip.copies_operands:
            # A kernel that spills does not compile where XLA holds other arrays in VMEM: these do
            # not spill. All of k is one block: sums stay in the matrix units.
            before = (1024, 512, 8192) if problem.k <= 8192 else (512, 512, 16384)
        large = {"end": (1024, 512, deep), "before": before, "after": (512, 512, 8192)}
        return large[scale], (512, 512, 8192), *smaller
    if scale == "end" or (scale == "before" and STORAGE[problem.codes][1] == 8):
        return (512, 512, deep), *smaller
    # Where unpacking leaves few registers, 256 rows spill fewer, and their first block is there
    # sooner; all of k at once, and columns, keep a step of them long.
    wide = 1024 if scale == "before" and problem.k <= 8192 else 512
    return (256, wide, 16384), *smaller


def fit(problem: MatmulProblem, chip: Chip, wanted: MatmulConfig) -> MatmulConfig | None:
    """The config with blocks that divide k and keep to the product's size; None if too large.

    Raises:
      Unsupported: k cannot be cut so.
    """
    p = problem
    bm = min(_up(wanted.bm, 16), _rows(p.m))
    bn = p.n if p.n <= wanted.bn else near_divisor(p.n, wanted.bn)
    bk = _block_of_k(p.k, _granule(p), wanted.bk)
    scaled_in: Any = "bfloat16" if p.e2m1 and chip.has_bf16_vpu else "float32"
    config = dataclasses.replace(
        wanted,
        bm=bm,
        bn=bn,
        bk=bk,
        parallel=chip.cores > 1,
        codes_in_hbm=chip.copies_operands,
        scaled_in=scaled_in,
    )
    try:
        Chunks.make(p, config)
    except ValueError as uneven:
        raise Unsupported(str(uneven)) from None
    config = dataclasses.replace(config, stream=_streams(p, config, chip))
    needed = vmem_bytes(p, config)
    limit = int(chip.vmem_bytes * 0.9)
    as_stored = config.scale == "before" and config.reading not in SHUFFLED
    not_laid_out = 2 * config.bm * config.bk if as_stored else 0  # `vmem_bytes` counts it
    if needed - not_laid_out > limit:
        return None
    if chip.copies_operands:
        needed -= not_laid_out  # and leaves room for x, which XLA copies, too
    allowed = min(limit, max(16 * _MIB, _up(needed + needed // 2, _MIB)))
    return dataclasses.replace(config, vmem_limit_bytes=allowed)


def _streams(problem: MatmulProblem, config: MatmulConfig, chip: Chip) -> bool:
    """Whether fetching codes itself is possible for a kernel, and pays."""
    p, c = problem, config
    few = p.m <= c.bm <= _STREAM_ROWS and c.bk == p.k and p.n % c.bn == 0 and c.scale == "after"
    whole = p.group % LANES == 0 and p.groups % PARTS == 0 and c.bk * c.bn >= _STREAM_CODES
    short = p.codes == "int2" and c.operand == "int8" and not chip.has_bf16_vpu
    return few and whole and (p.codes == "int4" or short) and chip.name in _STREAMS


def _block_of_k(k: int, granule: int, most: int) -> int:
    """The largest multiple of the granule that divides k and is at most `most`, else k."""
    if k <= most or k % granule:
        return k
    count = k // granule
    best = max(
        (d for d in range(1, count + 1) if count % d == 0 and d * granule <= most), default=0
    )
    return best * granule if best * granule * 8 >= most else k


def near_divisor(n: int, wanted: int) -> int:
    """A multiple of 128 near `wanted`, one that divides n if there is one from half of it on."""
    for bn in range(wanted, wanted // 2, -LANES):
        if n % bn == 0:
            return bn
    return wanted


def _rows(rows: int) -> int:
    """Of a block that has them all: registers of 32 bits hold 8."""
    return _up(rows, 8 if rows <= 8 else 16)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
