"""A decoder small enough to compile in a second, with every part of the real one."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxquant.models import DecoderConfig, linen, params

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_length=16,
)


@functools.cache
def checkpoint(tie_embeddings: bool = True) -> params.Flat:
    """Random parameters; norm scales too, so that a swapped norm shows."""
    config = CONFIG.replace(tie_embeddings=tie_embeddings)
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(1.0 if name.endswith("scale") else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in params.parameter_shapes(config).items()
    }


def linen_model(**changes):
    """A Linen decoder and its variables from the checkpoint."""
    config = CONFIG.replace(**changes)
    flat = checkpoint(config.tie_embeddings)
    return linen.Decoder(config), {"params": params.to_linen(flat, config)}


def nnx_model(**changes):
    """An NNX decoder from the same checkpoint."""
    config = CONFIG.replace(**changes)
    return params.to_nnx(checkpoint(config.tie_embeddings), config)


def tokens(batch: int = 2, length: int = 10) -> jax.Array:
    """Random tokens."""
    return jax.random.randint(jax.random.key(7), (batch, length), 3, CONFIG.vocab_size)


def logits(tokens) -> jax.Array:
    """Full forward of the scanned Linen decoder, compiled once a shape."""
    model, variables = linen_model()
    return _apply(model, variables, tokens)


_apply = jax.jit(lambda model, variables, tokens: model.apply(variables, tokens), static_argnums=0)
