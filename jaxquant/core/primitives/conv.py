"""`quantized_conv_general_dilated`: convolution with a quantized kernel, as a JAX primitive.

The input is quantized only if the kernel's activation scheme says so, which takes a rule that
names convolutions: XLA's integer convolutions run as plain loops on CPU. Called by the rewriter's
rule for conv_general_dilated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as jp
from jax.interpreters import batching

from jaxquant.core.primitives.dot import split_operands
from jaxquant.core.primitives.linear import (
    bind_linear,
    float_parameters,
    make_linear_primitive,
    result_dtype,
    unflatten_all,
)
from jaxquant.core.primitives.weights import act_quant, reference_parts, transformed
from jaxquant.core.qtensor import QTensor
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels import reference_conv
from jaxquant.pallas_kernels.activation import ActQuant


def quantized_conv_general_dilated(
    x: jax.Array, w: QTensor, window_strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated(x, w, window_strides, padding, **options)` with a QTensor kernel.

    A scale per output feature multiplies the output; under any other scale the kernel is
    dequantized first. What happens to x is the kernel's own business (`w.act`): nothing, or codes
    with one scale an image ("token"), one in all ("tensor"), or the calibrated `w.input_scale`.
    Gradients pass that straight through.

    Args:
      x: the input, floats.
      w: the kernel.
      window_strides: as for lax.conv_general_dilated.
      padding: likewise.
      **options: its other arguments.

    Returns:
      Array of the float convolution's shape and dtype.

    Raises:
      ValueError: shapes do not fit (the message is lax.conv_general_dilated's), or a static
        activation scheme without input_scale.
    """

    def float_conv(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, window_strides, padding, **options)

    return bind_conv(x, w, **float_parameters(float_conv, x, w))


def bind_conv(x: jax.Array, w: QTensor, **params: Any) -> jax.Array:
    """Binds the primitive with the parameters of a `conv_general_dilated` equation.

    Raises:
      UnmetInputError: the kernel's input factor or turn is along anything but its input features.
    """
    x, w = transformed(x, w, _places(**params))
    act = w.act and conv_act(w.act, jnp.ndim(x), **params)
    return bind_linear(quantized_conv_general_dilated_p, x, w, act=act, **params)


def _places(
    *, dimension_numbers: Any, feature_group_count: int, batch_group_count: int, **_: Any
) -> list[int | None]:
    """For each axis of the kernel the axis of the input that it meets: that of the features.

    With groups there is none: a feature of the kernel stands for one of each group.
    """
    places: list[int | None] = [None] * len(dimension_numbers.rhs_spec)
    if feature_group_count == 1 and batch_group_count == 1:
        places[dimension_numbers.rhs_spec[1]] = dimension_numbers.lhs_spec[1]
    return places


def conv_act(
    act: ActScheme, x_ndim: int, *, dimension_numbers: Any, batch_group_count: int, **_: Any
) -> ActQuant:
    """The scheme of a recipe for the input of a convolution.

    "token" is an image: windows overlap, so only the batch axis can have scales of its own, and
    not where groups of the batch make features.
    """
    images = () if batch_group_count != 1 else (dimension_numbers.lhs_spec[0],)
    return act_quant(act, x_ndim, [axis for axis in range(x_ndim) if axis not in images])


def _compute(
    x: jax.Array,
    w: QTensor,
    *,
    act: ActQuant | None,
    quantized_x: Sequence[jax.Array],
    preferred_element_type: Any,
    out_sharding: Any = None,
    **params: Any,
) -> jax.Array:
    del out_sharding  # the output's aval has it
    dtype = result_dtype(x, w, preferred_element_type)
    parts = (*reference_parts(w), w.input_scale)
    return reference_conv.conv_general_dilated(
        x, *parts, out_dtype=dtype, act=act, quantized_x=quantized_x, **params
    )


quantized_conv_general_dilated_p = make_linear_primitive(
    "quantized_conv_general_dilated", jp.conv_general_dilated_p, _compute
)
_inline_batch = batching.fancy_primitive_batchers[quantized_conv_general_dilated_p]


def _batch(
    axis_data: Any, args: Any, dims: Any, *, tree: Any, x_quantized: bool, **params: Any
) -> Any:
    x, quantized, leaves = split_operands(args, x_quantized)
    x_dim, quantized_dims, leaf_dims = split_operands(dims, x_quantized)
    alone = all(d is None for d in leaf_dims) and params.get("out_sharding") is None
    act = params["act"]
    shared = act is not None and not act.static and len(act.reduce_axes) == jnp.ndim(x) - 1
    # One dynamic scale for all of x is one for each of the mapped ones.
    if x_dim is None or not alone or params["batch_group_count"] != 1 or shared:
        return _inline_batch(axis_data, args, dims, tree=tree, x_quantized=x_quantized, **params)
    # The mapped axis joins the batch, as its major part.
    numbers = params["dimension_numbers"]
    into, out_of = numbers.lhs_spec[0], numbers.out_spec[0]
    size = axis_data.size
    batch = jnp.moveaxis(x, x_dim, 0).shape[into + 1]

    def fold(part: jax.Array, dim: int | None) -> jax.Array:
        if dim is None:
            return part  # a scale that was given: one for all
        part = jnp.moveaxis(part, dim, into)
        return part.reshape(*part.shape[:into], -1, *part.shape[into + 2 :])

    x, *quantized = map(fold, (x, *quantized), (x_dim, *quantized_dims))
    (w,) = unflatten_all(tree, leaves)
    out = bind_linear(quantized_conv_general_dilated_p, x, w, quantized_x=quantized, **params)
    return out.reshape(*out.shape[:out_of], size, batch, *out.shape[out_of + 1 :]), out_of


batching.fancy_primitive_batchers[quantized_conv_general_dilated_p] = _batch
