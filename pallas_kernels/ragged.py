"""A product of rows grouped by expert with quantized experts, as a kernel takes it.

Used by `jaxquant.pallas_kernels.ragged_dispatch`: `flatten_ragged` says what the product is as a
`RaggedProblem`, or why it is none; a platform makes a `Kernel` of that; a `RaggedProduct` runs it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.as_matrix import Kernel, Weight
from jaxquant.pallas_kernels.blocks import spread_axis
from jaxquant.pallas_kernels.problem import (
    E2M1,
    PACKED,
    STORAGE,
    MatmulProblem,
    RaggedProblem,
    Unsupported,
)


def flatten_ragged(
    x_shape: tuple[int, ...],
    weight: Weight,
    act: ActQuant | None,
    out_dtype: Any,
    plain: bool,
) -> RaggedProblem:
    """The product as rows [m, k], in order of their experts, times experts [experts, k, n].

    Args:
      x_shape: shape of the rows.
      weight: the experts' static side.
      act: how the rows are quantized first, or None.
      out_dtype: dtype of the result.
      plain: whether the product has that form.

    Raises:
      Unsupported: it is no such product; says why.
    """
    if not plain:
        raise Unsupported("the product is none of rows [m, k] and experts [experts, k, n]")
    if weight.codes not in STORAGE:
        raise Unsupported(f"no kernel reads {weight.codes} codes")
    if weight.codes in PACKED and weight.packed_axis != 1:
        raise Unsupported("codes are packed along another axis than the contracted one")
    (m, k), (experts, _, n) = x_shape, weight.shape
    if not m * n * k * experts:
        raise Unsupported("an operand is empty")
    for axis, what in ((0, "experts"), (2, "columns")):
        if weight.scale_shape[axis] not in (1, weight.shape[axis]):
            raise Unsupported(f"several {what} share a scale, but not all")
    product = MatmulProblem(
        m,
        k,
        n,
        weight.codes,
        "bfloat16" if act is None else act.dtype,
        k // weight.scale_shape[1],
        weight.zero_point,
        x_scale=act is not None,
        out_dtype=jnp.dtype(out_dtype).name,
        e2m1=weight.table == E2M1,
    )
    return RaggedProblem(product, experts)


@dataclasses.dataclass(frozen=True)
class RaggedProduct:
    """Runs a kernel: quantizes the rows if need be, and spreads scales that experts share."""

    problem: RaggedProblem
    kernel: Kernel
    weight: Weight
    act: ActQuant | None

    def __call__(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        input_scale: jax.Array | None,
        group_sizes: jax.Array,
        interpret: Any = False,
    ) -> jax.Array:
        """The product [m, n]; rows behind the last group are zero.

        Args:
          x: floats [m, k].
          quantized: the codes and scale of x where they are at hand.
          codes: as stored.
          scale: floats of the weight's rank.
          zero_point: None, or of the scale's shape.
          input_scale: the static scale of x, one value, or None.
          group_sizes: integers [experts].
          interpret: as for pl.pallas_call.
        """
        act, x_scale = self.act, None
        if act is not None:
            if quantized is not None:
                x, x_scale = quantized
            elif act.static or self.kernel.quantize is None or tuple(act.reduce_axes) != (1,):
                static = None if input_scale is None else input_scale.reshape(1, 1)
                x, x_scale = quantize_activation(x, act, static)
            else:
                x, x_scale = self.kernel.quantize(x, act.dtype, interpret=interpret)
            x_scale = jnp.broadcast_to(x_scale, (x.shape[0], 1)).astype(jnp.float32)
        return self.kernel.multiply(
            x,
            codes.swapaxes(1, 2) if self.kernel.k_minor else codes,
            self._spread(scale),
            None if zero_point is None else self._spread(zero_point),
            group_sizes=group_sizes,
            x_scale=x_scale,
            table=self.weight.table,
            interpret=interpret,
        )

    @property
    def moves_codes(self) -> bool:
        """Whether codes are transposed at every call."""
        return self.kernel.k_minor and not self.weight.prepared

    def _spread(self, part: jax.Array) -> jax.Array:
        """Scales or zero points as [experts, k / group, n]."""
        for axis in (0, 2):
            part = spread_axis(part, axis, self.weight.shape[axis])
        return part
