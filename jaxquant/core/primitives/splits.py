"""How the operands of a quantized product lie on a mesh, as far as a program can tell.

From the sharding types of an explicit mesh; on an automatic one from the weight's `MeshLayout`;
inside the user's own shard_map from what of these is left. `placed` puts it into the `Place` that
`jaxquant.pallas_kernels.dispatch` is asked with, by the lowering and by the plan alike.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxquant.core import _compat
from jaxquant.core.layout import MeshLayout, names_of
from jaxquant.pallas_kernels.dispatch import Place
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.spmd import Names, Split


def placed(
    place: Place, x: Any, codes: Any, layout: MeshLayout | None, axes: DotAxes, out: Any
) -> Place:
    """A place, with what is known of how the operands of one product lie there.

    Args:
      place: where the program runs; its `devices` may be None.
      x: type of the activation.
      codes: type of the weight's codes.
      layout: of the weight, where it is recorded.
      axes: which axis does what.
      out: the sharding type of the result, or None.
    """
    if place.manual or place.devices == 1:
        return place
    mesh = _compat.mesh_axes(x) or _compat.mesh_axes(codes)
    sizes = {name: size for name, size, _ in mesh}
    if not mesh and place.devices is None and layout is not None:
        sizes = dict(layout.mesh)  # a plan of a program that was traced without arrays
    if not sizes:
        return place
    devices = math.prod(sizes.values())
    if place.devices not in (None, devices):
        return dataclasses.replace(place, split=f"the program's mesh has {devices}")
    kinds = {name: kind for name, _, kind in mesh}
    rest = tuple((name, n) for name, n in sizes.items() if kinds.get(name) != "manual")
    place = dataclasses.replace(place, devices=devices, manual=not rest)
    return dataclasses.replace(place, split=_split(rest, kinds, x, codes, layout, axes, out))


def _split(
    rest: tuple[tuple[str, int], ...],
    kinds: dict[str, str],
    x: Any,
    codes: Any,
    layout: MeshLayout | None,
    axes: DotAxes,
    out: Any,
) -> Split | str:
    """The split over the mesh axes that are left, or why it is not known."""
    automatic = {name: n for name, n in rest if kinds.get(name) != "explicit"}
    typed = [_typed(part) for part in (x, codes)]
    if None in typed or (out is not None and out.spec.unreduced):
        return "an operand or the result is a sum that is still to be made over mesh axes"
    of_x, of_w = ([*entries] for entries in typed if entries is not None)
    if automatic:
        shown = ", ".join(automatic)
        if layout is None:
            return (
                f"how the operands lie on the automatic mesh axes {shown} is not recorded"
                " (jaxquant.with_shardings does that)"
            )
        if not automatic.items() <= dict(layout.mesh).items():
            mesh = ", ".join(f"{name}: {n}" for name, n in layout.mesh)
            return f"the weight's shardings are recorded for another mesh ({mesh})"
        for axis, names in enumerate(layout.of_weight(codes.ndim)):
            of_w[axis] += tuple(name for name in names if name in automatic)
        if axes.x_free:
            of_x[axes.x_free[0]] += tuple(name for name in layout.batch if name in automatic)
    result = None if out is None else tuple(map(names_of, out.spec))
    return Split(rest, tuple(of_x), tuple(of_w), result)


def _typed(part: Any) -> tuple[Names, ...] | None:
    """The entries of a sharding type; none of them off explicit meshes. None for partial sums."""
    sharding = _compat.explicit_sharding(part)
    if sharding is None:
        return ((),) * len(part.shape)
    if sharding.spec.unreduced:
        return None
    entries = tuple(map(names_of, sharding.spec))
    return entries + ((),) * (len(part.shape) - len(entries))
