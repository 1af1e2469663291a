"""Which config a product gets on a GPU: what was timed on the chip, else rules.

`choose_config` is asked by `gpu.select` and by the benchmarks. The rules follow from what the
compiler makes of the kernels (registers, instructions a weight: docs/gpu.md) and from bytes moved;
they have not been timed on a chip:

* Few rows stream the weight: up to 256 columns a block, so that x is read again seldom, and k is
  split until the multiprocessors have work. Scales of groups go on the groups' sums, which costs
  rows, not the weight.
* Many rows: two warpgroups take turns in converting and multiplying, and blocks stay for several
  tiles. Scales of groups go on the weight, unless that is of integers.
* Where x's blocks are large beside the weight's, neighbouring blocks load them once for all.
* All warpgroups have an equal share of the registers, which bounds the rows of a block.
"""

from __future__ import annotations

import dataclasses
import math

from jaxquant.pallas_kernels.gpu import tables
from jaxquant.pallas_kernels.gpu.chips import Chip
from jaxquant.pallas_kernels.gpu.config import GpuConfig, Reading, ScaleTime, shared_bytes
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, Unsupported, dtype_bytes

# Up to this many rows x is one block and the weight streams.
DECODE_ROWS = 64
_CODES = ("int8", "int4", "int3", "int2", "table4", "float8_e4m3fn", "float8_e5m2")
# k is a multiple of these: rows of words that the copy engine takes, and whole words a lane.
_GRANULE = {"int4": 64, "table4": 64, "int3": 128, "int2": 128}
_X = ("bfloat16", "float32", "int8", "float8_e4m3fn", "float8_e5m2")
# Bytes of codes in a column and step of few rows: a line of the memory.
_LINE = 128
_MOST_STAGES = 8
# A part of k has at least so many steps: fewer do not fill the stages.
_LEAST_STEPS = 2
_MOST_PARTS = 16
# Shorter groups of packed codes are spread over lanes of the tensor cores' operand.
_LANE_GROUPS = {"int3": 128, "int2": 64}
# Share of the multiprocessors' time in whole waves of blocks that is good enough.
_BUSY = 0.85


def choose_config(problem: MatmulProblem, chip: Chip) -> GpuConfig:
    """The config for a product on a chip.

    Args:
      problem: the product.
      chip: where it runs.

    Returns:
      A config that fits the chip's shared memory.

    Raises:
      Unsupported: no config fits; says why.
    """
    _check_supported(problem)
    entry = tables.find(problem, chip)
    if entry is not None and entry.config is not None:
        timed = at_most(problem, entry.config, chip)
        if timed is not None:
            return timed
    return _by_rules(problem, chip)


def _check_supported(problem: MatmulProblem) -> None:
    p = problem
    if p.codes not in _CODES:
        raise Unsupported(f"{p.codes} codes have no GPU kernel")
    if p.x_dtype not in _X:
        raise Unsupported(f"x in {p.x_dtype} has no GPU kernel")
    if p.groups > 1 and p.group % 32:
        raise Unsupported(f"groups of {p.group} are no multiple of 32")
    granule = _GRANULE.get(p.codes, 32)
    if p.k % granule:
        raise Unsupported(f"{p.codes} codes need k (now {p.k}) in multiples of {granule}")
    granule = 16 if p.zero_point else 8
    if p.n % granule:
        with_what = " with zero points" if p.zero_point else ""
        raise Unsupported(f"n (now {p.n}) must be a multiple of {granule}{with_what}")
    if _operand(p) == "int8" and p.group * 2**14 >= 2**31:
        raise Unsupported(f"integer sums over {p.group} values may not fit 32 bits")


