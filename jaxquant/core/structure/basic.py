"""Structural operations that keep blocks whole, and the helpers all structural operations share.

A part is what a QTensor has besides codes: scale, zero point, input scale, input factor. Its sizes
divide the logical sizes, axis by axis. Parts are arrays, except a scale that is itself a QTensor;
operations on such a scale fall back on its dequantized values where they have to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.layout import MeshLayout
from jaxquant.core.qtensor import QTensor

Part = jax.Array | QTensor


class Unstructured(Exception):  # noqa: N818  (a condition that is handled, not a fault)
    """An operation that codes and scales cannot follow; the message is the reason."""


def map_parts(w: QTensor, fn: Callable[[Any], Any], codes: jax.Array, **static: Any) -> QTensor:
    """The weight with new codes and `fn` applied to its other parts.

    Which axes its op sums over, that its codes lie ready for that, and how it lies on a mesh is
    forgotten unless `static` says so.

    Raises:
      Unstructured: the input is turned, and `static` does not say where the turned axis is now.
    """
    if w.input_turn is not None and "input_turn" not in static:
        raise Unstructured("its input is turned along an axis that would not stay whole")
    parts = {
        name: None if getattr(w, name) is None else fn(getattr(w, name))
        for name in ("scale", "zero_point", "input_scale", "input_factor")
    }
    forgotten = {"contracted": None, "prepared": None, "mesh_layout": None}
    return w.replace(codes=codes, **parts, **{**forgotten, **static})


def kept_axes(w: QTensor, move: Callable[[int], int]) -> dict[str, Any]:
    """`map_parts`'s static arguments where `move` says what becomes of an axis.

    Axes go in from the front and come out negative.
    """
    return {**kept_turn(w, move), **_kept_contracted(w, move)}


def kept_turn(w: QTensor, move: Callable[[int], int]) -> dict[str, Any]:
    """The part of `kept_axes` that must not be forgotten: how the input is turned."""
    return {} if w.input_turn is None else {"input_turn": w.input_turn.moved(move, w.ndim)}


def _kept_contracted(w: QTensor, move: Callable[[int], int]) -> dict[str, Any]:
    if w.contracted is None:
        return {}
    axes = tuple(sorted(move(axis + w.ndim) for axis in w.contracted))
    return {"contracted": axes, "prepared": w.prepared}


def moved_layout(w: QTensor, sources: Sequence[int | None]) -> MeshLayout | None:
    """How the weight lies on a mesh once its axes are these; None stands for one that is whole."""
    return None if w.mesh_layout is None else w.mesh_layout.moved(sources, w.ndim)


def on_part(
    part: Part, structural: Callable[..., Any], plain: Callable[..., Any], *args: Any
) -> Any:
    """Applies an operation to a part: `structural` to a QTensor if that works, else `plain`."""
    if isinstance(part, QTensor):
        try:
            return structural(part, *args)
        except Unstructured:
            part = part.dequantize()
    return plain(part, *args)


def unpacked(w: QTensor) -> QTensor:
    """The same weight with bit-packed codes as int8; others as they are."""
    if w.packed_axis is None:
        return w
    return w.replace(codes=w.unpacked_codes(), packed_axis=None, packed_length=None)


def unpacked_if(w: QTensor, axes: Sequence[int]) -> QTensor:
    """`unpacked(w)` if its packed axis is one of `axes` (not negative)."""
    touched = w.packed_axis is not None and w.packed_axis + w.ndim in axes
    return unpacked(w) if touched else w


def check_growth(before: int, after: int, codes: int) -> None:
    """Raises Unstructured if that many scales would defeat the purpose of quantized storage."""
    if after > before and 4 * after > codes:
        raise Unstructured(
            f"its {before} scales would have to be repeated to {after}, for {codes} codes"
        )


def astype(w: QTensor, dtype: Any) -> QTensor:
    """Another float dtype to stand for.

    Codes are read at that precision directly: going to a wider dtype, the values are not first
    rounded to the narrower one.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unstructured(f"it is converted to {np.dtype(dtype).name}")
    return w.replace(dtype=np.dtype(dtype))


