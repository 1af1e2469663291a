"""Batching and differentiation of the quantized dot_general.

Registered on import of `jaxquant.core.primitives`. Every rule ends in the primitive itself, so a
program stays quantized under vmap, grad and their compositions.

* vmap over x alone: a free axis of x. Over parts of the weight alone: a free axis of the weight.
  Over both: a batch axis.
* The tangent and the cotangent of x are products with the same codes and no activation
  quantization: straight through. A scale per output channel is constant along a contracted axis
  in the forward product; in the transpose it varies along one, and the reference moves it to the
  cotangent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxquant.core import _compat
from jaxquant.core.primitives.dot import bind_dot, quantized_dot_general_p
from jaxquant.core.primitives.weights import batch_in_front, refuse_gradient, unflatten
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers, Side


def _shift(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + 1 for a in axes)


def _batch(
    axis_data: Any,
    args: tuple[Any, ...],
    dims: tuple[Any, ...],
    *,
    tree: Any,
    act: ActQuant | None,
    dimension_numbers: DotDimensionNumbers,
    weight_side: Side,
    out_sharding: Any,
    **params: Any,
) -> tuple[jax.Array, int | None]:
    x, *leaves = args
    x_dim, *leaf_dims = dims
    w = unflatten(tree, leaves)
    x_ndim = jnp.ndim(x) - (x_dim is not None)
    w_ndim = jnp.ndim(leaves[0]) - (leaf_dims[0] is not None)
    axes = DotAxes.make(dimension_numbers, x_ndim, w_ndim, weight_side)
    w_batched = any(d is not None for d in leaf_dims)
    if x_dim is not None:
        x = jnp.moveaxis(x, x_dim, 0)
        act = act and dataclasses.replace(act, reduce_axes=_shift(act.reduce_axes))
        axes = axes._replace(
            x_contract=_shift(axes.x_contract),
            x_batch=_shift(axes.x_batch),
            x_free=(0, *_shift(axes.x_free)),
        )
    if w_batched:
        w = batch_in_front(tree, leaves, leaf_dims, axis_data.size)
        axes = axes._replace(
            w_contract=_shift(axes.w_contract),
            w_batch=_shift(axes.w_batch),
            w_free=(0, *_shift(axes.w_free)),
        )
    if x_dim is not None and w_batched:
        axes = axes._replace(
            x_batch=(0, *axes.x_batch),
            w_batch=(0, *axes.w_batch),
            x_free=axes.x_free[1:],
            w_free=axes.w_free[1:],
        )
        out_dim = 0
    elif w_batched:
        out_dim = axes.weight_out_axis(0)
    elif x_dim is not None:
        out_dim = len(axes.x_batch) + (len(axes.w_free) if weight_side == "lhs" else 0)
    else:
        out_dim = None
    if out_dim is not None:
        out_sharding = _compat.sharding_for_vmap(axis_data, out_sharding, out_dim)
    out = bind_dot(
        x,
        w,
        act=act,
        dimension_numbers=axes.dimension_numbers,
        weight_side=weight_side,
        out_sharding=out_sharding,
        **params,
    )
    return out, out_dim


def _jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...], *, tree: Any, **params: Any
) -> tuple[Any, Any]:
    x, *leaves = primals
    x_tangent, *leaf_tangents = tangents
    refuse_gradient(quantized_dot_general_p.name, tree, leaf_tangents)
    out = quantized_dot_general_p.bind(x, *leaves, tree=tree, **params)
    if not _compat.has_tangent(x_tangent):
        return out, _compat.zero_tangent(out)
    params["act"] = None
    return out, bind_dot(x_tangent, unflatten(tree, leaves), **params)


def _transpose(
    cotangent: Any,
    x: Any,
    *leaves: Any,
    tree: Any,
    act: ActQuant | None,
    dimension_numbers: DotDimensionNumbers,
    weight_side: Side,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
) -> list[Any]:
    nothing = [None] * len(leaves)
    if not ad.is_undefined_primal(x):
        raise TypeError(
            f"{quantized_dot_general_p.name} is linear in its activation only; its codes and "
            "scales cannot be transposed"
        )
    if act is not None:
        raise TypeError(
            f"{quantized_dot_general_p.name} with quantized activations is not linear; take jax.vjp"
        )
    if not _compat.has_tangent(cotangent):
        return [ad.Zero(x.aval), *nothing]
    w = unflatten(tree, leaves)
    axes = DotAxes.make(dimension_numbers, x.aval.ndim, w.ndim, weight_side)
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
        out_sharding=_compat.permuted_sharding(x.aval, order),
    )
    out = jnp.transpose(out, [order.index(a) for a in range(len(order))])
    return [out.astype(x.aval.dtype), *nothing]


def _on_side(side: Side, contract: tuple[Any, Any], batch: tuple[Any, Any]) -> DotDimensionNumbers:
    """Pairs of (activation, weight) axes as (left, right) dimension numbers."""
    if side == "rhs":
        return contract, batch
    return contract[::-1], batch[::-1]


batching.fancy_primitive_batchers[quantized_dot_general_p] = _batch
ad.primitive_jvps[quantized_dot_general_p] = _jvp
ad.primitive_transposes[quantized_dot_general_p] = _transpose
