"""How the matmul kernel is to do a product on a GPU: a frozen record, apart from any body.

`gpu.heuristics` chooses a `GpuConfig`, `gpu.matmul` obeys it, `gpu.tables` writes and reads it.
The product is computed transposed: rows of the weight are the tensor cores' M side, rows of x their
N side, so that few rows of x need no padding to 64 and converted weights can come from registers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, dtype_bytes

# When scales meet the product: "end" once a column, on the sums (one scale a column); "after" each
# group's product, on its sums; "before" the product, on the weight.
ScaleTime = Literal["end", "after", "before"]
# How codes become operands: "direct", not at all; "cast", by the compiler's own conversion;
# "bits", by masks on 32-bit words, for which x's columns are put in another order.
Reading = Literal["direct", "cast", "bits"]

AXIS, CLUSTER = "wg", "cluster"  # of a block's warpgroups and a cluster's blocks, in kernels
_MOST_TOGETHER = 128
# Contracted values of which the four lanes that share a row hold whole words each.
_WHOLE_WORDS = {"int2": 64, "int3": 128}


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """Blocks and order of operations.

    Attributes:
      bm: rows of x a block: a multiple of 8, at most 256.
      bn: columns of the weight a warpgroup: 64 or 128.
      bk: contracted values a step.
      stages: steps whose blocks are in shared memory or on their way there.
      warpgroups: those that compute; one more loads.
      scale: when scales are applied.
      reading: how codes become operands.
      operand: dtype name in which the tensor cores multiply: "bfloat16", "int8",
        "float8_e4m3fn" or "float8_e5m2".
      split_k: parts of the contracted axis that blocks of their own sum; XLA adds the parts.
      blocks: thread blocks (clusters) that share out all tiles among them; 0 for one a tile.
      cluster: neighbouring tiles of columns whose blocks run together and load each row of x once
        for all of them; divides the number of tiles, and bm / 8.
      staged: converted weights go through shared memory instead of registers (what interpret mode
        can run; slower).
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warpgroups: int
    scale: ScaleTime
    reading: Reading
    operand: str = "bfloat16"
    split_k: int = 1
    blocks: int = 0
    cluster: int = 1
    staged: bool = False

    @property
    def tile_n(self) -> int:
        """Columns of the weight a block."""
        return self.bn * self.warpgroups

    def chunk(self, problem: MatmulProblem) -> int:
        """Contracted values that are multiplied together: they share a scale, if groups have one.

        Without groups a bound on them bounds the registers that converted weights take.
        """
        if self.scale == "end":
            return math.gcd(self.bk, _MOST_TOGETHER) if self.bk > _MOST_TOGETHER else self.bk
        return max(_WHOLE_WORDS.get(problem.codes, 0), min(self.bk, problem.group))

    def lane_groups(self, problem: MatmulProblem) -> int:
        """Groups that a chunk has; where there are several, each is of other lanes."""
        return 1 if self.scale == "end" else max(1, self.chunk(problem) // problem.group)

    def steps(self, problem: MatmulProblem) -> int:
        """Steps of a part of k; the last ones of the last part may lie beyond its end."""
        return -(-problem.k // (self.bk * self.split_k))


def is_outside(problem: MatmulProblem, config: GpuConfig) -> bool:
    """Whether XLA finishes the sums (parts to add) instead of the kernel."""
    return config.split_k > 1


def out_dtype(problem: MatmulProblem, config: GpuConfig) -> str:
    """Dtype name of what the kernel writes."""
    if not is_outside(problem, config):
        return problem.out_dtype
    return "int32" if config.operand == "int8" and config.scale == "end" else "float32"


def needs_sums(problem: MatmulProblem, config: GpuConfig) -> bool:
    """Whether sums over x's rows correct the product for zero points (integer operands)."""
    return problem.zero_point and config.operand != "bfloat16"


def shared_bytes(problem: MatmulProblem, config: GpuConfig) -> int:
    """An upper estimate of the shared memory of a block.

    Args:
      problem: the product.
      config: its blocks.

    Returns:
      Bytes. The compiler's own figure is in `benchmarks/gpu_static.py`.
    """
    c, p = config, problem
    groups = max(1, c.bk // p.group)
    step = c.bm * c.bk * dtype_bytes(c.operand)
    step += c.tile_n * c.bk * STORAGE[p.codes][1] // 8
    if c.scale != "end":
        step += 4 * groups * c.tile_n
    if p.zero_point and not (needs_sums(p, c) and c.scale == "end"):
        step += 4 * groups * c.tile_n
    if needs_sums(p, c):
        step += 4 * groups * c.bm
    tile = c.bm * c.tile_n * dtype_bytes(out_dtype(p, c))
    tiles = 1 if is_outside(p, c) else 1 + p.gate + p.residual
    staging = c.tile_n * c.bk * dtype_bytes(c.operand) if c.staged else 0
    staging += 2**15 if p.codes == "table4" else 0
    return min(c.stages, c.steps(p)) * step + tiles * tile + staging + 4096
