"""`quantized_dot_general`: lax.dot_general with one operand a QTensor, as a JAX primitive.

Called by the rewriter's rules in place of dot_general, and by anyone who multiplies with a
QTensor by hand. The result has the shape, dtype, layout and sharding type of the float product.
It quantizes its input itself, or takes the codes and the scale that
`quantize_activation` made of it as two more operands (`x_quantized`): then the float x is there
for the derivative only, and XLA drops it. `quantized_dots` (`dots.py`) is several at once.
The arithmetic is `jaxquant.pallas_kernels.reference`; batching and differentiation are in
`dot_rules.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as jp
from jax.interpreters import mlir

from jaxquant.core import _compat
from jaxquant.core.primitives.kernels import Product, choose_kernel, run_joined, run_kernel
from jaxquant.core.primitives.read_late import read_late
from jaxquant.core.primitives.weights import (
    act_quant,
    bind_leaves,
    logical_aval,
    reference_parts,
    transformed,
    unflatten,
)
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels import reference
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.dispatch import (
    PLATFORMS,
    Choice,
    Implementation,
    Place,
    check_implementation,
)
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers, Side
from jaxquant.pallas_kernels.siblings import SiblingProducts, join
from jaxquant.pallas_kernels.spmd import PartitionedProduct

quantized_dot_general_p = _compat.make_primitive("quantized_dot_general")


def quantized_dot_general(
    x: jax.Array,
    w: QTensor,
    dimension_numbers: DotDimensionNumbers,
    *,
    weight_side: Side = "rhs",
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Product of an activation and a quantized weight; see `lax.dot_general`.

    What happens to x first is the weight's own business (`w.act`): nothing, or quantization per
    token (one scale for each index of all of x's axes that are not contracted), per tensor, or
    with the calibrated `w.input_scale`. Gradients pass that quantization straight through. Before
    that x is multiplied with the weight's input factor and turn, if it has any.

    Args:
      x: the activation, floats.
      w: the weight.
      dimension_numbers: `((lhs, rhs) contracting, (lhs, rhs) batch)` dimensions.
      weight_side: the operand that the weight is: "rhs", or "lhs".
      precision: as for lax.dot_general; float products only.
      preferred_element_type: dtype of the result; None for that of the float product.
      out_sharding: sharding type of the result on an explicit mesh.
      implementation: "xla" or "pallas" to force one; None for the best on the platform. A
        forced kernel that does not fit is an error when the product is lowered. Derivatives
        choose for themselves.

    Returns:
      Array of the float product's shape and dtype.

    Raises:
      TypeError: shapes or dtypes do not fit (the message is lax.dot_general's).
      ValueError: a static activation scheme without input_scale; an unknown implementation.
      UnmetInputError: the weight's input factor or turn is along an axis that is not summed over.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    dims = (
        (_ints(lhs_contract), _ints(rhs_contract)),
        (_ints(lhs_batch), _ints(rhs_batch)),
    )
    preferred = None if preferred_element_type is None else np.dtype(preferred_element_type)
    axes = DotAxes.make(dims, np.ndim(x), w.ndim, weight_side)
    met = dict(zip(axes.w_contract + axes.w_batch, axes.x_contract + axes.x_batch, strict=True))
    x, w = transformed(x, w, [met.get(axis) for axis in range(w.ndim)])
    act = w.act and act_quant(w.act, np.ndim(x), axes.x_contract)
    if act is not None and act.static and w.input_scale is None:
        raise ValueError(
            f"the weight's activation scheme is static ({w.act}), but it has no input_scale: "
            "quantize with calibration batches, or use a dynamic scheme"
        )
    return bind_dot(
        x,
        w,
        dimension_numbers=dims,
        weight_side=weight_side,
        act=act,
        precision=_compat.canonical_precision(precision),
        preferred_element_type=preferred,
        out_sharding=_compat.canonical_out_sharding(out_sharding, "quantized_dot_general"),
        implementation=check_implementation(implementation),
    )


def bind_dot(
    x: jax.Array,
    w: QTensor,
    *,
    act: ActQuant | None,
    quantized_x: Sequence[jax.Array] = (),
    implementation: Implementation | None = None,
    **params: Any,
) -> jax.Array:
    """Binds the primitive with its own parameters.

    Args:
      x: the activation.
      w: the weight.
      act: replaces what the weight says.
      quantized_x: nothing, or the codes and scale of x.
      implementation: forces one.
      **params: the other parameters.
    """
    keep_input_scale = act is not None and act.static and not quantized_x
    leaves, tree = jax.tree.flatten(bind_leaves(w, keep_input_scale=keep_input_scale))
    operands = _compat.match_varying(x, *quantized_x, *leaves)
    return quantized_dot_general_p.bind(
        *operands,
        tree=tree,
        act=act,
        x_quantized=bool(quantized_x),
        implementation=implementation,
        **params,
    )


def split_operands(args: Sequence[Any], x_quantized: bool) -> tuple[Any, list[Any], list[Any]]:
    """`(x, [codes, scale] or [], leaves)` of what there is one of for each operand."""
    x, *rest = args
    count = 2 if x_quantized else 0
    return x, rest[:count], rest[count:]


def check_quantized(x: Any, quantized: Sequence[Any], act: ActQuant | None) -> None:
    """Raises where the given codes and scale cannot be those of `x`.

    Raises:
      TypeError: names what does not fit, and what would.
    """
    if not quantized:
        return
    codes, scale = quantized
    if act is None:
        raise TypeError("x_quantized needs act: the scheme that made the codes")
    if codes.shape != x.shape or codes.dtype != np.dtype(act.dtype):
        raise TypeError(
            f"codes {codes.dtype}{list(codes.shape)} are not those of x {list(x.shape)} by {act}"
        )
    fits = scale.ndim == x.ndim and all(
        n == 1 or (n == m and (act.static or i not in act.reduce_axes))
        for i, (n, m) in enumerate(zip(scale.shape, x.shape, strict=True))
    )
    if not fits:
        raise TypeError(f"scale {list(scale.shape)} is not one of x {list(x.shape)} by {act}")


def _ints(axes: Any) -> tuple[int, ...]:
    return tuple(int(a) for a in axes)


def float_operands(x: Any, w: Any, weight_side: Side) -> tuple[Any, Any]:
    """`(lhs, rhs)`."""
    return (x, w) if weight_side == "rhs" else (w, x)


def product_avals(
    args: Sequence[Any],
    weights: Callable[[Sequence[Any]], Sequence[QTensor]],
    out_shardings: Sequence[Any],
    *,
    act: ActQuant | None,
    x_quantized: bool,
    dimension_numbers: DotDimensionNumbers,
    weight_side: Side,
    precision: Any,
    preferred_element_type: np.dtype | None,
) -> list[Any]:
    """Types of the products of one input: those of the float products.

    Args:
      args: types of the operands, as `split_operands` takes them.
      weights: puts the weights together from their parts.
      out_shardings: one for each weight.
      act: a parameter of the primitive, as all that follow.
      x_quantized: likewise.
      dimension_numbers: likewise.
      weight_side: likewise.
      precision: likewise.
      preferred_element_type: likewise.

    Raises:
      TypeError: the operands do not fit.
    """
    x, quantized, leaves = split_operands(args, x_quantized)
    check_quantized(x, quantized, act)
    avals = []
    for w, out_sharding in zip(weights(leaves), out_shardings, strict=True):
        aval, _ = jp.dot_general_p.abstract_eval(
            *float_operands(x, logical_aval(w), weight_side),
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
        avals.append(aval)
    return avals


def _abstract_eval(
    *args: Any, tree: Any, out_sharding: Any, implementation: Any, **params: Any
) -> Any:
    del implementation  # of no influence on types
    (aval,) = product_avals(
        args, lambda leaves: [unflatten(tree, leaves)], [out_sharding], **params
    )
    return aval


def compute_dot(
    x: jax.Array, quantized: Sequence[jax.Array], w: QTensor, **options: Any
) -> jax.Array:
    """The reference's product; `options` are its own."""
    act, x = options["act"], x.astype(jnp.promote_types(x.dtype, w.dtype))
    if options["on_cpu"]:
        if act is not None and not act.static and not quantized:
            # Here, so that behind the barrier it is the program of codes that are given: bit-equal.
            quantized = quantize_activation(x, act)
        x, quantized, w = read_late(x, quantized, w, act)
    return reference.dot_general(
        x,
        *reference_parts(w),
        w.input_scale,
        (quantized[0], quantized[1]) if quantized else None,
        **options,
    )