def _by_rules(problem: MatmulProblem, chip: Chip) -> GpuConfig:
    p = problem
    few = p.m <= DECODE_ROWS
    operand = _operand(p)
    reading = _reading(p, operand, few)
    scale = _scale_time(p, operand, few)
    bits = STORAGE[p.codes][1]
    wanted = 64 if bits == 8 and operand == "bfloat16" and not few else 128
    if few and scale != "end":  # with one accumulator, twice the weights would wait in registers
        wanted = 8 * _LINE // bits
    if (few and scale == "before") or p.codes == "int3":
        # Lanes' own scales: again one accumulator. Three words a lane: no conflicts of banks.
        wanted = 128
    bk = _step(p, scale, wanted)
    config = GpuConfig(
        bm=_rows(p, scale, few),
        bn=64,
        bk=bk,
        stages=_MOST_STAGES,
        warpgroups=_warpgroups(p, few),
        scale=scale,
        reading=reading,
        operand=operand,
    )
    for bm in (config.bm, config.bm // 2, config.bm // 4):  # tiles of an epilogue may be large
        if bm % 8 == 0:
            fewer_rows = _spread(p, dataclasses.replace(config, bm=bm), chip)
            fitting = at_most(p, fewer_rows, chip)
            if fitting is not None:
                return fitting
    raise Unsupported(
        f"no blocks of {p} fit the {chip.shared_bytes >> 10} KiB of {chip.name}'s shared memory"
    )


def _spread(problem: MatmulProblem, config: GpuConfig, chip: Chip) -> GpuConfig:
    """The config with the work shared out: parts of k, clusters, blocks that stay."""
    few = problem.m <= DECODE_ROWS
    tiles = -(-problem.m // config.bm) * -(-problem.n // config.tile_n)
    cluster = _cluster(problem, config, few)
    count = parts(config.steps(problem), tiles, chip)
    blocks = 0
    if not few and count == 1 and tiles > chip.multiprocessors:
        blocks = chip.multiprocessors // cluster
    return dataclasses.replace(config, split_k=count, cluster=cluster, blocks=blocks)


def _operand(problem: MatmulProblem) -> str:
    p = problem
    if p.x_dtype == "int8" and p.codes in ("int8", "int4"):
        # wgmma takes int8 from registers only where 64 of them follow each other.
        return "int8" if p.codes == "int8" or p.group % 64 == 0 else "bfloat16"
    if p.x_dtype.startswith("float8") and p.codes == p.x_dtype and not p.zero_point:
        return p.x_dtype
    return "bfloat16"


def _reading(problem: MatmulProblem, operand: str, few: bool) -> Reading:
    if problem.codes == operand:
        return "direct"
    if problem.codes == "int4":
        # Putting x's columns in another order is nothing for few rows, a pass over x for many; for
        # int8 the pass that quantizes x does it.
        return "bits" if few or operand == "int8" else "cast"
    return "cast" if problem.codes == "int8" else "bits"


def _scale_time(problem: MatmulProblem, operand: str, few: bool) -> ScaleTime:
    if problem.groups == 1:
        return "end"
    if problem.group < _LANE_GROUPS.get(problem.codes, 0):
        return "before"  # lanes have scales of their own: the sums of groups are mixed
    return "after" if few or operand != "bfloat16" else "before"


def _rows(problem: MatmulProblem, scale: ScaleTime, few: bool) -> int:
    """Rows of x a block: sums of a group beside the total take twice the registers."""
    if few:
        return max(8, 1 << (problem.m - 1).bit_length())
    return 64 if scale == "after" else 128


def _warpgroups(problem: MatmulProblem, few: bool) -> int:
    """As many as have registers enough, and no more than the columns need.

    Two for zero points: the copy engine takes no fewer than 128 bytes of them.
    """
    most = 4 if few and problem.m <= 32 else 2
    return max(2 if problem.zero_point else 1, min(most, -(-problem.n // 64)))


def _cluster(problem: MatmulProblem, config: GpuConfig, few: bool) -> int:
    """Blocks that share loads of x: enough that x's bytes are half the weight's, if that goes.

    None for many rows with groups of integers: that loader brings up to five arrays, and sharing
    one takes more registers than it has.
    """
    if not few and config.scale == "after":
        return 1
    x = config.bm * dtype_bytes(config.operand)
    weight = config.tile_n * STORAGE[problem.codes][1] / 8
    tiles = -(-problem.n // config.tile_n)
    cluster = 1
    while (
        2 * x > weight * cluster
        and cluster < (4 if few else 2)
        and tiles % (2 * cluster) == 0
        and config.bm % (16 * cluster) == 0
    ):
        cluster *= 2
    return cluster


def _step(problem: MatmulProblem, scale: ScaleTime, wanted: int) -> int:
    """Contracted values a step: whole groups, or a whole part of one."""
    if scale == "end" or wanted % problem.group == 0 or problem.group % wanted == 0:
        return wanted
    if problem.group < wanted:  # whole groups that codes' tiles of 64 divide
        unit = math.lcm(problem.group, 64)
        return max(unit, wanted // unit * unit)
    return math.gcd(problem.group, wanted)


def parts(steps: int, tiles: int, chip: Chip) -> int:
    """In how many parts k is summed: the fewest that keep the multiprocessors busy.

    Args:
      steps: that all of k takes.
      tiles: of the result.
      chip: where it runs.
    """
    if tiles >= 2 * chip.multiprocessors:
        return 1

    def busy(count: int) -> float:
        waves = tiles * count / chip.multiprocessors
        own_steps = steps / (math.ceil(steps / count) * count)
        return waves / math.ceil(waves) * own_steps

    allowed = range(1, max(1, min(_MOST_PARTS, steps // _LEAST_STEPS)) + 1)
    return next((n for n in allowed if busy(n) >= _BUSY), max(allowed, key=busy))


def at_most(problem: MatmulProblem, config: GpuConfig, chip: Chip) -> GpuConfig | None:
    """The config with as many of its stages as fit; None if not even two do.

    One that was chosen for another shape loses its cluster or some parts if they do not go here.
    """
    if config.scale != "end" and config.bk % problem.group and problem.group % config.bk:
        return None
    shared = -(-problem.n // config.tile_n) % config.cluster == 0
    config = dataclasses.replace(
        config,
        split_k=min(config.split_k, -(-problem.k // config.bk)),
        cluster=config.cluster if shared else 1,
    )
    for stages in range(config.stages, 1, -1):
        fewer = dataclasses.replace(config, stages=stages)
        if shared_bytes(problem, fewer) <= chip.shared_bytes:
            return fewer
    return None
