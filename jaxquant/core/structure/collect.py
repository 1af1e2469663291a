"""A weight of which each device of a `shard_map` has a part, put together: its codes travel."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from jaxquant.core import _compat
from jaxquant.core.qtensor import QTensor
from jaxquant.core.structure.basic import (
    Part,
    Unstructured,
    kept_axes,
    map_parts,
    moved_layout,
    on_part,
    unpacked_if,
)


def all_gather(w: QTensor, axis_name: Sequence[str], dimension: int) -> QTensor:
    """As `lax.all_gather(..., axis=dimension, tiled=True)` over the mesh axes `axis_name`.

    A part with one value along the dimension is not gathered where its type says that all devices
    have the same (`check_vma=True`, the default of `jax.shard_map`); it becomes one value a device
    otherwise, which stands for the same weight.

    Raises:
      Unstructured: the input is scaled or turned in a way that would differ from device to device.
    """
    names = frozenset(axis_name)
    types_say = bool(names & _compat.varying_axes(w.codes))
    if not types_say and (w.input_scale is not None or w.input_factor is not None):
        raise Unstructured(
            "it is gathered over devices, and only with check_vma=True is it known that all of "
            "them scale its input alike"
        )
    if w.input_turn is not None and w.input_turn.axis + w.ndim == dimension:
        raise Unstructured("it is gathered along the axis along which its input is turned")
    w = unpacked_if(w, (dimension,))

    def gather_part(part: Part) -> Part:
        if types_say and part.shape[dimension] == 1 and not _varies(part, names):
            return part
        return on_part(part, all_gather, _gather, axis_name, dimension)

    return map_parts(
        w,
        gather_part,
        _gather(w.codes, axis_name, dimension),
        mesh_layout=moved_layout(w, [None if d == dimension else d for d in range(w.ndim)]),
        **kept_axes(w, lambda axis: axis - w.ndim),
    )


def _gather(x: jax.Array, axis_name: Sequence[str], dimension: int) -> jax.Array:
    return lax.all_gather(x, tuple(axis_name), axis=dimension, tiled=True)


def _varies(part: Part, names: frozenset[str]) -> bool:
    arrays = [part.codes, part.scale] if isinstance(part, QTensor) else [part]
    return any(names & _compat.varying_axes(x) for x in arrays)
