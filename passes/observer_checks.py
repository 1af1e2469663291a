"""Which statistics can be merged: the checks that `observer` makes before it records one.

A statistic by channel means the same channels at every use of an operand and on every device, or it
is refused; statistics of whole tensors have no such conditions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.interpreter import Context, Site
from jaxquant.passes.observed import Operand
from jaxquant.passes.op_use import OpUse
from jaxquant.passes.program import Program
from jaxquant.passes.statistics import Statistic

_INSTEAD = "observe it with statistics of the whole tensor"


class MergeChecks:
    """Remembers what was observed so far.

    Attributes:
      uses: what the observed operands are, by path.
    """

    def __init__(self, program: Program) -> None:
        self.uses: dict[str, Operand] = {}
        self._program = program
        self._summed: dict[str, tuple[int, ...]] = {}

    def check(
        self,
        ctx: Context,
        path: str,
        use: Operand,
        wanted: Sequence[Statistic],
        weight: bool,
        manual: Sequence[str],
    ) -> None:
        """Refuses statistics that could not be merged with those of other places.

        Args:
          ctx: the product.
          path: name of the operand.
          use: what it is there.
          wanted: what is collected of it.
          weight: whether it meets a weight.
          manual: names of the mesh axes that are manual there.

        Raises:
          ValueError: names the operand, the statistic and the user's source line.
        """
        by_channel = [s for s in wanted if s.by_channel]
        before, known = self.uses.setdefault(path, use), None
        if weight and by_channel:
            if use.conv is not None and use.conv["batch_group_count"] != 1:
                raise ValueError(
                    f"{path!r}: no statistics by channel of a convolution with batch groups"
                )
            known = self._op_uses.get((ctx.site, path))
            if known is not None:
                axes = known.with_role("contract")
                same = self._summed.setdefault(path, axes) == axes
                if not same:
                    raise ValueError(
                        f"{path!r}: {by_channel[0].name} tells channels apart, and {ctx.source} "
                        f"sums over other axes of it than another use; {_INSTEAD}"
                    )
        for statistic in wanted:
            if statistic.shape(before) != statistic.shape(use):
                raise ValueError(
                    f"{path!r}: {statistic.name} has shape {statistic.shape(use)} at {ctx.source} "
                    f"and {statistic.shape(before)} at another use of it; {_INSTEAD}"
                )
        if by_channel and manual and not _is_whole(known, use):
            raise ValueError(
                f"{path!r}: {by_channel[0].name} tells apart the channels that the product at "
                f"{ctx.source} sums over, and shard_map splits them over devices; {_INSTEAD}"
            )

    @functools.cached_property
    def _op_uses(self) -> dict[tuple[Site, str | None], OpUse]:
        uses = self._program.facts.get("uses") or find_weights(self._program)
        return {(use.site, use.param): use for use in uses if use.is_product}


def _is_whole(known: OpUse | None, use: Operand) -> bool:
    """Whether a device sees all channels that the parameter has."""
    if known is None:
        return False
    whole = math.prod(axis.contracted for axis in known.axes)
    return use.conv is not None or whole == math.prod(use.channel_shape)
