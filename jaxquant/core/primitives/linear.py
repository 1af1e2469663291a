"""The machinery that convolution and ragged dot share.

Without an activation scheme they are linear in x and need one recipe for everything: the float
primitive's own typing rule on the float array the weight stands for, and the reference's transpose
and batching rules. With one, gradients pass it straight through. `conv.py` and `ragged.py` call
`make_linear_primitive`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxquant.core import _compat
from jaxquant.core.primitives.dot import check_quantized, register_lowerings, split_operands
from jaxquant.core.primitives.kernels import run_kernel
from jaxquant.core.primitives.read_late import read_late
from jaxquant.core.primitives.weights import (
    batch_in_front,
    bind_leaves,
    logical_aval,
    refuse_gradient,
)
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.dispatch import PLATFORMS, Choice, Place
from jaxquant.pallas_kernels.spmd import PartitionedProduct


def make_linear_primitive(
    name: str,
    float_primitive: Any,
    compute: Callable[..., jax.Array],
    *,
    batch_together: bool = False,
    choose: Callable[..., Choice] | None = None,
    partitioned: Callable[..., PartitionedProduct | None] | None = None,
    transposed: Callable[..., jax.Array | None] | None = None,
) -> Any:
    """A primitive over `(x, *leaves of w, *extras)`, or with codes and scale of x behind x.

    Args:
      name: its name.
      float_primitive: the primitive of `(x, w, *extras)` that it stands for; has the same
        parameters, but for `act`, `x_quantized` and, with `choose`, `implementation`.
      compute: `(x, w, *extras, act, quantized_x, **parameters)` to the result, linear in x if
        `act` is None; `quantized_x` is nothing, or x's codes and scale.
      batch_together: vmap gives every operand a leading batch axis before it batches `compute`.
        JAX's ragged dot can be batched in no other way.
      choose: `(x, w, *extras, place=, out_dtype=, **parameters)` of abstract values to the kernel
        that the product is lowered to, or XLA; None where there are no kernels.
      partitioned: of the same arguments, XLA's operations on each device's part where `choose`
        found no kernel; gives None for those of the whole product. None where it always is so.
      transposed: `(cotangent, x, w, *extras, **parameters)` to the cotangent of x as such a
        product too, `x` being abstract; gives None for the transpose of `compute`. None likewise.

    Returns:
      The primitive with all its rules. Batching inlines `compute`.
    """
    primitive = _compat.make_primitive(name)

    def flat(*args: jax.Array, tree: Any, x_quantized: bool, **params: Any) -> jax.Array:
        x, quantized, leaves = split_operands(args, x_quantized)
        w, *extras = unflatten_all(tree, leaves)
        return compute(x, w, *extras, quantized_x=quantized, **params)

    def abstract_eval(
        *args: Any, tree: Any, act: ActQuant | None, x_quantized: bool, **params: Any
    ) -> Any:
        x, quantized, leaves = split_operands(args, x_quantized)
        check_quantized(x, quantized, act)
        w, *extras = unflatten_all(tree, leaves)
        params.pop("implementation", None)  # of no influence on types
        return float_primitive.abstract_eval(x, logical_aval(w), *extras, **params)[0]

    def jvp(
        primals: Any, tangents: Any, *, tree: Any, x_quantized: bool, **params: Any
    ) -> tuple[Any, Any]:
        x_tangent, _, leaf_tangents = split_operands(tangents, x_quantized)
        _, _, leaves = split_operands(primals, x_quantized)
        refuse_gradient(name, tree, leaf_tangents)
        out = primitive.bind(*primals, tree=tree, x_quantized=x_quantized, **params)
        if not _compat.has_tangent(x_tangent):
            return out, _compat.zero_tangent(out)
        params |= {"act": None, "x_quantized": False}
        if "implementation" in params:  # derivatives choose for themselves
            params["implementation"] = None
        return out, primitive.bind(x_tangent, *leaves, tree=tree, **params)

    def transpose(cotangent: Any, x: Any, *leaves: Any, tree: Any, **params: Any) -> list[Any]:
        if params["act"] is not None:
            raise TypeError(f"{name} with quantized activations is not linear; take jax.vjp")
        if not _compat.has_tangent(cotangent):
            return [ad.Zero(x.aval)] + [None] * len(leaves)

        if transposed is not None:
            w, *extras = unflatten_all(tree, leaves)
            x_bar = transposed(cotangent, x.aval, w, *extras, **params)
            if x_bar is not None:
                return [x_bar] + [None] * len(leaves)

        def of_x(x: jax.Array) -> jax.Array:
            return flat(x, *leaves, tree=tree, **params)

        (x_bar,) = jax.linear_transpose(of_x, x.aval)(cotangent)
        return [x_bar] + [None] * len(leaves)

    def batch(
        axis_data: Any, args: Any, dims: Any, *, tree: Any, x_quantized: bool, **params: Any
    ) -> tuple[jax.Array, int]:
        if params.get("implementation") == "pallas":
            raise ValueError(
                f"implementation='pallas', but vmap makes XLA's operations of a {name}; leave it"
                " out, or map by hand (jax.lax.map)"
            )
        x, quantized, leaves = split_operands(args, x_quantized)
        x_dim, quantized_dims, leaf_dims = split_operands(dims, x_quantized)
        leaves, leaf_dims = _equalize(tree, leaves, leaf_dims, axis_data.size)
        operands, at = (x, *quantized, *leaves), (x_dim, *quantized_dims, *leaf_dims)
        if batch_together:
            pairs = zip(operands, at, strict=True)
            operands = tuple(_leading(part, dim, axis_data.size) for part, dim in pairs)
            at = (0,) * len(operands)

        def one(*operands: jax.Array) -> jax.Array:
            return flat(*operands, tree=tree, x_quantized=x_quantized, **params)

        return jax.vmap(one, at, axis_size=axis_data.size)(*operands), 0

    def lower(
        ctx: Any, *args: Any, platform: str, tree: Any, x_quantized: bool, **params: Any
    ) -> Any:
        choice: Choice | None = None
        surroundings: dict[str, Any] = {}
        if choose and (platform in PLATFORMS or params["implementation"] == "pallas"):
            device, devices, manual = _compat.lowering_devices(ctx)
            kind = None if device is None else device.device_kind
            place = Place(platform or "a platform without kernels", kind, devices, manual)
            x, _, leaves = split_operands(ctx.avals_in, x_quantized)
            operands = (x, *unflatten_all(tree, leaves))
            dtype = ctx.avals_out[0].dtype
            choice = choose(*operands, place=place, out_dtype=dtype, **params)
            if choice.run is None and partitioned is not None:
                run = partitioned(*operands, place=place, **params)
                choice = dataclasses.replace(choice, run=run)
            if choice.run is not None:
                surroundings["device"] = _compat.abstract_device(device)
            if isinstance(choice.run, PartitionedProduct):
                surroundings["mesh_axes"] = _compat.mesh_axes(x)

        def fn(*args: jax.Array) -> jax.Array:
            x, quantized, leaves = split_operands(args, x_quantized)
            w, *extras = unflatten_all(tree, leaves)
            if choice is not None and choice.run is not None:
                return run_kernel(choice, x, quantized, w, *extras)
            if platform == "cpu":
                x, quantized, w = read_late(x, quantized, w, params["act"])
            return compute(x, w, *extras, quantized_x=quantized, **params)

        return _compat.lower_without_shardings(fn, **surroundings)(ctx, *args)

    primitive.def_abstract_eval(abstract_eval)
    register_lowerings(primitive, lower)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.fancy_primitive_batchers[primitive] = batch
    return primitive


def bind_linear(
    primitive: Any,
    x: jax.Array,
    w: QTensor,
    *extras: Any,
    act: ActQuant | None,
    quantized_x: Sequence[jax.Array] = (),
    **params: Any,
) -> jax.Array:
    """Binds a primitive made here; `act` says what happens to x, whatever the weight says.

    Codes and scale of x that are given already are `quantized_x`.

    Raises:
      ValueError: a static activation scheme without input_scale.
    """
    static = act is not None and act.static and not quantized_x
    if static and w.input_scale is None:
        raise ValueError(
            f"the weight's activation scheme is static ({w.act}), but it has no input_scale: "
            "quantize with calibration batches, or use a dynamic scheme"
        )
    leaves, tree = jax.tree.flatten((bind_leaves(w, keep_input_scale=static), *extras))
    operands = _compat.match_varying(x, *quantized_x, *leaves)
    return primitive.bind(*operands, tree=tree, act=act, x_quantized=bool(quantized_x), **params)


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
