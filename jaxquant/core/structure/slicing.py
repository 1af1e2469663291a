"""Slices and concatenations: exact as long as they keep to the borders of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.layout import MeshLayout
from jaxquant.core.qtensor import QTensor
from jaxquant.core.structure.basic import (
    Part,
    Unstructured,
    check_growth,
    kept_axes,
    map_parts,
    moved_layout,
    on_part,
    unpacked,
    unpacked_if,
)


def slice(  # noqa: A001
    w: QTensor, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None = None
) -> QTensor:
    """As `lax.slice`.

    Raises:
      Unstructured: a slice cuts groups apart.
    """
    shape = w.shape
    strides = tuple(strides or (1,) * len(shape))
    cuts = list(zip(starts, limits, strides, strict=True))
    w = unpacked_if(w, [i for i, cut in enumerate(cuts) if cut != (0, shape[i], 1)])
    coded = [(0, n, 1) if cut == (0, m, 1) else cut
             for cut, m, n in zip(cuts, shape, w.codes.shape, strict=True)]  # fmt: skip

    def cut_part(part: Part) -> Part:
        inner = [
            _cut_blocks(axis, n, size, *cut)
            for axis, (n, size, cut) in enumerate(zip(shape, part.shape, cuts, strict=True))
        ]
        return on_part(part, slice, lax.slice, *map(tuple, zip(*inner, strict=True)))

    if not shape:
        return w
    _refuse_cut_turn(w, [limit - start for start, limit, _ in cuts])
    codes = lax.slice(w.codes, *map(tuple, zip(*coded, strict=True)))
    layout = _sliced_layout(w, codes.shape)
    own = kept_axes(w, lambda axis: axis - w.ndim)
    return map_parts(w, cut_part, codes, mesh_layout=layout, **own)


def _cut_blocks(
    axis: int, n: int, size: int, start: int, limit: int, stride: int
) -> tuple[int, int, int]:
    """The slice of a part's axis of `size` that serves [start:limit:stride] of n elements."""
    if size == 1:
        return 0, 1, 1
    block = n // size
    count = -(-(limit - start) // stride)
    first = start // block
    if block == 1:
        return start, limit, stride
    if stride == 1 and start % block == 0 and limit % block == 0:
        return first, limit // block, 1
    if (start + (count - 1) * stride) // block == first:
        return first, first + 1, 1
    if stride % block == 0:
        step = stride // block
        return first, first + (count - 1) * step + 1, step
    raise Unstructured(f"a slice [{start}:{limit}:{stride}] of axis {axis} cuts groups of {block}")


def dynamic_slice(w: QTensor, starts: Sequence[Any], sizes: Sequence[int]) -> QTensor:
    """As the dynamic_slice primitive: starts, also negative ones, are clamped so that it fits.

    Raises:
      Unstructured: the start along a grouped axis is only known at run time.
    """
    shape, sizes = w.shape, tuple(sizes)
    known = [_static_start(s, n, z) for s, n, z in zip(starts, shape, sizes, strict=True)]
    if all(start is not None for start in known):
        firsts = [int(start) for start in known if start is not None]
        return slice(w, firsts, [a + z for a, z in zip(firsts, sizes, strict=True)])
    w = unpacked_if(w, [i for i, (n, z) in enumerate(zip(shape, sizes, strict=True)) if n != z])
    index_dtype = jnp.result_type(
        jnp.int32, *(s for s, k in zip(starts, known, strict=True) if k is None)
    )
    zero = jnp.zeros((), index_dtype)
    starts = [
        jnp.clip(jnp.asarray(s).astype(index_dtype), 0, n - z)
        for s, n, z in zip(starts, shape, sizes, strict=True)
    ]

    def cut(part: Part) -> Part:
        part_starts, part_sizes = [], []
        for axis, (size, n, z) in enumerate(zip(part.shape, shape, sizes, strict=True)):
            if size == 1 or z == n:
                part_starts.append(zero)
                part_sizes.append(size)
            elif size == n:
                part_starts.append(starts[axis])
                part_sizes.append(z)
            else:
                raise Unstructured(
                    f"where a slice of axis {axis} starts is only known at run time, and may cut"
                    f" groups of {n // size}"
                )
        return on_part(part, dynamic_slice, lax.dynamic_slice, part_starts, tuple(part_sizes))

    code_sizes = [
        held if n == z else z for held, n, z in zip(w.codes.shape, shape, sizes, strict=True)
    ]
    _refuse_cut_turn(w, sizes)
    codes = lax.dynamic_slice(w.codes, starts, code_sizes)
    layout = _sliced_layout(w, sizes)
    return map_parts(w, cut, codes, mesh_layout=layout, **kept_axes(w, lambda axis: axis - w.ndim))


def _sliced_layout(w: QTensor, sizes: Sequence[int]) -> MeshLayout | None:
    """A slice lies as the whole does, but for axes of which it is one element."""
    return moved_layout(w, [axis if n > 1 else None for axis, n in enumerate(sizes)])


def _refuse_cut_turn(w: QTensor, sizes: Sequence[int]) -> None:
    if w.input_turn is not None and sizes[w.input_turn.axis] != w.shape[w.input_turn.axis]:
        raise Unstructured("a slice cuts the axis along which its input is turned")


def _static_start(start: Any, n: int, size: int) -> int | None:
    """The clamped start if it is known while tracing."""
    if size == n:
        return 0
    if isinstance(start, int | np.integer | np.ndarray):
        return int(np.clip(int(start), 0, n - size))
    return None


def concatenate(ws: Sequence[QTensor], dimension: int) -> QTensor:
    """As `lax.concatenate`; scales are repeated where the operands' blocks differ.

    Raises:
      Unstructured: the operands differ in type or scheme, or in what is done to the input.
    """
    first, d = ws[0], dimension % ws[0].ndim
    _check_alike(ws)
    if first.input_turn is not None and first.input_turn.axis + first.ndim == d:
        raise Unstructured("weights are joined along the axis along which their input is turned")
    packing = {(w.packed_axis, w.packed_axis == d - w.ndim) for w in ws}
    if len(packing) > 1 or any(along for _, along in packing):
        ws = [unpacked(w) for w in ws]
    blocks = [w.block_shape for w in ws]
    common = [math.gcd(*sizes) for sizes in zip(*blocks, strict=True)]
    total = [sum(w.shape[d] for w in ws) if i == d else n for i, n in enumerate(first.shape)]
    joined = _join_scales(ws, common, d)
    size = math.prod(n // b for n, b in zip(total, common, strict=True))
    check_growth(sum(w.scale.size for w in ws), size, math.prod(total))
    zero_points = [_repeat(w.zero_point, w.shape, common) for w in ws if w.zero_point is not None]
    return ws[0].replace(
        codes=lax.concatenate([w.codes for w in ws], d),
        scale=joined,
        zero_point=lax.concatenate(zero_points, d) if zero_points else None,
        input_scale=_join_inputs(ws, "input_scale", d),
        input_factor=_join_inputs(ws, "input_factor", d),
        contracted=None,
        prepared=None,
        mesh_layout=first.mesh_layout if len({w.mesh_layout for w in ws}) == 1 else None,
    )


def _check_alike(ws: Sequence[QTensor]) -> None:
    first = ws[0]
    for w in ws[1:]:
        for field in ("qtype", "dtype", "act", "op_rules", "input_turn"):
            if getattr(w, field) != getattr(first, field):
                raise Unstructured(
                    f"it is joined with a weight whose {field} is {getattr(w, field)}, not"
                    f" {getattr(first, field)}"
                )
        for part in ("zero_point", "input_scale", "input_factor"):
            if (getattr(w, part) is None) != (getattr(first, part) is None):
                raise Unstructured(f"it is joined with a weight with another kind of {part}")


def _join_scales(ws: Sequence[QTensor], blocks: Sequence[int], dimension: int) -> Part:
    scales = [w.scale for w in ws]
    if all(isinstance(s, QTensor) for s in scales) and all(
        tuple(w.block_shape) == tuple(blocks) for w in ws
    ):
        try:
            return concatenate(scales, dimension)
        except Unstructured:
            pass
    plain = [s.dequantize() if isinstance(s, QTensor) else s for s in scales]
    dtype = jnp.result_type(*plain)
    spread = [_repeat(s, w.shape, blocks).astype(dtype) for s, w in zip(plain, ws, strict=True)]
    return lax.concatenate(spread, dimension)


def _repeat(part: jax.Array, shape: Sequence[int], blocks: Sequence[int]) -> jax.Array:
    """Repeats a part's values to one for each block of the sizes given."""
    for axis, (n, b) in enumerate(zip(shape, blocks, strict=True)):
        times = n // b // part.shape[axis]
        if times > 1:
            part = jnp.repeat(part, times, axis=axis)
    return part


def _join_inputs(ws: Sequence[QTensor], part: str, dimension: int) -> jax.Array | None:
    """The input scales, or input factors, of weights that are stacked along an axis."""
    found = [getattr(w, part) for w in ws]
    if found[0] is None:
        return None
    stacked = all(s.shape[dimension] == w.shape[dimension] for s, w in zip(found, ws, strict=True))
    others = {(*s.shape[:dimension], *s.shape[dimension + 1 :]) for s in found}
    if not stacked or len(others) > 1:
        raise Unstructured(f"weights with {part.replace('_', ' ')}s of their own are joined")
    return lax.concatenate(found, dimension)
