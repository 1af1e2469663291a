"""The block shape of a parameter: from what an operation does with its axes, and a scheme.

Called by `assign_recipe`. Scales run along the axes that the operation sums over; axes that number
layers, experts or batches always keep scales of their own.
"""

from __future__ import annotations

import math

from jaxquant.core.blocks import divisors
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.schemes import WeightScheme
from jaxquant.passes.op_use import AxisUse, OpUse


class GroupSizeError(ValueError):
    """A group size that does not divide what it should divide."""


def block_shape(use: OpUse, scheme: WeightScheme, path: str) -> tuple[int, ...]:
    """How many neighbours along each axis of the parameter share a scale.

    - "channel": all that the operation sums over. For a lookup that is the row; for a convolution
      all of an output channel.
    - "group": `group_size` of these, along the last summed axis. If that axis is shorter and
      divides the group size, the group goes on along the axis before it: heads of 64 and groups
      of 128 make blocks of two heads. Convolutions have "channel" instead, unless the qtype
      prescribes groups.
    - "tensor": everything that belongs to one layer or expert.

    Args:
      use: the use that decides.
      scheme: how the parameter is stored.
      path: the parameter's path, for errors.

    Raises:
      GroupSizeError: names the parameter, the axis and its length, lists the group sizes that
        would do, and says how to write a rule.
    """
    prescribed = get_qtype(scheme.qtype).group_size is not None
    if scheme.granularity == "tensor":
        shared = ("contract", "free", "indexed") if use.primitive == "gather" else _OWN
        return tuple(_largest(axis, axis.run(*shared)) for axis in use.axes)
    if scheme.granularity == "channel" or (use.primitive == "conv" and not prescribed):
        return tuple(_largest(axis, summed(use, axis)) for axis in use.axes)
    return _groups(use, scheme, path)


_OWN = ("contract", "free")


def summed(use: OpUse, axis: AxisUse) -> int:
    """How many neighbours along an axis can share a scale in this use."""
    return axis.run("contract", "free") if use.primitive == "gather" else axis.contracted


def _largest(axis: AxisUse, limit: int) -> int:
    """The largest block up to ``limit`` that slices and splits of the axis leave whole."""
    return max(n for n in divisors(limit) if axis.allows(n))


def _groups(use: OpUse, scheme: WeightScheme, path: str) -> tuple[int, ...]:
    blocks = [1] * len(use.axes)
    group = scheme.group_size
    assert group is not None
    left = group
    for axis in _minor_first(use):
        run = summed(use, axis)
        if left == 1 or run == 1:
            continue
        take = math.gcd(left, run)
        if take not in (left, run) or not axis.allows(take):
            break
        blocks[axis.axis] = take
        left //= take
    if left != 1:
        raise GroupSizeError(_does_not_divide(use, group, path))
    return tuple(blocks)


def _minor_first(use: OpUse) -> list[AxisUse]:
    """Last axes first, but behind those that a merge made minor to them."""
    ordered: list[AxisUse] = []
    waiting = list(reversed(use.axes))
    while waiting:
        done = {axis.axis for axis in ordered}
        ready = (a for a in waiting if done.issuperset({m for m in a.minors if m >= 0}))
        axis = next(ready, waiting[0])
        waiting.remove(axis)
        ordered.append(axis)
    return ordered


def _does_not_divide(use: OpUse, group: int, path: str) -> str:
    axes = [axis for axis in _minor_first(use) if summed(use, axis) > 1]
    last = axes[0]
    run = summed(use, last)
    shape = tuple(axis.length for axis in use.axes)
    part = f" (in pieces of {run})" if run != last.length else ""
    allowed = [n for n in divisors(run) if n > 1 and last.allows(n)]
    total = math.prod(summed(use, axis) for axis in axes)
    more = f"; all its summed axes together have {total}" if len(axes) > 1 else ""
    sizes = ", ".join(map(str, allowed)) or "none"
    return (
        f"{path}: groups of {group} do not fit axis {last.axis} of length {last.length}{part} of "
        f"shape {shape}{more}. Group sizes that do: {sizes}. Put a rule in "
        f"front, e.g. recipe.with_rules(Rule({path!r}, weight=WeightScheme(..., "
        f"{_what_fits(allowed, group)})))"
    )


def _what_fits(allowed: list[int], group: int) -> str:
    if not allowed:  # the axis is sliced where no group of it stays whole
        return "granularity='channel'"
    return f"group_size={max((n for n in allowed if n <= group), default=allowed[0])}"
