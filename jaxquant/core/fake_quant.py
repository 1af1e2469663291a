"""Fake quantization: values rounded to what codes could stand for, with gradients for training.

Rounding has no derivative that would teach anything, so gradients pass it straight through (Bengio
et al., arXiv 1308.3432), clipped: a value that the grid cannot reach has none. Where a scale is
learned its gradient is that of LSQ (Esser et al., arXiv 1902.08153). The forward values are those
of `quantize_array` and of the quantized products. Called by `jaxquant.passes.insert_fake_quant`;
each function is one equation of the jaxpr, `fake_codes` or `fake_activation`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.blocks import map_blocks
from jaxquant.core.codes import code_values, encode
from jaxquant.core.primitives.activation import quantize_activation
from jaxquant.core.qtypes import QType
from jaxquant.pallas_kernels.activation import GREATEST, ActQuant


class Grid(NamedTuple):
    """The values that codes can have.

    Attributes:
      qtype: the storage type.
      symmetric: whether integer codes leave out the one that has no opposite.
    """

    qtype: QType
    symmetric: bool = True

    @property
    def reach(self) -> tuple[float, float]:
        """The interval that is rounded; what lies outside is clipped.

        Half a step beyond the outermost values: what is nearer to them than to a next value, if
        there were one, is rounded and not clipped, among it the largest weight of each block.
        """
        qtype = self.qtype
        if qtype.kind == "int":
            low = -qtype.qmax if self.symmetric else qtype.qmin
            return low - qtype.step / 2, qtype.qmax + qtype.step / 2
        if qtype.kind == "float":
            half = _half_step(qtype.storage, qtype.qmax)
            return qtype.qmin - half, qtype.qmax + half
        assert qtype.table is not None
        values = sorted(qtype.table)
        return (3 * values[0] - values[1]) / 2, (3 * values[-1] - values[-2]) / 2


def _half_step(dtype: str, largest: float) -> float:
    return float(jnp.finfo(dtype).eps) * 2.0 ** math.floor(math.log2(largest)) / 2


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def fake_codes(grid: Grid, w: jax.Array, scale: jax.Array, zero_point: Any = None) -> jax.Array:
    """The values of a weight's codes, in units of its scale: ``values * scale`` is the weight.

    With y = w / scale, the derivative of a value is that of y inside the grid's reach and 0
    outside. So ``values * scale`` has the derivative 1 or 0 for w, and for a learned scale
    ``value - y`` inside and ``value`` outside (LSQ, equation 3).

    Args:
      grid: the storage type.
      w: floats.
      scale: one value a block, not 0.
      zero_point: None, or one a block in code units; has no gradient.

    Returns:
      Float32 (float64 for float64 weights) of w's shape.
    """
    compute = jnp.promote_types(jnp.float32, w.dtype)
    values = code_values(encode(w, scale, zero_point, grid.qtype), grid.qtype, compute)
    if zero_point is None:
        return values
    return map_blocks(lambda v, z: v - z, values, zero_point.astype(compute))


@fake_codes.defjvp
def _fake_codes_jvp(
    grid: Grid, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    w, scale, zero_point = primals
    values = fake_codes(grid, w, scale, zero_point)
    scale = scale.astype(values.dtype)
    zero = jnp.zeros_like(scale) if zero_point is None else zero_point.astype(values.dtype)
    low, high = grid.reach

    def reached(x: jax.Array, s: jax.Array, z: jax.Array) -> jax.Array:
        y = x.astype(values.dtype) / s
        return (y + z >= low) & (y + z <= high)

    inside = map_blocks(reached, w, scale, zero)
    # Quotients outside may be beyond all bounds: none of them may meet a zero.
    near = jnp.where(inside, w, 0).astype(values.dtype)
    ratio = map_blocks(lambda x, s: x / s, near, scale)
    moved = map_blocks(lambda x, s: x / s, tangents[0].astype(values.dtype), scale)
    shrunk = map_blocks(lambda y, s, d: y / s * d, ratio, scale, tangents[1].astype(values.dtype))
    return values, jnp.where(inside, moved - shrunk, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def fake_activation(
    act: ActQuant, x: jax.Array, static_scale: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The values of an activation's codes, and their scale: ``values * scale`` is the activation.

    A dynamic scale covers all values and is a constant of the gradient, so ``values * scale`` has
    the derivative 1. With a static one it is 1 inside the reach and 0 outside, and that of the
    scale is as in `fake_codes`.

    Args:
      act: scheme and axes.
      x: floats.
      static_scale: for a static scheme, floats that broadcast against x.

    Returns:
      Floats of x's shape, and of x's rank with size 1 where values share a scale; both float32 (or
      wider).
    """
    codes, scale = quantize_activation(x, act, static_scale=static_scale)
    return codes.astype(scale.dtype), scale


@fake_activation.defjvp
def _fake_activation_jvp(
    act: ActQuant, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    x, static_scale = primals
    values, scale = fake_activation(act, x, static_scale)
    moved = tangents[0].astype(values.dtype) / scale
    if static_scale is None:
        return (values, scale), (moved, jnp.zeros_like(scale))
    high = act_limit(act) + (0.5 if act.integer else _half_step(act.dtype, act_limit(act)))
    inside = jnp.abs(x.astype(values.dtype) / scale) <= high
    ratio = jnp.where(inside, x, 0).astype(values.dtype) / scale
    grown = jnp.broadcast_to(tangents[1].astype(values.dtype), scale.shape)
    return (values, scale), (jnp.where(inside, moved - ratio / scale * grown, 0), grown)


def act_limit(act: ActQuant) -> float:
    """The largest code of an activation."""
    return GREATEST[act.dtype]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """The identity, with a gradient that is multiplied by ``factor``."""
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(
    factor: float, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[0] * np.asarray(factor, primals[0].dtype)
