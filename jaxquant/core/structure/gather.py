"""Gather: rows of an embedding, one expert, one layer, without reading the rest.

The same gather is applied to every part, with its indices divided by the block sizes. JAX's
default mode fills what is out of bounds with NaN, which integer codes cannot hold: there the scale
becomes NaN, so that the result is what the float gather gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.qtensor import QTensor
from jaxquant.core.structure.basic import (
    Part,
    Unstructured,
    map_parts,
    moved_layout,
    unpacked_if,
)
from jaxquant.core.structure.pick import pick_rows


def gather(
    w: QTensor,
    indices: jax.Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    *,
    mode: Any = None,
    fill_value: Any = None,
    indices_are_sorted: bool = False,
    unique_indices: bool = False,
) -> QTensor:
    """As `lax.gather`, whose arguments these are.

    Raises:
      Unstructured: a gathered slice may cut groups, or a fill value is neither NaN nor 0.
    """
    shape, dn = w.shape, dimension_numbers
    mode = lax.GatherScatterMode.from_any(mode)
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    if fills and fill_value is not None and not (fill_value == 0 or math.isnan(fill_value)):
        raise Unstructured(f"what is out of bounds is filled with {fill_value}")
    hints = {"indices_are_sorted": indices_are_sorted, "unique_indices": unique_indices}
    # Out of bounds: codes are clamped, the scale is masked below.
    inner_mode = lax.GatherScatterMode.CLIP if fills else mode

    touched = {*dn.start_index_map, *dn.operand_batching_dims} | {
        axis for axis, (n, z) in enumerate(zip(shape, slice_sizes, strict=True)) if n != z
    }
    w = unpacked_if(w, sorted(touched))
    packed, code_sizes = w.packed_axis, list(slice_sizes)
    if packed is not None:
        code_sizes[packed] = w.codes.shape[packed]
        packed = _result_axis(packed + w.ndim, w.ndim, dn) - _result_ndim(indices, dn)
    codes = lax.gather(w.codes, indices, dn, tuple(code_sizes), mode=inner_mode, **hints)
    if indices.dtype.itemsize < 4:  # sizes and blocks may not fit
        indices = indices.astype(jnp.int32)

    def gathered(part: Part) -> Part:
        return _gather_part(part, shape, indices, dn, slice_sizes, inner_mode)

    sources: list[int | None] = [None] * codes.ndim
    for axis in sorted(set(range(len(shape))) - touched - {*dn.collapsed_slice_dims}):
        sources[_result_axis(axis, len(shape), dn)] = axis
    layout = moved_layout(w, sources)
    result = map_parts(w, gathered, codes, packed_axis=packed, mesh_layout=layout)
    if not fills:
        return result
    inside = _in_bounds(shape, indices, dn, slice_sizes)
    return _masked(result, inside, dn, 0.0 if fill_value == 0 else math.nan)


def _gather_part(
    part: Part,
    shape: Sequence[int],
    indices: jax.Array,
    dn: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    mode: lax.GatherScatterMode,
) -> Part:
    """The values of a part that serve the gathered elements."""
    sizes: list[int] = []
    columns = [indices[..., k] for k in range(indices.shape[-1])]
    depends = bool(dn.operand_batching_dims)
    for axis, (n, size, z) in enumerate(zip(shape, part.shape, slice_sizes, strict=True)):
        block = n // size
        if axis in dn.operand_batching_dims:
            part = _full_axis(part, axis, n)
            sizes.append(1)
        elif axis not in dn.start_index_map:
            if size != 1 and z % block and z > block:
                raise Unstructured(f"a gather of {z} along axis {axis} cuts groups of {block}")
            sizes.append(1 if size == 1 else max(1, z // block))
        else:
            k = dn.start_index_map.index(axis)
            if size == 1 or z == n:  # clamped to 0
                columns[k] = jnp.zeros_like(columns[k])
                sizes.append(size)
            elif block == 1 or z == 1:
                clamped = jnp.clip(columns[k], 0, n - z)
                columns[k] = clamped // jnp.asarray(block, clamped.dtype)
                sizes.append(z)
                depends = True
            else:
                raise Unstructured(f"a gather of {z} along axis {axis} cuts groups of {block}")
    new_indices = jnp.stack(columns, axis=-1) if columns else indices
    if not depends:  # the same for every index: one value serves all
        new_indices = jnp.zeros((*(1,) * (indices.ndim - 1), len(columns)), indices.dtype)
    if isinstance(part, QTensor):
        try:
            return gather(part, new_indices, dn, sizes, mode=mode)
        except Unstructured:
            part = part.dequantize()
    rows = lax.GatherDimensionNumbers((indices.ndim - 1,), (0,), (0,))
    clamps = mode in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if dn == rows and sizes == [1, part.shape[-1]] and depends and clamps:
        return pick_rows(part, new_indices[..., 0])
    return lax.gather(part, new_indices, dn, tuple(sizes), mode=mode)


def _full_axis(part: Part, axis: int, n: int) -> Part:
    """The part with one value for each of the n indices of an axis."""
    if part.shape[axis] == n:
        return part
    part = part.dequantize() if isinstance(part, QTensor) else part
    return jnp.repeat(part, n // part.shape[axis], axis=axis)


def _in_bounds(
    shape: Sequence[int],
    indices: jax.Array,
    dn: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
) -> jax.Array:
    """Whether each index vector's whole slice lies inside: bool of the indices' batch shape."""
    inside = jnp.ones(indices.shape[:-1], bool)
    for k, axis in enumerate(dn.start_index_map):
        last = shape[axis] - slice_sizes[axis]
        inside &= (indices[..., k] >= 0) & (indices[..., k] <= last)
    return inside


def _masked(
    w: QTensor, inside: jax.Array, dn: lax.GatherDimensionNumbers, fill_value: float
) -> QTensor:
    """Scales of what is out of bounds become NaN or 0, which makes its values so."""
    scale = w.scale.dequantize() if isinstance(w.scale, QTensor) else w.scale
    if scale.dtype.itemsize == 1:  # float8_e8m0fnu has no zero
        scale = scale.astype(jnp.float32)
    mask = lax.expand_dims(inside, dn.offset_dims)
    zero_point = w.zero_point
    scale = jnp.where(mask, scale, jnp.asarray(fill_value, scale.dtype))
    if zero_point is not None:
        zero_point = jnp.broadcast_to(zero_point, scale.shape)
    return w.replace(scale=scale, zero_point=zero_point)


def _result_ndim(indices: jax.Array, dn: lax.GatherDimensionNumbers) -> int:
    return indices.ndim - 1 + len(dn.offset_dims)


def _result_axis(axis: int, ndim: int, dn: lax.GatherDimensionNumbers) -> int:
    """Where an operand axis that is kept whole ends up in the result."""
    gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    kept = [i for i in range(ndim) if i not in gone]
    return dn.offset_dims[kept.index(axis)]
