"""Products of two activations in low precision, for attention scores and mixing.

Only a rule that names attention products (op="attention") leads here; without one they stay
float. There is no weight and nothing to store, so this is a function of plain JAX operations
with a gradient of its own, not a primitive.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxquant.core import _compat
from jaxquant.core.primitives.weights import act_quant
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.dot_axes import DotDimensionNumbers
from jaxquant.pallas_kernels.reference_attention import dot_of_activations


def quantized_attention_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensionNumbers,
    act: ActScheme,
    *,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """lax.dot_general of two activations, both quantized dynamically first.

    Per token, each operand has one scale for each index of its axes that are not contracted. The
    gradient is that of the float product (straight through).

    Args:
      lhs: floats.
      rhs: floats.
      dimension_numbers: as for lax.dot_general.
      act: a dynamic scheme, for both operands.
      precision: for the gradient's float products.
      preferred_element_type: dtype of the result; None for that of the float product.

    Returns:
      Array of the float product's shape and dtype.

    Raises:
      ValueError: the scheme is static: there is no weight to keep its scales.
    """
    if act.mode == "static":
        raise ValueError(
            f"attention products have no weight to hold a static scale; {act} must be dynamic"
        )
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    dims = (
        (tuple(lhs_contract), tuple(rhs_contract)),
        (tuple(lhs_batch), tuple(rhs_batch)),
    )
    preferred = None if preferred_element_type is None else np.dtype(preferred_element_type)
    precision = _compat.canonical_precision(precision)
    return _attention_dot(dims, act, precision, preferred, lhs, rhs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _attention_dot(
    dims: Any, act: ActScheme, precision: Any, preferred: Any, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    (lhs_contract, rhs_contract), _ = dims
    out = jax.eval_shape(
        functools.partial(
            lax.dot_general, dimension_numbers=dims, preferred_element_type=preferred
        ),
        jax.ShapeDtypeStruct(lhs.shape, lhs.dtype),
        jax.ShapeDtypeStruct(rhs.shape, rhs.dtype),
    )
    return dot_of_activations(
        lhs,
        rhs,
        act_quant(act, lhs.ndim, lhs_contract),
        act_quant(act, rhs.ndim, rhs_contract),
        dimension_numbers=dims,
        out_dtype=out.dtype,
    )


@_attention_dot.defjvp
def _attention_dot_jvp(
    dims: Any, act: ActScheme, precision: Any, preferred: Any, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    float_dot = functools.partial(
        lax.dot_general,
        dimension_numbers=dims,
        precision=precision,
        preferred_element_type=preferred,
    )
    (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
    out = _attention_dot(dims, act, precision, preferred, lhs, rhs)
    return out, float_dot(lhs_dot, rhs) + float_dot(lhs, rhs_dot)
