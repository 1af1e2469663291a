"""The weightless parts of the decoder, shared by the Linen and the NNX modules.

Everything here is a plain function of arrays: rotary embeddings, the attention product and the
bookkeeping of positions. The modules own parameters and caches; they never repeat this arithmetic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, arXiv:2104.09864).

    Args:
      positions: int32 [B, T]; negative entries mark padding and may get any angle.
      head_dim: width of a head, even.
      theta: base of the frequencies.

    Returns:
      Two float32 arrays [B, T, 1, head_dim / 2]; the unit axis broadcasts over heads.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[..., None, None] * (theta**-exponents)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates feature i of `x` [B, T, heads, head_dim] against feature i + head_dim / 2.

    The product is taken in float32 (angles of late positions lose bits in bfloat16) and returned
    in the dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_mask(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """What each query may look at: keys at its own or an earlier position, never padding.

    Args:
      query_positions: int32 [B, T].
      key_positions: int32 [B, S]; negative for padding and for unwritten cache slots.

    Returns:
      bool [B, T, S].
    """
    keys = key_positions[:, None, :]
    return (keys >= 0) & (keys <= query_positions[:, :, None])


def grouped_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention in which each key/value head serves H / K query heads.

    Args:
      query: [B, T, H, head_dim].
      key: [B, S, K, head_dim].
      value: [B, S, K, head_dim].
      mask: bool [B, T, S]. A query that may see nothing (padding) gets the mean value, not NaN.

    Returns:
      [B, T, H, head_dim] in the dtype of `query`.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, keys = key.shape[2], key.shape[1]
    # Query heads of one key head are stacked as rows, [B, K, G T, head_dim]: then the results of
    # the products lie as the softmax reads them. With an axis for each of G and T they came out
    # transposed, and XLA turned all B H T S scores twice.
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    rows = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum("bkrd,bskd->bkrs", rows * head_dim**-0.5, key)
    scores = scores.astype(jnp.float32).reshape(batch, heads, length, keys)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    probabilities = probabilities.reshape(batch, kv_heads, -1, keys)
    mixed = jnp.einsum("bkrs,bskd->bkrd", probabilities, value)
    return mixed.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)


def check_tokens(tokens: jax.Array, max_length: int) -> None:
    """Raises ValueError unless `tokens` is [B, T] with T <= max_length."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch, length]; got shape {tuple(tokens.shape)}")
    if tokens.shape[1] > max_length:
        raise ValueError(
            f"a sequence of {tokens.shape[1]} tokens does not fit max_length={max_length}; "
            "shorten it or raise DecoderConfig.max_length"
        )


def check_cache(
    index: jax.Array, cached_positions: jax.Array, tokens: jax.Array, max_length: int
) -> None:
    """Raises ValueError unless `tokens` [B, T] fit into the rest of a cache for B rows.

    Under a trace the index is unknown and nothing is checked: `dynamic_update_slice` would then
    clamp silently, so jitted callers (`generate`) check the total length before they start.
    """
    batch, new_tokens = tokens.shape
    if cached_positions.shape[0] != batch:
        raise ValueError(
            f"the KV cache was made for batch_size={cached_positions.shape[0]}; "
            f"tokens have {batch} rows"
        )
    if isinstance(index, jax.core.Tracer):
        return
    if int(index) + new_tokens > max_length:
        raise ValueError(
            f"the KV cache holds {int(index)} of max_length={max_length} positions; "
            f"{new_tokens} more do not fit"
        )
