"""Next-token loss of a decoder, for training and for evaluation by slice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy in nats of predicting `tokens[:, 1:]`.

    Args:
      logits: [B, T, V], the outputs at `tokens` (the last position predicts nothing), or at
        `tokens[:, :-1]`, that is [B, T - 1, V].
      tokens: int32 [B, T].

    Returns:
      float32 scalar.

    Raises:
      ValueError: the lengths fit neither form.
    """
    targets = tokens[:, 1:]
    if logits.shape[1] == tokens.shape[1]:
        logits = logits[:, :-1]
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits {logits.shape} do not line up with tokens {tokens.shape}; "
            "give logits at every token, or at all but the last"
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.mean(losses)


def slice_losses(
    apply: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    batches: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, float]:
    """Mean loss in nats a token of every slice.

    Args:
      apply: `apply(variables, tokens) -> logits`; `model.apply` will do. It is jitted here and
        has to be hashable.
      variables: handed through untouched, so quantized leaves are fine.
      batches: slice name to int32 arrays [B, T] of one shape, as `shipped.held_out` gives them.
    """
    return {
        name: float(np.mean([float(_batch_loss(apply, variables, tokens)) for tokens in group]))
        for name, group in batches.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def _batch_loss(apply: Callable[..., jax.Array], variables: Any, tokens: jax.Array) -> jax.Array:
    return next_token_loss(apply(variables, tokens), tokens)


def perplexity(loss: float) -> float:
    """exp(loss)."""
    return math.exp(loss)
