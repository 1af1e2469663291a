"""Batching and differentiation of the quantized dot_general.

Registered on import of `jaxquant.core.primitives`; `dots.py` has the rules of several products at
once, out of the same parts. Every rule ends in the primitive itself, so a program stays quantized
under vmap, grad and their compositions.

* vmap over x alone: a free axis of x. Over parts of the weight alone: a free axis of the weight.
  Over both: a batch axis. Codes and scale of x that are operands go with x.
* The tangent and the cotangent of x are products with the same codes and no activation
  quantization: straight through. A scale per output channel is constant along a contracted axis
  in the forward product; in the transpose it varies along one, and the reference moves it to the
  cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxquant.core import _compat
from jaxquant.core.primitives.dot import bind_dot, quantized_dot_general_p, split_operands
from jaxquant.core.primitives.weights import batch_in_front, refuse_gradient, unflatten
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.dispatch import Implementation
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers, Side


def _shift(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + 1 for a in axes)


def batch_activation(
    operands: Sequence[Any], dims: Sequence[Any], act: ActQuant | None, size: int
) -> tuple[list[Any], ActQuant | None, bool]:
    """Puts the batch axis of x, and of its codes and scale, in front.

    Args:
      operands: `[x]` or `[x, codes, scale]`.
      dims: where each one's batch axis lies, or None.
      act: how x is quantized.
      size: length of the batch axis.

    Returns:
      The operands, the scheme for them, and whether they have a batch axis now.
    """
    if all(d is None for d in dims):
        return list(operands), act, False
    # The scale may have size 1 there; x and the codes must have the shape of each other.
    moved = [
        jnp.expand_dims(a, 0) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(operands, dims, strict=True)
    ]
    full = [jnp.broadcast_to(a, (size, *a.shape[1:])) for a in (moved[:1] + moved[1:2])]
    return [*full, *moved[2:]], act and act.behind_new_axis(), True


def batch_axes(axes: DotAxes, x_batched: bool, w_batched: bool) -> tuple[DotAxes, int | None]:
    """The product's axes after a batch axis was put in front of some operands.

    Returns:
      The axes, and where the batch axis lies in the result (None if there is none).
    """
    if x_batched:
        axes = axes._replace(
            x_contract=_shift(axes.x_contract),
            x_batch=_shift(axes.x_batch),
            x_free=(0, *_shift(axes.x_free)),
        )
    if w_batched:
        axes = axes._replace(
            w_contract=_shift(axes.w_contract),
            w_batch=_shift(axes.w_batch),
            w_free=(0, *_shift(axes.w_free)),
        )
    if x_batched and w_batched:
        axes = axes._replace(
            x_batch=(0, *axes.x_batch),
            w_batch=(0, *axes.w_batch),
            x_free=axes.x_free[1:],
            w_free=axes.w_free[1:],
        )
        return axes, 0
    if w_batched:
        return axes, axes.weight_out_axis(0)
    if x_batched:
        return axes, len(axes.x_batch) + (len(axes.w_free) if axes.weight_side == "lhs" else 0)
    return axes, None


def _batch(
    axis_data: Any,
    args: tuple[Any, ...],
    dims: tuple[Any, ...],
    *,
    tree: Any,
    act: ActQuant | None,
    x_quantized: bool,
    dimension_numbers: DotDimensionNumbers,
    weight_side: Side,
    out_sharding: Any,
    **params: Any,
) -> tuple[jax.Array, int | None]:
    x, quantized, leaves = split_operands(args, x_quantized)
    x_dim, quantized_dims, leaf_dims = split_operands(dims, x_quantized)
    w = unflatten(tree, leaves)
    x_ndim = jnp.ndim(x) - (x_dim is not None)
    w_ndim = jnp.ndim(leaves[0]) - (leaf_dims[0] is not None)
    axes = DotAxes.make(dimension_numbers, x_ndim, w_ndim, weight_side)
    (x, *quantized), act, x_batched = batch_activation(
        [x, *quantized], [x_dim, *quantized_dims], act, axis_data.size
    )
    w_batched = any(d is not None for d in leaf_dims)
    if w_batched:
        w = batch_in_front(tree, leaves, leaf_dims, axis_data.size)
    axes, out_dim = batch_axes(axes, x_batched, w_batched)
    if out_dim is not None:
        out_sharding = _compat.sharding_for_vmap(axis_data, out_sharding, out_dim)
    out = bind_dot(
        x,
        w,
        act=act,
        quantized_x=quantized,
        dimension_numbers=axes.dimension_numbers,
        weight_side=weight_side,
        out_sharding=out_sharding,
        **params,
    )
    return out, out_dim


def jvp_rule(
    primitive: Any,
    parts: Callable[[Any, Sequence[Any]], Sequence[tuple[Any, Sequence[Any]]]],
    bind: Callable[..., Any],
) -> Callable[..., tuple[Any, Any]]:
    """The JVP of a product, or of several of one input: the same with the tangent of x.

    Args:
      primitive: the primitive.
      parts: for each weight its tree and what the given leaves have for it.
      bind: `bind(x, weights, act=, implementation=, **params)`.
    """

    def rule(
        primals: tuple[Any, ...],
        tangents: tuple[Any, ...],
        *,
        tree: Any,
        x_quantized: bool,
        **params: Any,
    ) -> tuple[Any, Any]:
        x_tangent, _, leaf_tangents = split_operands(tangents, x_quantized)
        _, _, leaves = split_operands(primals, x_quantized)
        for own, tangent_parts in parts(tree, leaf_tangents):
            refuse_gradient(primitive.name, own, tangent_parts)
        out = primitive.bind(*primals, tree=tree, x_quantized=x_quantized, **params)
        if not _compat.has_tangent(x_tangent):
            return out, jax.tree.map(_compat.zero_tangent, out)
        params["act"] = params["implementation"] = None
        return out, bind(x_tangent, jax.tree.unflatten(tree, leaves), **params)

    return rule


def _transpose(
    cotangent: Any,
    x: Any,
    *leaves: Any,
    tree: Any,
    act: ActQuant | None,
    x_quantized: bool,
    out_sharding: Any,
    implementation: Implementation | None,
    **params: Any,
) -> list[Any]:
    # Not with act=None; the cotangent has its own.
    del x_quantized, out_sharding, implementation
    nothing = [None] * len(leaves)
    check_linear(quantized_dot_general_p.name, x, act)
    if not _compat.has_tangent(cotangent):
        return [ad.Zero(x.aval), *nothing]
    return [transposed_dot(cotangent, x.aval, unflatten(tree, leaves), **params), *nothing]


def check_linear(name: str, x: Any, act: ActQuant | None) -> None:
    """Raises where a quantized product cannot be transposed.

    Raises:
      TypeError: it is not the activation that is unknown, or the activation is quantized.
    """
    if not ad.is_undefined_primal(x):
        raise TypeError(
            f"{name} is linear in its activation only; its codes and scales cannot be transposed"
        )
    if act is not None:
        raise TypeError(f"{name} with quantized activations is not linear; take jax.vjp")


def transposed_dot(
    cotangent: Any,
    x_aval: Any,
    w: QTensor,
    *,
    dimension_numbers: DotDimensionNumbers,
    weight_side: Side,
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    """The cotangent of x for that of its product with `w`: a product with the same codes."""
    axes = DotAxes.make(dimension_numbers, x_aval.ndim, w.ndim, weight_side)
    batch = len(axes.x_batch)
    start = batch + (len(axes.x_free) if weight_side == "rhs" else 0)
    w_free_in_out = tuple(range(start, start + len(axes.w_free)))
    back = DotAxes.make(
        _on_side(weight_side, (w_free_in_out, axes.w_free), (tuple(range(batch)), axes.w_batch)),
        cotangent.ndim,
        w.ndim,
        weight_side,
    )
    # Axes of the product, in its own order, as axes of x.
    met = [axes.x_contract[axes.w_contract.index(a)] for a in back.w_free]
    first, second = (axes.x_free, met) if weight_side == "rhs" else (met, axes.x_free)
    order = [*axes.x_batch, *first, *second]
    out = bind_dot(
        cotangent,
        w,
        act=None,
        dimension_numbers=back.dimension_numbers,
        weight_side=weight_side,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=_compat.permuted_sharding(x_aval, order),
    )
    out = jnp.transpose(out, [order.index(a) for a in range(len(order))])
    return out.astype(x_aval.dtype)


def _on_side(side: Side, contract: tuple[Any, Any], batch: tuple[Any, Any]) -> DotDimensionNumbers:
    """Pairs of (activation, weight) axes as (left, right) dimension numbers."""
    if side == "rhs":
        return contract, batch
    return contract[::-1], batch[::-1]


batching.fancy_primitive_batchers[quantized_dot_general_p] = _batch
ad.primitive_jvps[quantized_dot_general_p] = jvp_rule(
    quantized_dot_general_p, lambda tree, leaves: [(tree, leaves)], bind_dot
)
ad.primitive_transposes[quantized_dot_general_p] = _transpose
