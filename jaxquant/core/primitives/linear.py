"""The machinery that convolution and ragged dot share.

Without an activation scheme they are linear in x and need one recipe for everything: the float
primitive's own typing rule on the float array the weight stands for, and the reference's transpose
and batching rules. With one, gradients pass it straight through. `conv.py` and `ragged.py` call
`make_linear_primitive`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jaxquant.core import _compat
from jaxquant.core.primitives.weights import (
    batch_in_front,
    bind_leaves,
    logical_aval,
    refuse_gradient,
)
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant


def make_linear_primitive(
    name: str,
    float_primitive: Any,
    compute: Callable[..., jax.Array],
    *,
    batch_together: bool = False,
) -> Any:
    """A primitive over `(x, *leaves of w, *extras)`.

    Args:
      name: its name.
      float_primitive: the primitive of `(x, w, *extras)` that it stands for; has the same
        parameters, but for `act`.
      compute: `(x, w, *extras, act, **parameters)` to the result, linear in x if `act` is None.
      batch_together: vmap gives every operand a leading batch axis before it batches `compute`.
        JAX's ragged dot can be batched in no other way.

    Returns:
      The primitive with all its rules. Batching inlines `compute`.
    """
    primitive = _compat.make_primitive(name)

    def flat(x: jax.Array, *leaves: jax.Array, tree: Any, **params: Any) -> jax.Array:
        w, *extras = unflatten_all(tree, leaves)
        return compute(x, w, *extras, **params)

    def abstract_eval(
        x: Any, *leaves: Any, tree: Any, act: ActQuant | None, **params: Any
    ) -> Any:
        w, *extras = unflatten_all(tree, leaves)
        return float_primitive.abstract_eval(x, logical_aval(w), *extras, **params)[0]

    def jvp(primals: Any, tangents: Any, *, tree: Any, **params: Any) -> tuple[Any, Any]:
        x_tangent, *leaf_tangents = tangents
        refuse_gradient(name, tree, leaf_tangents)
        out = primitive.bind(*primals, tree=tree, **params)
        if not _compat.has_tangent(x_tangent):
            return out, _compat.zero_tangent(out)
        params["act"] = None
        return out, primitive.bind(x_tangent, *primals[1:], tree=tree, **params)

    def transpose(cotangent: Any, x: Any, *leaves: Any, tree: Any, **params: Any) -> list[Any]:
        if params["act"] is not None:
            raise TypeError(f"{name} with quantized activations is not linear; take jax.vjp")
        if not _compat.has_tangent(cotangent):
            return [ad.Zero(x.aval)] + [None] * len(leaves)

        def of_x(x: jax.Array) -> jax.Array:
            return flat(x, *leaves, tree=tree, **params)

        (x_bar,) = jax.linear_transpose(of_x, x.aval)(cotangent)
        return [x_bar] + [None] * len(leaves)

    def batch(
        axis_data: Any, args: Any, dims: Any, *, tree: Any, **params: Any
    ) -> tuple[jax.Array, int]:
        x, *leaves = args
        x_dim, *leaf_dims = dims
        leaves, leaf_dims = _equalize(tree, leaves, leaf_dims, axis_data.size)
        if batch_together:
            pairs = zip((x, *leaves), (x_dim, *leaf_dims), strict=True)
            x, *leaves = (_leading(part, dim, axis_data.size) for part, dim in pairs)
            x_dim, leaf_dims = 0, [0] * len(leaves)

        def one(x: jax.Array, *leaves: jax.Array) -> jax.Array:
            return flat(x, *leaves, tree=tree, **params)

        return jax.vmap(one, (x_dim, *leaf_dims), axis_size=axis_data.size)(x, *leaves), 0

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, _compat.lower_without_shardings(flat))
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.fancy_primitive_batchers[primitive] = batch
    return primitive


def bind_linear(
    primitive: Any, x: jax.Array, w: QTensor, *extras: Any, act: ActQuant | None, **params: Any
) -> jax.Array:
    """Binds a primitive made here; `act` says what happens to x, whatever the weight says.

    Raises:
      ValueError: a static activation scheme without input_scale.
    """
    static = act is not None and act.static
    if static and w.input_scale is None:
        raise ValueError(
            f"the weight's activation scheme is static ({w.act}), but it has no input_scale: "
            "quantize with calibration batches, or use a dynamic scheme"
        )
    leaves, tree = jax.tree.flatten((bind_leaves(w, keep_input_scale=static), *extras))
    x, *leaves = _compat.match_varying(x, *leaves)
    return primitive.bind(x, *leaves, tree=tree, act=act, **params)


def float_parameters(fn: Callable[..., Any], *operands: Any) -> dict[str, Any]:
    """The canonical parameters with which `fn` binds its one primitive on such operands."""
    shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands]
    return dict(jax.make_jaxpr(fn)(*shapes).eqns[-1].params)


def result_dtype(x: jax.Array, w: QTensor, preferred: Any) -> Any:
    """Dtype of the float primitive's result."""
    return preferred or jnp.promote_types(x.dtype, w.dtype)


def unflatten_all(tree: Any, leaves: Any) -> tuple[Any, ...]:
    """`(w, *extras)` of a primitive's operands."""
    return jax.tree.unflatten(tree, leaves)


def _equalize(tree: Any, leaves: Any, dims: Any, size: int) -> tuple[list[Any], list[Any]]:
    """Batches all parts of the weight, if one of them is batched; extras stay as they are."""
    w, *extras = unflatten_all(tree, list(zip(leaves, dims, strict=True)))
    pairs, w_tree = jax.tree.flatten(w, is_leaf=lambda t: type(t) is tuple)
    if any(dim is not None for _, dim in pairs):
        w = batch_in_front(w_tree, [p for p, _ in pairs], [d for _, d in pairs], size)
        pairs = [(jnp.broadcast_to(p, (size, *p.shape[1:])), 0) for p in jax.tree.leaves(w)]
    pairs = [*pairs, *extras]
    return [p for p, _ in pairs], [d for _, d in pairs]


def _leading(part: jax.Array, dim: int | None, size: int) -> jax.Array:
    """The part with its batch axis in front; broadcast, if it has none."""
    if dim is None:
        return jnp.broadcast_to(part, (size, *part.shape))
    return jnp.moveaxis(part, dim, 0)
