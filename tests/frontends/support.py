"""QTensor trees without ptq, and comparisons, for the frontends' tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant.core.names import path_string
from jaxquant.core.qtensor import QTensor, is_qtensor, make_qtensor

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def int8(w: jax.Array, contracted: tuple[int, ...]) -> QTensor:
    """Symmetric int8 with one scale for each index of the axes that are not contracted."""
    scale = jnp.max(jnp.abs(w), axis=contracted, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1, scale)
    return make_qtensor(jnp.round(w / scale).astype(jnp.int8), scale, qtype="int8", dtype=w.dtype)


def quantize_leaf(path: str, w: jax.Array, stacked: str = "\0") -> jax.Array | QTensor:
    """Kernels and embeddings become int8; one scale per output channel."""
    last = path.rsplit("/", 1)[-1]
    first = 1 if stacked in path else 0
    if last == "embedding":
        return int8(w, (w.ndim - 1,))
    if last != "kernel" and not last.endswith("_w"):
        return w
    if "/out" in path or path.startswith("out"):  # attention: heads and head size contracted
        return int8(w, tuple(range(first, w.ndim - 1)))
    if w.ndim - first == 3:  # DenseGeneral (in, heads, head size)
        return int8(w, (first,))
    return int8(w, tuple(range(first, w.ndim - 1)))


def quantize_tree(tree, stacked: str = "\0"):
    """A variables or parameters tree, or an nnx.State, with QTensor kernels and embeddings."""

    def leaf(path, w):
        return quantize_leaf(path_string(path), w, stacked)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def dequantize_tree(tree):
    return jax.tree_util.tree_map(
        lambda x: x.dequantize() if is_qtensor(x) else x, tree, is_leaf=is_qtensor
    )


def qtensor_count(tree) -> int:
    return sum(map(is_qtensor, jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor)))


def quantize_module(model: nnx.Module, stacked: str = "\0") -> nnx.Module:
    """A copy of an NNX module with QTensor parameters."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, quantize_tree(params, stacked), rest)


def dequantized_module(model: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, dequantize_tree(state))


def raw(tree):
    """Leaves as numpy arrays; typed keys as their data."""
    return jax.tree_util.tree_map(
        lambda x: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        tree,
    )


def assert_identical(a, b) -> None:
    """Same structure and bit-identical leaves."""
    assert jax.tree_util.tree_structure(a) == jax.tree_util.tree_structure(b)
    for x, y in zip(jax.tree_util.tree_leaves(raw(a)), jax.tree_util.tree_leaves(raw(b))):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b) -> None:
    """Same structure, leaves equal to rounding."""
    assert jax.tree_util.tree_structure(a) == jax.tree_util.tree_structure(b)
    for x, y in zip(jax.tree_util.tree_leaves(raw(a)), jax.tree_util.tree_leaves(raw(b))):
        np.testing.assert_allclose(x, y, **TOLERANCE)
