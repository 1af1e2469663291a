"""The checks behind `QTensor.validate`, which numbers the invariants.

Called by nothing else. A message names the parameter, the invariant and both sides of a mismatch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from jaxquant.pallas_kernels import packing

if TYPE_CHECKING:
    from jaxquant.core.qtensor import QTensor


def check_codes(w: QTensor, name: str) -> None:
    """Invariants 1 and 2: storage dtype and packing."""
    q = w.qtype
    storage = q.unpacked_storage if w.packed_axis is None else q.storage
    if np.dtype(w.codes.dtype) != jnp.dtype(storage):
        raise ValueError(
            f"{name}: invariant 1: {q.name} codes must be {storage}, not {w.codes.dtype} (cast a "
            "tree before it is quantized; afterwards a cast of all its leaves changes the codes)"
        )
    if w.packed_axis is None:
        if w.packed_length is not None:
            raise ValueError(f"{name}: invariant 2: packed_length without packed_axis")
        return
    if not q.packed:
        raise ValueError(f"{name}: invariant 2: {q.name} is never packed")
    if not -w.codes.ndim <= w.packed_axis < 0:
        raise ValueError(
            f"{name}: invariant 2: packed_axis must be in [-{w.codes.ndim}, -1], not"
            f" {w.packed_axis}"
        )
    if w.packed_length is None:
        raise ValueError(f"{name}: invariant 2: packed_axis without packed_length")
    held = w.codes.shape[w.packed_axis]
    if held != packing.packed_size(w.packed_length, q.bits):
        raise ValueError(
            f"{name}: invariant 2: packed axis {w.packed_axis} has {held} bytes;"
            f" {w.packed_length} {q.name} codes take"
            f" {packing.packed_size(w.packed_length, q.bits)}"
        )


def check_scales(w: QTensor, name: str) -> None:
    """Invariants 3 to 10: shapes and dtypes of the parts besides codes; the op's axes and turn."""
    shape = w.shape
    scale_shape = tuple(w.scale.shape)
    if len(scale_shape) != len(shape) or any(
        s < 1 or n % s for n, s in zip(shape, scale_shape, strict=True) if n
    ):
        raise ValueError(
            f"{name}: invariant 3: scale shape {scale_shape} does not divide shape {shape}"
        )
    if w.zero_point is not None:
        if not w.qtype.asymmetric:
            raise ValueError(f"{name}: invariant 4: {w.qtype.name} has no zero point")
        if tuple(w.zero_point.shape) != scale_shape:
            raise ValueError(
                f"{name}: invariant 4: zero_point shape {tuple(w.zero_point.shape)} is not"
                f" the scale's {scale_shape}"
            )
    if w.input_scale is not None:
        given = tuple(w.input_scale.shape)
        if len(given) != len(shape) or any(
            s not in (1, n) for n, s in zip(shape, given, strict=True)
        ):
            raise ValueError(
                f"{name}: invariant 5: input_scale shape {given} must have rank {len(shape)}"
                f" and sizes 1 or those of {shape}"
            )
    for part, dtype in (
        ("dtype", w.dtype),
        ("scale", w.scale.dtype),
        ("input_scale", None if w.input_scale is None else w.input_scale.dtype),
        ("input_factor", None if w.input_factor is None else w.input_factor.dtype),
    ):
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name}: invariant 6: {part} must be floating, not {dtype}")
    if w.input_group is not None and w.input_scale is None and w.input_factor is None:
        raise ValueError(
            f"{name}: invariant 7: input_group {w.input_group!r} without input_scale or "
            "input_factor"
        )
    axes = w.contracted or ()
    if len(set(axes)) < len(axes) or not all(-len(shape) <= axis < 0 for axis in axes):
        raise ValueError(
            f"{name}: invariant 8: contracted {axes} must be different axes in [-{len(shape)}, -1]"
        )
    if w.input_factor is not None:
        given = tuple(w.input_factor.shape)
        divides = all(s >= 1 and n % s == 0 for n, s in zip(shape, given, strict=False))
        if len(given) != len(shape) or not divides:
            raise ValueError(
                f"{name}: invariant 9: input_factor shape {given} does not divide shape {shape}"
            )
    if w.input_turn is not None and (wrong := w.input_turn.check(shape)):
        raise ValueError(f"{name}: invariant 10: input_turn: {wrong}")
    if isinstance(w.scale, type(w)):
        w.scale.validate(f"{name}.scale")
