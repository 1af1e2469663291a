"""What a quantized tree costs and what it changed: measured bytes, and error per weight.

For: :mod:`jaxquant.evaluate.compare`. Looks at leaves only and never at a model. Leaves of the two
trees are matched by their key path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.names import path_string
from jaxquant.core.qtensor import QTensor
from jaxquant.evaluate.results import Memory, WeightError
from jaxquant.evaluate.summary import decibels


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths, which need not differ (collections); a QTensor is one leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]
    return [(path_string(path), leaf) for path, leaf in leaves]


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a QTensor."""
    return isinstance(leaf, QTensor)


def measure_memory(float_tree: Any, tree: Any) -> Memory:
    """Measures a tree beside the float tree it came from.

    Args:
      float_tree: the float parameters.
      tree: the same with QTensor leaves, or the float tree itself.

    Returns:
      Bytes as the device reports them (by format for leaves that are on no device).
    """
    floats, leaves = named_leaves(float_tree), named_leaves(tree)
    codes = [(path, leaf) for path, leaf in leaves if is_quantized(leaf)]
    by_path = dict(floats)
    return Memory(
        total=sum(_device_bytes(leaf) for _, leaf in leaves),
        quantized=sum(_device_bytes(leaf) for _, leaf in codes),
        quantized_float=sum(
            _device_bytes(by_path[path]) if path in by_path else leaf.size * leaf.dtype.itemsize
            for path, leaf in codes
        ),
        quantized_bf16=sum(2 * leaf.size for _, leaf in codes),
        total_bf16=sum(_bf16_bytes(leaf) for _, leaf in floats),
        total_float=sum(_device_bytes(leaf) for _, leaf in floats),
        leaves=len(codes),
    )


def weight_errors(
    float_tree: Any, tree: Any, layer_axes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[WeightError, ...]:
    """Signal to quantization noise of every quantized parameter.

    Args:
      float_tree: the float parameters.
      tree: the same with QTensor leaves.
      layer_axes: parameter path to the axes that stack layers; each layer is then measured by
        itself.

    Returns:
      One entry per quantized parameter, or per layer of a stacked one, in the tree's order.
      Parameters without a float leaf of the same shape at their path are left out.
    """
    floats, layer_axes = dict(named_leaves(float_tree)), layer_axes or {}
    errors = []
    for path, leaf in named_leaves(tree):
        weight = floats.get(path)
        if not is_quantized(leaf) or getattr(weight, "shape", None) != leaf.shape:
            continue
        stacked = tuple(layer_axes.get(path, ()))
        others = tuple(axis for axis in range(leaf.ndim) if axis not in stacked)
        signal, noise = (np.asarray(x).ravel() for x in _powers(weight, leaf, others))
        for layer, (s, n) in enumerate(zip(signal, noise, strict=True)):
            db = decibels(float(s) / float(n)) if n > 0 else math.inf
            errors.append(WeightError(path, layer if stacked else None, leaf.qtype.name, db))
    return tuple(errors)


@functools.partial(jax.jit, static_argnums=2)
def _powers(weight: jax.Array, leaf: QTensor, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Sums of squares of the weight and of its error over ``axes``, in float32."""
    exact = weight.astype(jnp.float32)
    error = leaf.dequantize().astype(jnp.float32) - exact
    return jnp.square(exact).sum(axes), jnp.square(error).sum(axes)


def _device_bytes(leaf: Any) -> int:
    if is_quantized(leaf):
        return leaf.nbytes_on_device()
    if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return int(leaf.on_device_size_in_bytes())
    return int(getattr(leaf, "nbytes", 0))


def _bf16_bytes(leaf: Any) -> int:
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return 2 * math.prod(leaf.shape) if floating else _device_bytes(leaf)
