"""Drawing a token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Filters compose: top-k first, then top-p of what is left.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: keep the k most likely tokens; None keeps all.
      top_p: keep the fewest tokens whose probability reaches p (Holtzman et al. 2020,
        arXiv:1904.09751); None keeps all.

    Raises:
      ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1 or None; got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or None; got {self.top_p}")


GREEDY = Sampling(temperature=0.0)


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token a row.

    Args:
      logits: [B, V].
      key: PRNG key, unused when greedy.
      sampling: how to draw.

    Returns:
      int32 [B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the `k` largest of [B, V] to -inf; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    smallest_kept = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= smallest_kept, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest most likely tokens of [B, V] that reach probability `p`, at least one."""
    descending = jnp.sort(logits, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(descending, axis=-1)
    # A token stays while the ones before it have not reached p, so the first always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest_kept = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest_kept, logits, -jnp.inf)
