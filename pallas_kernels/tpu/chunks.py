"""How a block of contracted values is cut for the matrix units: chunks, and groups within them.

Used by the bodies and by the choice of scratch. A chunk is what one dot takes. Groups shorter than
a chunk share it: x is stacked once for each group, with zeros outside of it, so that the weight is
pushed into the matrix units once at full depth and the rows of the result belong to groups.
"""

from __future__ import annotations

import dataclasses

from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu import split
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.reading import LANES, SHUFFLED, UNITS


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The cut of one block [bm, bk].

    Attributes:
      size: contracted values a chunk; divides bk.
      count: chunks a block.
      stack: groups within a chunk, each with a copy of x ("after" only; else 1).
      per_group: chunks a group (1 if a chunk holds whole groups).
      groups: groups a block, 1 if a group is longer than a block.
      per_read: chunks whose codes are read together ("after" only; else 1).
      parts: numbers that each of x is cut into (`tpu.split`), each with rows of its own.
    """

    size: int
    count: int
    stack: int
    per_group: int
    groups: int
    per_read: int = 1
    parts: int = 1

    @property
    def copies(self) -> int:
        """Rows of a chunk over those of x."""
        return self.stack * self.parts

    @classmethod
    def make(cls, problem: MatmulProblem, config: MatmulConfig) -> Chunks:
        """Of a problem and its config.

        Raises:
          ValueError: the block cannot be cut so; the message says which sizes do not divide.
        """
        bk, group, per_read = config.bk, problem.group, 1
        if config.reading in SHUFFLED:
            size = max(LANES, UNITS[problem.codes])
            if config.scale == "after":  # int3: 256 codes are read at once, 128 can be told apart
                per_read, size = size // LANES, LANES
        elif config.scale == "after":
            size = min(group, bk) if group >= LANES or LANES % group or bk % LANES else LANES
        else:
            size = bk
        if bk % (size * per_read) or problem.k % bk:
            raise ValueError(
                f"k = {problem.k}, blocks of {bk} and chunks of {size} contracted values: each must"
                " divide the one before"
            )
        if config.scale != "end" and max(bk, group) % min(bk, group):
            raise ValueError(f"blocks of {bk} and groups of {group}: one must divide the other")
        if config.scale == "after" and max(size, group) % min(size, group):
            raise ValueError(f"chunks of {size} and groups of {group}: one must divide the other")
        stack = max(1, size // group) if config.scale == "after" else 1
        per_group, groups = max(1, min(group, bk) // size), max(1, bk // group)
        parts = split.parts(problem, config)
        return cls(size, bk // size, stack, per_group, groups, per_read, parts)
