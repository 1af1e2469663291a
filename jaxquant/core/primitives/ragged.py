"""`quantized_ragged_dot`: rows grouped by expert, times quantized experts, as a JAX primitive.

The experts are quantized, the rows are not. Called by the rewriter's rule for
ragged_dot_general.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core import _compat
from jaxquant.core.primitives.linear import (
    bind_linear,
    float_parameters,
    make_linear_primitive,
    result_dtype,
)
from jaxquant.core.primitives.weights import reference_parts
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels import reference_conv

_PLAIN = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def quantized_ragged_dot(
    x: jax.Array,
    w: QTensor,
    group_sizes: jax.Array,
    dimension_numbers: lax.RaggedDotDimensionNumbers = _PLAIN,
    *,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`lax.ragged_dot_general(x, w, group_sizes)` with quantized experts.

    Activations stay float (`w.act` is not used). In the plain form a scale per expert and output
    column multiplies the output; otherwise the experts are dequantized first.

    Args:
      x: rows, [m, k] in the plain form; the first group_sizes[0] belong to expert 0, and so on.
      w: experts, [experts, k, n] in the plain form.
      group_sizes: integers, [experts].
      dimension_numbers: for other forms, as lax.ragged_dot_general takes them.
      precision: as for lax.ragged_dot.
      preferred_element_type: dtype of the result.

    Returns:
      Array of the float product's shape and dtype, [m, n] in the plain form.

    Raises:
      TypeError: shapes or dtypes do not fit (the message is lax.ragged_dot_general's).
    """

    def float_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return lax.ragged_dot_general(
            x,
            w,
            sizes,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    return bind_ragged_dot(x, w, group_sizes, **float_parameters(float_dot, x, w, group_sizes))


def bind_ragged_dot(x: jax.Array, w: QTensor, group_sizes: jax.Array, **params: Any) -> jax.Array:
    """Binds the primitive with the parameters of a `ragged_dot_general` equation."""
    return bind_linear(quantized_ragged_dot_p, x, w, group_sizes, **params)


def _compute(
    x: jax.Array,
    w: QTensor,
    group_sizes: jax.Array,
    *,
    preferred_element_type: Any,
    out_sharding: Any = None,
    **params: Any,
) -> jax.Array:
    del out_sharding  # the output's aval has it
    dtype = result_dtype(x, w, preferred_element_type)
    x = x.astype(jnp.promote_types(x.dtype, w.dtype))
    parts = reference_parts(w)
    return reference_conv.ragged_dot_general(x, *parts, group_sizes, out_dtype=dtype, **params)


quantized_ragged_dot_p = make_linear_primitive(
    "quantized_ragged_dot", _compat.ragged_dot_general_p, _compute, batch_together=True
)