def scale_by(w: QTensor, factor: Any) -> QTensor:
    """The weight times a scalar, which goes into the scales (to rounding, not exact).

    The scales become float32, or float64 for a weight that stands for float64.
    """
    wide = jnp.promote_types(w.dtype, jnp.float32)

    def scaled(scale: Part) -> Part:
        if isinstance(scale, QTensor):
            return scale.replace(scale=scaled(scale.scale))
        dtype = jnp.promote_types(scale.dtype if scale.dtype.itemsize > 1 else "float32", wide)
        return scale.astype(dtype) * jnp.asarray(factor).astype(dtype)

    return w.replace(scale=scaled(w.scale))


def transpose(w: QTensor, permutation: Sequence[int]) -> QTensor:
    """As `lax.transpose`."""
    permutation = tuple(permutation)
    packed = w.packed_axis
    if packed is not None:
        packed = permutation.index(packed + w.ndim) - w.ndim
    return map_parts(
        w,
        lambda part: on_part(part, transpose, lax.transpose, permutation),
        lax.transpose(w.codes, permutation),
        packed_axis=packed,
        mesh_layout=moved_layout(w, permutation),
        **kept_axes(w, lambda axis: permutation.index(axis) - w.ndim),
    )


def broadcast_in_dim(w: QTensor, shape: Sequence[int], dimensions: Sequence[int]) -> QTensor:
    """As `lax.broadcast_in_dim`; a scale is not repeated along new or widened axes."""
    shape, dimensions = tuple(shape), tuple(dimensions)
    old = w.shape
    w = unpacked_if(w, [i for i, d in enumerate(dimensions) if old[i] != shape[d]])
    wide, packed = list(shape), w.packed_axis
    if packed is not None:
        packed = dimensions[packed + w.ndim] - len(shape)
        wide[packed] = w.codes.shape[w.packed_axis]

    def spread(part: Part) -> Part:
        thin = [1] * len(shape)
        for size, d in zip(part.shape, dimensions, strict=True):
            thin[d] = size
        return on_part(part, broadcast_in_dim, lax.broadcast_in_dim, tuple(thin), dimensions)

    codes = lax.broadcast_in_dim(w.codes, wide, dimensions)
    own = kept_axes(w, lambda axis: dimensions[axis] - len(shape))
    sources: list[int | None] = [None] * len(shape)
    for axis, d in enumerate(dimensions):
        sources[d] = axis if old[axis] == shape[d] else None
    own["mesh_layout"] = moved_layout(w, sources)
    return map_parts(w, spread, codes, packed_axis=packed, **own)


def squeeze(w: QTensor, dimensions: Sequence[int]) -> QTensor:
    """As `lax.squeeze`."""
    gone = {d % w.ndim for d in dimensions}
    w = unpacked_if(w, tuple(gone))
    packed = w.packed_axis
    if packed is not None:
        packed += sum(d > packed + w.ndim for d in gone)
    axes = tuple(sorted(gone))

    def move(axis: int) -> int:
        return axis - w.ndim + sum(d > axis for d in gone)

    own = kept_turn(w, move)  # a turned axis is longer than one
    if w.contracted is not None and gone.isdisjoint(axis + w.ndim for axis in w.contracted):
        own = kept_axes(w, move)
    return map_parts(
        w,
        lambda part: on_part(part, squeeze, lax.squeeze, axes),
        lax.squeeze(w.codes, axes),
        packed_axis=packed,
        mesh_layout=moved_layout(w, [axis for axis in range(w.ndim) if axis not in gone]),
        **own,
    )


def expand_dims(w: QTensor, dimensions: Sequence[int]) -> QTensor:
    """As `lax.expand_dims`: new axes of size 1 at these places of the result."""
    ndim = w.ndim + len(dimensions)
    new = {d % ndim for d in dimensions}
    old = [d for d in range(ndim) if d not in new]
    shape = [1] * ndim
    for size, d in zip(w.shape, old, strict=True):
        shape[d] = size
    return broadcast_in_dim(w, shape, old)


def rev(w: QTensor, dimensions: Sequence[int]) -> QTensor:
    """As `lax.rev`."""
    dimensions = tuple(dimensions)
    w = unpacked_if(w, dimensions)
    whole = w.input_turn is not None and w.input_turn.axis + w.ndim not in dimensions
    own = kept_turn(w, lambda axis: axis - w.ndim) if whole else {}
    return map_parts(
        w,
        lambda part: on_part(part, rev, lax.rev, dimensions),
        lax.rev(w.codes, dimensions),
        mesh_layout=w.mesh_layout,
        **own,
    )
