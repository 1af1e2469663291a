"""Quantized products as Pallas kernels: what a QTensor is to `jaxquant.pallas_kernels.dispatch`.

Called by the lowering of `quantized_dot_general` on TPU and GPU, and by the plan; both ask
`choose_kernel`, so that a plan made for a place says what runs there.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core import _compat
from jaxquant.core.primitives.splits import placed
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Choice, Implementation, Place, choose
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.siblings import SiblingProducts


@dataclasses.dataclass(frozen=True)
class Product:
    """One product with a QTensor, as far as the choice of an implementation asks.

    Attributes:
      x: the activation or its aval.
      w: the weight; its leaves may be avals.
      axes: which axis does what.
      act: how x is quantized first, or None.
      out_dtype: dtype of the result.
      precision: as for lax.dot_general.
      out_sharding: the result's sharding type, or None.
    """

    x: Any
    w: QTensor
    axes: DotAxes
    act: ActQuant | None
    out_dtype: Any
    precision: Any = None
    out_sharding: Any = None


def choose_kernel(
    product: Product, place: Place, implementation: Implementation | None = None
) -> Choice:
    """The kernel for a product, or XLA and why.

    Args:
      product: what is multiplied.
      place: where the program runs.
      implementation: forces one.

    Raises:
      ValueError: the forced one does not fit.
    """
    x, w = product.x, product.w
    place = placed(place, x, w.codes, w.mesh_layout, product.axes, product.out_sharding)
    return choose(
        tuple(x.shape),
        jnp.promote_types(x.dtype, w.dtype),
        static_side(w, place),
        product.axes,
        product.act,
        place,
        out_dtype=product.out_dtype,
        precision=product.precision,
        implementation=implementation,
    )


def static_side(w: QTensor, place: Place) -> Weight:
    """What dispatch is told of a weight; its leaves may be avals."""
    codes = jnp.dtype(w.codes.dtype).name
    if w.packed_axis is not None:
        codes = w.qtype.name
    elif w.qtype.table is not None:
        codes = "table4"
    return Weight(
        codes,
        w.shape,
        tuple(w.scale.shape),
        w.zero_point is not None,
        w.qtype.table,
        None if w.packed_axis is None else w.packed_axis + w.ndim,
        w.prepared == place.platform,
    )


def run_kernel(
    choice: Choice,
    x: jax.Array,
    quantized: Sequence[jax.Array],
    w: QTensor,
    *extras: jax.Array,
) -> jax.Array:
    """Runs the kernel of a choice on a QTensor's parts; `extras` are the operands behind them."""
    assert choice.run is not None
    pair = (quantized[0], quantized[1]) if quantized else None
    return choice.run(
        x.astype(jnp.promote_types(x.dtype, w.dtype)),
        pair,
        w.codes,
        _float_scale(w),
        w.zero_point,
        w.input_scale,
        *extras,
    )


def run_joined(
    joined: SiblingProducts,
    x: jax.Array,
    quantized: Sequence[jax.Array],
    weights: Sequence[QTensor],
) -> list[jax.Array]:
    """Runs one launch for several QTensors."""
    pair = (quantized[0], quantized[1]) if quantized else None
    parts = [kernel_parts(w) for w in weights]
    dtype = jnp.promote_types(x.dtype, weights[0].dtype)
    return joined(x.astype(dtype), pair, parts)


def kernel_parts(w: QTensor) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes, scale and zero point of a weight as kernels take them."""
    return w.codes, _float_scale(w), w.zero_point


def _float_scale(w: QTensor) -> jax.Array:
    return w.scale.dequantize() if isinstance(w.scale, QTensor) else w.scale


_planned: contextvars.ContextVar[Place | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def planned_for(place: Place | None) -> Iterator[None]:
    """Plans that are made within it are for this place; None changes nothing."""
    token = _planned.set(place or _planned.get())
    try:
        yield
    finally:
        _planned.reset(token)


def default_place() -> Place:
    """Where a plan is read: as `planned_for` says, else devices of the default kind."""
    place = _planned.get()
    if place is not None:
        return place
    device = jax.devices()[0]
    return Place(_compat.lowering_platform(device.client), device.device_kind)
