"""The product of two activations in low precision, in XLA ops.

Called by `jaxquant.core.primitives.quantized_attention_dot`; plain arrays in and out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers
from jaxquant.pallas_kernels.plain_dot import int32_dot, plain_dot


def dot_of_activations(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_act: ActQuant,
    rhs_act: ActQuant,
    *,
    dimension_numbers: DotDimensionNumbers,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Product of two activations, both quantized dynamically.

    Args:
      lhs: floats.
      rhs: floats.
      lhs_act: scheme of lhs; its scale must be constant over contracted axes.
      rhs_act: likewise for rhs, with the same dtype.
      dimension_numbers: as for lax.dot_general.
      out_dtype: dtype of the result.

    Returns:
      Array laid out as lax.dot_general's.
    """
    axes = DotAxes.make(dimension_numbers, lhs.ndim, rhs.ndim, "rhs")
    lhs_codes, lhs_scale = quantize_activation(lhs, lhs_act)
    rhs_codes, rhs_scale = quantize_activation(rhs, rhs_act)
    wide = jnp.promote_types(lhs_scale.dtype, rhs_scale.dtype)
    if lhs_act.integer:
        codes = lhs_codes.astype(jnp.int8), rhs_codes.astype(jnp.int8)
        sums = int32_dot(*codes, axes).astype(wide)
    else:
        sums = plain_dot(
            lhs_codes.astype(jnp.bfloat16), rhs_codes.astype(jnp.bfloat16), axes, None, wide
        )
    return (sums * axes.x_to_out(lhs_scale) * axes.w_to_out(rhs_scale)).astype(out_dtype)
