"""Weights laid out in memory as a platform's kernels read them.

XLA keeps an array's axes in any order in memory. CUDA's kernels read codes with the contracted axes
last (8-bit tensor core instructions can do nothing else); codes that lie so make the transposition
in front of a kernel free, others are transposed at every call. `jaxquant.prepare` moves codes once,
with `lay_out`. Logical shapes and values stay what they were, so nothing else has to know, but for
one case: in front of a loop XLA would move a stacked weight back. There the rewriter's rule for
scans hands it over by `into_scan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from jaxquant.core import _compat
from jaxquant.core.qtensor import QTensor, negative_axes

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Where kernels read the contracted axes last; elsewhere codes are taken as they come.
_CONTRACTED_LAST = ("cuda",)


def contracted_axes(w: QTensor) -> tuple[int, ...]:
    """Negative axes that the weight's product sums over: as noted, else those that share scales."""
    if w.contracted is not None:
        return w.contracted
    return negative_axes([a for a, n in enumerate(w.block_shape) if n > 1], w.ndim)


def memory_order(w: QTensor, platform: str) -> tuple[int, ...]:
    """The axes of the codes, major to minor, as the platform's kernels read them."""
    axes = range(w.ndim)
    if platform not in _CONTRACTED_LAST:
        return tuple(axes)
    last = {axis + w.ndim for axis in contracted_axes(w)}
    return (*(axis for axis in axes if axis not in last), *sorted(last))


def lay_out(w: QTensor, platform: str, *, donate: bool = False) -> QTensor:
    """The weight with its codes in the platform's order; the very same one if they are.

    Args:
      w: of arrays, or of ShapeDtypeStructs, which get the layout if they have a sharding.
      platform: one of `PLATFORMS`.
      donate: the codes may be given up as soon as they are copied.

    Raises:
      TypeError: inside a trace; there arrays have no layout.
    """
    order = memory_order(w, platform)
    codes = _ordered(w.codes, order, donate)
    prepared = platform if platform in _CONTRACTED_LAST else None
    if codes is w.codes and prepared == w.prepared:
        return w
    return w.replace(codes=codes, contracted=contracted_axes(w), prepared=prepared)


def _ordered(codes: Any, order: tuple[int, ...], donate: bool) -> Any:
    if isinstance(codes, jax.ShapeDtypeStruct):
        if codes.sharding is None or _order_of(codes) == order:
            return codes
        form = Format(Layout(order), codes.sharding)
        return jax.ShapeDtypeStruct(codes.shape, codes.dtype, sharding=form)
    if isinstance(codes, jax.core.Tracer):
        raise TypeError("weights are prepared outside of jit and other transformations")
    sharding = codes.sharding if isinstance(codes, jax.Array) else SingleDeviceSharding(
        jax.local_devices()[0]
    )  # fmt: skip
    if isinstance(codes, jax.Array) and _order_of(codes) == order:
        return codes
    return jax.device_put(codes, Format(Layout(order), sharding), donate=donate)


def _order_of(codes: Any) -> tuple[int, ...]:
    """Axes, major to minor, as they lie."""
    form = codes.format
    layout = None if form is None else form.layout
    return tuple(range(len(codes.shape))) if layout is None else tuple(layout.major_to_minor)


def into_scan(w: QTensor) -> tuple[QTensor, Callable[[QTensor], QTensor]]:
    """What of a stacked weight a scan should slice, and the weight again from such a slice.

    XLA chooses the layout of what a loop slices by itself, and copies a weight that lies otherwise,
    all its layers at every call. So a prepared weight enters as an array whose axes *are* in the
    order in memory; 4-bit codes as bytes, because XLA reads a slice of whole bytes where it lies,
    and copies others. For XLA:GPU each step of this is a bitcast. Other weights enter as they are.

    Args:
      w: weight whose first axis is scanned over.

    Returns:
      `(w, back)`: `back` takes a slice, without the first axis.
    """
    order = memory_order(w, w.prepared or "")
    if order == tuple(range(w.ndim)) or order[0] != 0:
        return w, lambda part: part
    as_bytes = w.codes.dtype == jnp.int4 and w.codes.shape[order[-1]] % 2 == 0
    inverse = tuple(int(axis) for axis in np.argsort([axis - 1 for axis in order[1:]]))

    def enter(codes: jax.Array) -> jax.Array:
        codes = lax.transpose(codes, order)
        if not as_bytes:
            return codes
        pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
        return lax.bitcast_convert_type(pairs, jnp.int8)

    def leave(codes: jax.Array) -> jax.Array:
        if as_bytes:
            pairs = lax.bitcast_convert_type(codes, jnp.int4)
            codes = pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        return lax.transpose(codes, inverse)

    def back(part: QTensor) -> QTensor:
        return part.replace(codes=_permuting(leave, part.codes, inverse))

    return w.replace(codes=_permuting(enter, w.codes, order)), back


def _permuting(
    move: Callable[[jax.Array], jax.Array], codes: jax.Array, order: tuple[int, ...]
) -> jax.Array:
    """`move(codes)`; on an explicit mesh axes stay split as they are, in their new order."""
    sharding = _compat.permuted_sharding(jax.typeof(codes), order)
    if sharding is None:
        return move(codes)
    return jax.sharding.auto_axes(move, out_sharding=sharding)(codes)
