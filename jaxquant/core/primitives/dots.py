"""`quantized_dots`: one activation times several quantized weights, as one JAX primitive.

Query, key and value; gate and up. `jaxquant.passes.fuse_siblings` puts it where several
`quantized_dot_general` read the same input. The weights stay apart: joining them would move all
their bytes at every step. On the XLA route it is one product for each weight, bit-equal to the
products it stands for; a kernel can make it one launch. Its rules are those of `dot.py` and
`dot_rules.py`, once for each weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from jaxquant.core import _compat
from jaxquant.core.primitives.dot import (
    lowering,
    product_avals,
    register_lowerings,
    split_operands,
)
from jaxquant.core.primitives.dot_rules import (
    batch_activation,
    batch_axes,
    check_linear,
    jvp_rule,
    transposed_dot,
)
from jaxquant.core.primitives.weights import (
    batch_in_front,
    bind_leaves,
)
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.dispatch import Implementation
from jaxquant.pallas_kernels.dot_axes import DotAxes, DotDimensionNumbers, Side

quantized_dots_p = _compat.make_primitive("quantized_dots", multiple_results=True)


def bind_dots(
    x: jax.Array,
    weights: Sequence[QTensor],
    *,
    act: ActQuant | None,
    quantized_x: Sequence[jax.Array] = (),
    dimension_numbers: DotDimensionNumbers,
    weight_side: Side,
    precision: Any,
    preferred_element_type: np.dtype | None,
    out_shardings: Sequence[Any],
    implementation: Implementation | None = None,
) -> list[jax.Array]:
    """The products of `x` with each weight, all with the same dimension numbers.

    Args:
      x: the activation, floats.
      weights: the weights; their ranks may differ only in free axes at the end.
      act: the scheme that made `quantized_x`, or None.
      quantized_x: nothing, or the codes and scale of x (needed, if `act` is given).
      dimension_numbers: of every product, as for `quantized_dot_general`.
      weight_side: likewise.
      precision: likewise.
      preferred_element_type: likewise.
      out_shardings: one for each product.
      implementation: likewise.

    Returns:
      One array for each weight.
    """
    leaves, tree = jax.tree.flatten(tuple(map(bind_leaves, weights)))
    operands = _compat.match_varying(x, *quantized_x, *leaves)
    return quantized_dots_p.bind(
        *operands,
        tree=tree,
        act=act,
        x_quantized=bool(quantized_x),
        dimension_numbers=dimension_numbers,
        weight_side=weight_side,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_shardings=tuple(out_shardings),
        implementation=implementation,
    )


def split_weights(tree: Any, leaves: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
    """For each weight its own tree and what `leaves` has for its parts."""
    children: list[Any] = jax.tree_util.treedef_children(tree)
    rest, parts = iter(leaves), []
    for own in children:
        parts.append((own, [next(rest) for _ in range(own.num_leaves)]))
    return parts


def _abstract_eval(
    *args: Any, tree: Any, out_shardings: tuple[Any, ...], implementation: Any, **params: Any
) -> list[Any]:
    del implementation  # of no influence on types
    if params["act"] is not None and not params["x_quantized"]:
        raise TypeError("quantized_dots with act needs the codes and scale of x as operands")
    return product_avals(args, functools.partial(jax.tree.unflatten, tree), out_shardings, **params)


def _lower(ctx: Any, *args: Any, platform: str, **params: Any) -> Any:
    quantized_operands, tree = params["x_quantized"], params["tree"]
    _, _, avals = split_operands(ctx.avals_in, quantized_operands)
    compute, surroundings = lowering(ctx, jax.tree.unflatten(tree, avals), platform, params)

    def fn(*args: jax.Array) -> list[jax.Array]:
        x, quantized, leaves = split_operands(args, quantized_operands)
        return compute(x, quantized, jax.tree.unflatten(tree, leaves))

    rule = _compat.lower_without_shardings(fn, multiple_results=True, **surroundings)
    return rule(ctx, *args)


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
    out_shardings: tuple[Any, ...],
    **params: Any,
) -> tuple[list[jax.Array], list[int | None]]:
    x, quantized, leaves = split_operands(args, x_quantized)
    x_dim, quantized_dims, leaf_dims = split_operands(dims, x_quantized)
    x_ndim = jnp.ndim(x) - (x_dim is not None)
    operands, act, x_batched = batch_activation(
        [x, *quantized], [x_dim, *quantized_dims], act, axis_data.size
    )
    # All weights get the axis, or none: their products have the same dimension numbers.
    w_batched = any(d is not None for d in leaf_dims)
    weights, every_axes, out_dims = [], [], []
    for (own, parts), (_, part_dims) in zip(
        split_weights(tree, leaves), split_weights(tree, leaf_dims), strict=True
    ):
        w_ndim = jnp.ndim(parts[0]) - (part_dims[0] is not None)
        w = jax.tree.unflatten(own, parts)
        if w_batched:
            w = batch_in_front(own, parts, part_dims, axis_data.size)
        weights.append(w)
        axes = DotAxes.make(dimension_numbers, x_ndim, w_ndim, weight_side)
        axes, out_dim = batch_axes(axes, x_batched, w_batched)
        every_axes.append(axes)
        out_dims.append(out_dim)
    out_shardings = tuple(
        sharding if dim is None else _compat.sharding_for_vmap(axis_data, sharding, dim)
        for sharding, dim in zip(out_shardings, out_dims, strict=True)
    )
    outs = bind_dots(
        operands[0],
        weights,
        act=act,
        quantized_x=operands[1:],
        dimension_numbers=every_axes[0].dimension_numbers,
        weight_side=weight_side,
        out_shardings=out_shardings,
        **params,
    )
    return outs, out_dims


def _transpose(
    cotangents: Sequence[Any],
    x: Any,
    *leaves: Any,
    tree: Any,
    act: ActQuant | None,
    x_quantized: bool,
    out_shardings: Any,
    implementation: Implementation | None,
    **params: Any,
) -> list[Any]:
    # Not with act=None; the cotangents have their own.
    del x_quantized, out_shardings, implementation
    check_linear(quantized_dots_p.name, x, act)
    total = ad.Zero(x.aval)
    # Summed from the last to the first, as the products apart would be.
    for cotangent, w in reversed(
        list(zip(cotangents, jax.tree.unflatten(tree, leaves), strict=True))
    ):
        if _compat.has_tangent(cotangent):
            part = transposed_dot(cotangent, x.aval, w, **params)
            total = ad.add_tangents(total, part)
    return [total, *[None] * len(leaves)]


quantized_dots_p.def_abstract_eval(_abstract_eval)
batching.fancy_primitive_batchers[quantized_dots_p] = _batch
ad.primitive_jvps[quantized_dots_p] = jvp_rule(quantized_dots_p, split_weights, bind_dots)
ad.primitive_transposes[quantized_dots_p] = _transpose
register_lowerings(quantized_dots_p, _lower)
