"""QTensors as operands of primitives: leaves in, leaves out, and what both share.

A primitive takes `(x, *leaves of w)` and holds the tree of w in its parameters. Used by the
primitives' rules only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core import _compat
from jaxquant.core.codes import code_values
from jaxquant.core.qtensor import QTensor
from jaxquant.core.schemes import ActScheme
from jaxquant.core.turns import input_of
from jaxquant.pallas_kernels.activation import ActQuant

_NO_GRADIENT = (
    "{name}: a gradient with respect to the {part} of a quantized weight was asked for, and codes "
    "have none. Differentiate with respect to the float arguments only (jax.grad's argnums, or "
    "jax.lax.stop_gradient around the QTensors); to adapt quantized weights train float leaves "
    "beside them."
)


def bind_leaves(w: QTensor, keep_input_scale: bool = False) -> QTensor:
    """The parts of a weight that a product reads; what its op does besides goes into parameters.

    Raises:
      ValueError: the weight has an input factor or turn: a product with its codes is none with it.
    """
    if w.input_factor is not None or w.input_turn is not None:
        raise ValueError(f"{w!r}: its input must be transformed first (see jaxquant.core.turns)")
    input_scale = w.input_scale if keep_input_scale else None
    return w.replace(
        act=None, op_rules=(), input_scale=input_scale, input_group=None, contracted=None
    )


def without_input_transform(w: QTensor) -> QTensor:
    """What the codes stand for, whatever is done to the input."""
    return w.replace(input_factor=None, input_turn=None)


def transformed(
    x: jax.Array, w: QTensor, places: Sequence[int | None]
) -> tuple[jax.Array, QTensor]:
    """The input as the weight wants it, and what the codes stand for.

    Args:
      x: the input.
      w: the weight.
      places: for each axis of the weight the axis of x that it meets, or None.

    Raises:
      UnmetInputError: see `jaxquant.core.turns.input_of`.
    """
    return input_of(x, w.input_factor, w.input_turn, places), without_input_transform(w)


def unflatten(tree: Any, leaves: Sequence[Any]) -> QTensor:
    """The QTensor of a primitive's operands."""
    return jax.tree.unflatten(tree, leaves)


def logical_aval(w: QTensor) -> Any:
    """The float array a QTensor of avals stands for, with the sharding type of its codes."""
    return w.codes.update(shape=w.shape, dtype=np.dtype(w.dtype), weak_type=False)


def act_quant(act: ActScheme, x_ndim: int, contract: Sequence[int]) -> ActQuant:
    """The scheme of a recipe for an x of `x_ndim` axes of which `contract` are contracted."""
    axes = range(x_ndim) if act.granularity == "tensor" else contract
    dtype = "float8_e4m3fn" if act.qtype == "float8_e4m3" else act.qtype
    return ActQuant(dtype, tuple(sorted(axes)), act.mode == "static")


def reference_parts(w: QTensor) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`(values, scale, zero_point)` as `jaxquant.pallas_kernels.reference` takes them.

    E2M1 tables become int8: twice their values are integers, so the scale is halved.
    """
    scale = w.scale.dequantize() if isinstance(w.scale, QTensor) else w.scale
    if scale.dtype.itemsize < 4:
        scale = scale.astype(jnp.float32)
    codes = w.unpacked_codes()
    if w.qtype.table is None:
        return codes, scale, w.zero_point
    values = code_values(codes, w.qtype)
    if not _doubles_to_integers(w):
        return values, scale, w.zero_point
    return (values * 2).astype(jnp.int8), scale * 0.5, w.zero_point


def reference_dtype(w: QTensor) -> np.dtype:
    """Dtype of the values that `reference_parts` returns."""
    if w.qtype.table is None:
        return jnp.dtype(w.codes.dtype if w.packed_axis is None else "int8")
    return jnp.dtype("int8" if _doubles_to_integers(w) else "float32")


def _doubles_to_integers(w: QTensor) -> bool:
    assert w.qtype.table is not None
    return all(float(2 * v).is_integer() for v in w.qtype.table)


def refuse_gradient(name: str, tree: Any, tangents: Sequence[Any]) -> None:
    """Raises where the tangent of any part of a weight is not a symbolic zero.

    Raises:
      TypeError: names the part and what to do.
    """
    if not any(_compat.has_tangent(t) for t in tangents):
        return
    marked = unflatten(tree, [_compat.has_tangent(t) for t in tangents])
    keys = [
        jax.tree_util.keystr(k) for k, hit in jax.tree_util.tree_leaves_with_path(marked) if hit
    ]
    raise TypeError(_NO_GRADIENT.format(name=name, part=" and ".join(k.strip(".") for k in keys)))


def batch_in_front(tree: Any, leaves: Sequence[Any], dims: Sequence[Any], size: int) -> QTensor:
    """A weight with a new leading axis: of `size`, or 1 on parts that are the same for all.

    Args:
      tree: tree of the weight.
      leaves: its leaves, batched or not.
      dims: where each leaf's batch axis lies, or None.
      size: length of the batch axis.

    Returns:
      A QTensor whose codes have the leading axis in full.
    """
    moved = [
        jnp.expand_dims(leaf, 0) if dim is None else jnp.moveaxis(leaf, dim, 0)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    return _with_full_codes(unflatten(tree, moved), size)


def _with_full_codes(w: QTensor, size: int) -> QTensor:
    """Broadcasts the leading axis of codes, and of a scale that must match its zero points."""
    scale, zero_point = w.scale, w.zero_point
    if isinstance(scale, QTensor):
        batched = any(leaf.shape[0] != 1 for leaf in jax.tree.leaves(scale))
        if batched or (zero_point is not None and zero_point.shape[0] != 1):
            scale = _with_full_codes(scale, size)
    if zero_point is not None and zero_point.shape[0] != scale.shape[0]:
        scale = scale if isinstance(scale, QTensor) else _lead(scale, size)
        zero_point = _lead(zero_point, size)
    return w.replace(codes=_lead(w.codes, size), scale=scale, zero_point=zero_point)


def _lead(part: jax.Array, size: int) -> jax.Array:
    return jnp.broadcast_to(part, (size, *part.shape[1:]))
