"""Products with batch axes, one weight for each element: a kernel for one of them, mapped over all.

Used by `jaxquant.pallas_kernels.dispatch` for an einsum over experts, say, or a vmapped model:
`one_element` says what each product is, a platform makes a `Kernel` of that, and a `BatchedProduct`
maps it over the batch, which becomes the first axis of the kernel's grid.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.activation import quantize_activation
from jaxquant.pallas_kernels.as_matrix import MatrixProduct, Weight
from jaxquant.pallas_kernels.blocks import spread_axis
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import Unsupported


def one_element(
    x_shape: tuple[int, ...], weight: Weight, axes: DotAxes
) -> tuple[tuple[int, ...], Weight, DotAxes]:
    """One product of a batch: shape of its x, its weight, and which axis does what.

    Args:
      x_shape: shape of the whole activation.
      weight: the whole weight's static side.
      axes: of the whole product.

    Raises:
      Unsupported: an element of the weight is not stored in one piece, or shares blocks of scales
        with some of the others; says why.
    """
    count = len(axes.w_batch)
    if sorted(axes.w_batch) != list(range(count)):
        raise Unsupported(
            f"batch axes {axes.w_batch} of the weight are not its first: it would have to be copied"
        )
    for axis in axes.w_batch:
        if weight.scale_shape[axis] not in (1, weight.shape[axis]):
            raise Unsupported(f"scales have blocks along batch axis {axis} of the weight")
    packed = weight.packed_axis
    element = dataclasses.replace(
        weight,
        shape=weight.shape[count:],
        scale_shape=weight.scale_shape[count:],
        packed_axis=None if packed is None else packed - count,
    )
    own_shape = tuple(n for axis, n in enumerate(x_shape) if axis not in axes.x_batch)
    return own_shape, element, axes.without_batch


@dataclasses.dataclass(frozen=True)
class BatchedProduct:
    """Runs a kernel for every element of a batch, as one launch.

    Attributes:
      product: one element's, with a kernel that may be mapped; the act it has is the whole x's.
      axes: of the whole product.
    """

    product: MatrixProduct
    axes: DotAxes

    @classmethod
    def make(cls, product: MatrixProduct, axes: DotAxes) -> BatchedProduct:
        """From one element's product as dispatch makes it.

        Raises:
          Unsupported: its kernel cannot be mapped.
        """
        multiply = product.kernel.batched
        if multiply is None:
            raise Unsupported("the product has batch axes")
        kernel = dataclasses.replace(product.kernel, multiply=multiply)
        return cls(dataclasses.replace(product, kernel=kernel), axes)

    def __call__(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        input_scale: jax.Array | None,
        interpret: Any = False,
    ) -> jax.Array:
        """The products, laid out as lax.dot_general's; arguments as of `MatrixProduct`."""
        act = self.product.act  # its axes are the whole x's: an element is given codes
        if act is not None and quantized is None:
            given = None if input_scale is None else self.axes.w_to_x(input_scale)
            quantized = quantize_activation(x, act, given)

        def one(
            x: jax.Array,
            quantized: tuple[jax.Array, jax.Array] | None,
            codes: jax.Array,
            scale: jax.Array,
            zero_point: jax.Array | None,
        ) -> jax.Array:
            return self.product(x, quantized, codes, scale, zero_point, None, interpret)

        sizes = codes.shape[: len(self.axes.w_batch)]
        if quantized is not None:
            of_x, x_scale = quantized
            quantized = self._x_elements(of_x, x.shape), self._x_elements(x_scale, x.shape)
        out = jax.vmap(one)(
            self._x_elements(x, x.shape),
            quantized,
            codes.reshape(-1, *codes.shape[len(sizes) :]),
            self._scale_elements(scale, sizes),
            None if zero_point is None else self._scale_elements(zero_point, sizes),
        )
        out = out.reshape(*sizes, *out.shape[1:])
        return lax.transpose(out, (*self.axes.w_batch, *range(len(sizes), out.ndim)))

    def _x_elements(self, part: jax.Array, x_shape: tuple[int, ...]) -> jax.Array:
        """Arrays over x's axes as [elements, ...], in the order of the weight's."""
        batch = [axis for _, axis in sorted(zip(self.axes.w_batch, self.axes.x_batch))]
        full = [x_shape[a] if a in batch else n for a, n in enumerate(part.shape)]
        rest = [axis for axis in range(part.ndim) if axis not in batch]
        part = lax.transpose(jnp.broadcast_to(part, full), (*batch, *rest))
        return part.reshape(-1, *part.shape[len(batch) :])

    def _scale_elements(self, part: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
        """Scales or zero points as [elements, ...]."""
        for axis, size in enumerate(sizes):
            part = spread_axis(part, axis, size)
        return part.reshape(math.prod(sizes), *part.shape[len(sizes) :])
