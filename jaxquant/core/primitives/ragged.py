"""`quantized_ragged_dot`: rows grouped by expert, times quantized experts, as a JAX primitive.

The rows are quantized only if the experts' activation scheme says so, which takes a rule that names
ragged dots. It is lowered to the kernel that `choose_ragged_kernel` names, or to the reference.
Called by the rewriter's rule for ragged_dot_general.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core import _compat
from jaxquant.core.primitives.kernels import static_side
from jaxquant.core.primitives.linear import (
    bind_linear,
    float_parameters,
    make_linear_primitive,
    result_dtype,
)
from jaxquant.core.primitives.splits import placed
from jaxquant.core.primitives.weights import act_quant, reference_parts, transformed
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels import reference_conv
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.dispatch import (
    Choice,
    Implementation,
    Place,
    check_implementation,
    part_of,
)
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import Unsupported
from jaxquant.pallas_kernels.ragged_dispatch import choose_ragged
from jaxquant.pallas_kernels.spmd import PartitionedProduct
from jaxquant.pallas_kernels.spmd_ragged import RAGGED_AXES, RAGGED_BACK, LocalExperts

_PLAIN = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_BACK = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,),
)


def quantized_ragged_dot(
    x: jax.Array,
    w: QTensor,
    group_sizes: jax.Array,
    dimension_numbers: lax.RaggedDotDimensionNumbers = _PLAIN,
    *,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`lax.ragged_dot_general(x, w, group_sizes)` with quantized experts.

    In the plain form a scale per expert and output column multiplies the output; otherwise the
    experts are dequantized first. What happens to x is the experts' own business (`w.act`):
    nothing, or codes with one scale a row ("token", in the plain form only), one in all, or the
    calibrated `w.input_scale`. Gradients pass that straight through.

    Args:
      x: rows, [m, k] in the plain form; the first group_sizes[0] belong to expert 0, and so on.
      w: experts, [experts, k, n] in the plain form.
      group_sizes: integers, [experts].
      dimension_numbers: for other forms, as lax.ragged_dot_general takes them.
      precision: as for lax.ragged_dot.
      preferred_element_type: dtype of the result.
      implementation: "xla" or "pallas" to force one; None for the best on the platform. A forced
        kernel that does not fit is an error when the product is lowered, or mapped by vmap.

    Returns:
      Array of the float product's shape and dtype, [m, n] in the plain form.

    Raises:
      TypeError: shapes or dtypes do not fit (the message is lax.ragged_dot_general's).
      ValueError: a static activation scheme without input_scale; an unknown implementation.
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

    params = float_parameters(float_dot, x, w, group_sizes)
    params["implementation"] = check_implementation(implementation)
    return bind_ragged_dot(x, w, group_sizes, **params)


def bind_ragged_dot(
    x: jax.Array,
    w: QTensor,
    group_sizes: jax.Array,
    *,
    implementation: Implementation | None = None,
    **params: Any,
) -> jax.Array:
    """Binds the primitive with the parameters of a `ragged_dot_general` equation.

    Raises:
      UnmetInputError: the experts' input factor or turn is along an axis that is not summed over,
        such as a factor of each expert's own.
    """
    numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (x_sums, w_sums), (x_batch, w_batch) = numbers
    met = dict(zip((*w_sums, *w_batch), (*x_sums, *x_batch), strict=True))
    x, w = transformed(x, w, [met.get(axis) for axis in range(w.ndim)])
    act = ragged_act(x, w, group_sizes, params)
    params["implementation"] = implementation
    return bind_linear(quantized_ragged_dot_p, x, w, group_sizes, act=act, **params)


def ragged_act(x: Any, w: QTensor, group_sizes: Any, params: dict[str, Any]) -> ActQuant | None:
    """What the experts say of the rows: one scale a row in the plain form, else one in all."""
    if w.act is None:
        return None
    plain = reference_conv.plain_ragged(x, w, group_sizes, params)
    return act_quant(w.act, jnp.ndim(x), (1,) if plain else range(jnp.ndim(x)))


def choose_ragged_kernel(
    x: Any,
    w: QTensor,
    group_sizes: Any,
    *,
    act: ActQuant | None,
    place: Place,
    out_dtype: Any,
    precision: Any,
    implementation: Implementation | None = None,
    **params: Any,
) -> Choice:
    """The kernel for a ragged dot, or XLA and why; asked by the lowering and by the plan.

    Args:
      x: the rows or their aval.
      w: the experts; leaves may be avals.
      group_sizes: rows of each expert, or their aval.
      act: how the rows are quantized first, or None.
      place: where the program runs.
      out_dtype: dtype of the result.
      precision: as for lax.ragged_dot.
      implementation: forces one.
      **params: the other parameters of the equation.

    Raises:
      ValueError: the forced one does not fit.
    """
    plain = reference_conv.plain_ragged(x, w, group_sizes, params)
    if plain:
        place = placed(place, x, w.codes, w.mesh_layout, RAGGED_AXES, None)
    return choose_ragged(
        tuple(x.shape),
        jnp.promote_types(x.dtype, w.dtype),
        static_side(w, place),
        act,
        place,
        plain=plain,
        out_dtype=out_dtype,
        precision=precision,
        implementation=implementation,
    )


def _compute(
    x: jax.Array,
    w: QTensor,
    group_sizes: jax.Array,
    *,
    act: ActQuant | None,
    quantized_x: Sequence[jax.Array],
    preferred_element_type: Any,
    implementation: Any = None,
    out_sharding: Any = None,
    **params: Any,
) -> jax.Array:
    del implementation, out_sharding  # this is XLA's; the output's aval has the sharding
    dtype = result_dtype(x, w, preferred_element_type)
    x = x.astype(jnp.promote_types(x.dtype, w.dtype))
    parts = (*reference_parts(w), w.input_scale)
    return reference_conv.ragged_dot_general(
        x, *parts, group_sizes, out_dtype=dtype, act=act, quantized_x=quantized_x, **params
    )


def _partitioned(
    x: Any, w: QTensor, group_sizes: Any, *, act: ActQuant | None, place: Place, **params: Any
) -> PartitionedProduct | None:
    """XLA's operations on each device's part, where that is known.

    XLA's own partitioner gathers the dequantized experts.
    """
    axes = _axes(x, w, group_sizes, params)
    if axes is None:
        return None
    place = placed(place, x, w.codes, w.mesh_layout, axes, None)
    try:
        parts = part_of(place, tuple(x.shape), static_side(w, place), axes, act, experts=(0,))
    except Unsupported:
        return None
    if parts is None:
        return None
    packed = w.packed_axis
    length = None if packed is None else parts.weight.shape[packed]

    def local(
        x: jax.Array,
        quantized: Sequence[jax.Array] | None,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        input_scale: jax.Array | None,
        sizes: jax.Array,
    ) -> jax.Array:
        own = w.replace(
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            input_scale=input_scale,
            packed_length=length,
        )
        out = _compute(x, own, sizes, act=act, quantized_x=quantized or (), **params)
        others = jnp.arange(out.shape[0]) >= jnp.sum(sizes)
        return jnp.where(others[:, None], jnp.zeros_like(out), out)

    return PartitionedProduct(LocalExperts(local, parts), parts, act)


def _transposed(
    cotangent: jax.Array,
    x: Any,
    w: QTensor,
    group_sizes: jax.Array,
    *,
    act: None,
    x_quantized: bool,
    **params: Any,
) -> jax.Array | None:
    """The cotangent of rows is a product with the same experts, whose columns it sums over."""
    del x_quantized  # x is linear: it is not
    if _axes(x, w, group_sizes, params) is not RAGGED_AXES:
        return None
    params |= {"ragged_dot_dimension_numbers": _BACK, "implementation": None}
    out = bind_linear(quantized_ragged_dot_p, cotangent, w, group_sizes, act=act, **params)
    return out.astype(x.dtype)


def _axes(x: Any, w: QTensor, group_sizes: Any, params: dict[str, Any]) -> DotAxes | None:
    """Which axis does what, if it is the plain form or the transpose of that."""
    if reference_conv.plain_ragged(x, w, group_sizes, params):
        return RAGGED_AXES
    if params["ragged_dot_dimension_numbers"] == _BACK and params.get("group_offset") is None:
        return RAGGED_BACK
    return None


quantized_ragged_dot_p = make_linear_primitive(
    "quantized_ragged_dot",
    _compat.ragged_dot_general_p,
    _compute,
    batch_together=True,
    choose=choose_ragged_kernel,
    partitioned=_partitioned,
    transposed=_transposed,
)