def lowering(
    ctx: Any, weights: Sequence[QTensor], platform: str, params: dict[str, Any]
) -> tuple[Callable[..., list[jax.Array]], dict[str, Any]]:
    """How to compute products of one input: each as the kernel that fits best, or by XLA.

    Where the kernels can be one launch, they are.

    Args:
      ctx: context of the lowering; its first operand is x.
      weights: of abstract values.
      platform: what it is lowered for; "" for any that has no kernels.
      params: parameters of the equation.

    Returns:
      `compute(x, quantized, weights) -> products`, and what `_compat.lower_without_shardings` is
      to know for it.

    Raises:
      ValueError: a forced implementation does not fit.
    """
    x, dims, side = ctx.avals_in[0], params["dimension_numbers"], params["weight_side"]
    act, precision, forced = params["act"], params["precision"], params["implementation"]
    dtypes = [aval.dtype for aval in ctx.avals_out]
    shardings = [_compat.explicit_sharding(aval) for aval in ctx.avals_out]
    choices: list[Choice | None] = [None] * len(weights)
    device = None
    if platform in PLATFORMS or forced == "pallas":
        device, devices, manual = _compat.lowering_devices(ctx)
        kind = None if device is None else device.device_kind
        place = Place(platform or "a platform without kernels", kind, devices, manual)
        choices = [
            choose_kernel(
                Product(
                    x, w, DotAxes.make(dims, x.ndim, w.ndim, side), act, dtype, precision, sharding
                ),
                place,
                forced,
            )
            for w, dtype, sharding in zip(weights, dtypes, shardings, strict=True)
        ]

    joined = join([None if choice is None else choice.run for choice in choices])

    def compute(
        x: jax.Array, quantized: Sequence[jax.Array], weights: Sequence[QTensor]
    ) -> list[jax.Array]:
        if isinstance(joined, SiblingProducts):
            return run_joined(joined, x, quantized, weights)
        return [
            run_kernel(choice, x, quantized, w)
            if choice is not None and choice.run is not None
            else compute_dot(
                x,
                quantized,
                w,
                dimension_numbers=dims,
                weight_side=side,
                act=act,
                precision=precision,
                out_dtype=dtype,
                on_cpu=platform == "cpu",
            )
            for w, choice, dtype in zip(weights, choices, dtypes, strict=True)
        ]

    runs = [choice.run for choice in choices if choice is not None and choice.run is not None]
    surroundings: dict[str, Any] = {}
    if runs:
        surroundings["device"] = _compat.abstract_device(device)
    if any(isinstance(run, PartitionedProduct) for run in runs):
        surroundings["mesh_axes"] = _compat.mesh_axes(x)
    return compute, surroundings


def _lower(ctx: Any, *args: Any, platform: str, **params: Any) -> Any:
    quantized_operands, tree = params["x_quantized"], params["tree"]
    _, _, avals = split_operands(ctx.avals_in, quantized_operands)
    compute, surroundings = lowering(ctx, [unflatten(tree, avals)], platform, params)

    def fn(*args: jax.Array) -> jax.Array:
        x, quantized, leaves = split_operands(args, quantized_operands)
        (out,) = compute(x, quantized, [unflatten(tree, leaves)])
        return out

    return _compat.lower_without_shardings(fn, **surroundings)(ctx, *args)


def register_lowerings(primitive: Any, rule: Callable[..., Any]) -> None:
    """Enters `rule(ctx, *args, platform=, **params)` for the platforms that differ."""
    mlir.register_lowering(primitive, functools.partial(rule, platform=""))
    for platform in ("cpu", *PLATFORMS):
        lower = functools.partial(rule, platform=platform)
        mlir.register_lowering(primitive, lower, platform=platform)


quantized_dot_general_p.def_abstract_eval(_abstract_eval)
register_lowerings(quantized_dot_general_p, _lower)
