"""Tiny models as plain functions, and their quantized trees, for the tests of compare."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.quantize_array import quantize_array

VOCABULARY, WIDTH = 23, 16


def lm(params, tokens):
    """Next-token logits ``[B, T, V]``: bigrams through one hidden layer."""
    return jnp.tanh(params["embed"][tokens] @ params["up"]) @ params["head"]


def lm_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCABULARY, WIDTH), "up": (WIDTH, WIDTH), "head": (WIDTH, VOCABULARY)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def quantized(params, qtype="int8"):
    """Every matrix with a scale per output channel."""
    return jax.tree.map(lambda w: quantize_array(w, qtype, (w.shape[0], 1)), params)


def dequantized(tree):
    is_leaf = lambda leaf: hasattr(leaf, "dequantize")  # noqa: E731
    return jax.tree.map(lambda w: w.dequantize() if is_leaf(w) else w, tree, is_leaf=is_leaf)


def tokens(seed, rows=3, length=7):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length))


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
