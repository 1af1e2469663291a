"""`dequantize`: a QTensor to floats, as a primitive that plans and jaxprs can show.

The rewriter uses it where a weight meets an operation that has no quantized form, and behind an
embedding's gather (of the rows that were looked up). The arithmetic is `QTensor.dequantize`.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from jaxquant.core import _compat
from jaxquant.core.primitives.weights import (
    batch_in_front,
    bind_leaves,
    logical_aval,
    refuse_gradient,
    unflatten,
    without_input_transform,
)
from jaxquant.core.qtensor import QTensor
from jaxquant.core.turns import weight_of

dequantize_p = _compat.make_primitive("dequantize")


def dequantize(w: QTensor) -> jax.Array:
    """The float array that `w` stands for; shape `w.shape`, dtype `w.dtype`."""
    leaves, tree = jax.tree.flatten(bind_leaves(without_input_transform(w)))
    values = dequantize_p.bind(*_compat.match_varying(*leaves), tree=tree)
    return weight_of(values, w.input_factor, w.input_turn)


def _batch(
    axis_data: Any, leaves: tuple[Any, ...], dims: tuple[Any, ...], *, tree: Any
) -> tuple[jax.Array, int]:
    return dequantize(batch_in_front(tree, leaves, dims, axis_data.size)), 0


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], *, tree: Any) -> tuple[Any, Any]:
    refuse_gradient(dequantize_p.name, tree, tangents)
    out = dequantize_p.bind(*primals, tree=tree)
    return out, _compat.zero_tangent(out)


def _compute(*leaves: jax.Array, tree: Any) -> jax.Array:
    return unflatten(tree, leaves).dequantize()


dequantize_p.def_abstract_eval(lambda *leaves, tree: logical_aval(unflatten(tree, leaves)))
batching.fancy_primitive_batchers[dequantize_p] = _batch
ad.primitive_jvps[dequantize_p] = _jvp
mlir.register_lowering(dequantize_p, _compat.lower_without_shardings(_compute))
