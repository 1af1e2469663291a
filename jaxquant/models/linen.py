"""The decoder in Flax Linen. Plain Flax code: a user's model, to which the library is applied.

Parameter names (`L` subtrees `layers_0` ... without `scan_layers`, one stacked `layers` with it):

    embed/embedding [V, D]
    layers/attention_norm/scale [D]
    layers/attention/{query [D, H, head_dim], key, value [D, K, head_dim]}/kernel
    layers/attention/out/kernel [H, head_dim, D]
    layers/mlp_norm/scale [D]
    layers/mlp/{gate, up [D, F], down [F, D]}/kernel
    norm/scale [D]
    lm_head/kernel [D, V]          (untied only)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models import functional
from jaxquant.models.config import DecoderConfig

_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class Decoder(nn.Module):
    """A Llama-shaped language model: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
      config: shape and numerics.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        decode: bool = False,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token at every position.

        Args:
          tokens: int32 [B, T].
          decode: append to the KV cache (collection `cache`, which must be mutable) and attend to
            all that it holds. The first such call creates the cache, so a prefill of the whole
            prompt and then single tokens need no separate set-up.
          positions: int32 [B, T]; by default 0 ... T-1, or where the cache ends. Negative positions
            mark padding: no query attends to them.

        Returns:
          float32 [B, T, V].

        Raises:
          ValueError: `tokens` is not [B, T], is longer than `max_length`, does not fit the rest of
            the cache (outside of a trace, where the fill is known), or the cache has another
            batch size.
        """
        config = self.config
        functional.check_tokens(tokens, config.max_length)
        batch, length = tokens.shape

        start: Any = 0
        if decode:
            index = self.variable("cache", "index", lambda: jnp.zeros((), jnp.int32))
            filled = self.variable(
                "cache", "positions", lambda: jnp.full((batch, config.max_length), -1, jnp.int32)
            )
            functional.check_cache(index.value, filled.value, tokens, config.max_length)
            start = index.value
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), tokens.shape)
        positions = jnp.asarray(positions, jnp.int32)
        key_positions = positions
        if decode:
            key_positions = jax.lax.dynamic_update_slice(filled.value, positions, (0, start))
            if not self.is_initializing():
                filled.value = key_positions
                index.value = start + length

        cos, sin = functional.rope_tables(positions, config.head_dim, config.rope_theta)
        mask = functional.causal_mask(positions, key_positions)
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(config.hidden_size**-0.5),
            name="embed",
        )
        x = embed(tokens)
        x = self._run_layers(x, (cos, sin, mask, jnp.asarray(start, jnp.int32)), decode)
        x = _norm(config, "norm")(x)
        if config.tie_embeddings:
            logits = embed.attend(x)
        else:
            logits = _dense(config, config.vocab_size, "lm_head")(x)
        return logits.astype(jnp.float32)

    def _run_layers(self, x: jax.Array, context: tuple[Any, ...], decode: bool) -> jax.Array:
        config = self.config
        block = nn.remat(Block, prevent_cse=not config.scan_layers) if config.remat else Block
        if not config.scan_layers:
            for i in range(config.num_layers):
                x, _ = block(config, decode, name=f"layers_{i}")(x, context)
            return x
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )(config, decode, name="layers")
        x, _ = layers(x, context)
        return x


class Block(nn.Module):
    """One pre-norm layer: attention and SwiGLU, each added to the residual stream.

    `decode` is a field and not an argument, so that remat and scan need not treat it as static.
    """

    config: DecoderConfig
    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: tuple[Any, ...]) -> tuple[jax.Array, None]:
        """Maps [B, T, D] to ([B, T, D], None), the signature of a scan body."""
        config = self.config
        attended = Attention(config, self.decode, name="attention")(
            _norm(config, "attention_norm")(x), context
        )
        x = x + attended
        x = x + MLP(config, name="mlp")(_norm(config, "mlp_norm")(x))
        return x, None


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and an optional KV cache."""

    config: DecoderConfig
    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, context: tuple[Any, ...]) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; `context` is (cos, sin, mask, first cache slot)."""
        config = self.config
        cos, sin, mask, start = context
        query = _dense(config, (config.num_heads, config.head_dim), "query")(x)
        key = _dense(config, (config.num_kv_heads, config.head_dim), "key")(x)
        value = _dense(config, (config.num_kv_heads, config.head_dim), "value")(x)
        query = functional.apply_rope(query, cos, sin)
        key = functional.apply_rope(key, cos, sin)
        if self.decode:
            shape = (x.shape[0], config.max_length, config.num_kv_heads, config.head_dim)
            cached_key = self.variable("cache", "cached_key", jnp.zeros, shape, key.dtype)
            cached_value = self.variable("cache", "cached_value", jnp.zeros, shape, value.dtype)
            key = jax.lax.dynamic_update_slice(cached_key.value, key, (0, start, 0, 0))
            value = jax.lax.dynamic_update_slice(cached_value.value, value, (0, start, 0, 0))
            if not self.is_initializing():
                cached_key.value, cached_value.value = key, value
        mixed = functional.grouped_attention(query, key, value, mask)
        return _dense(config, config.hidden_size, "out", axis=(-2, -1))(mixed)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        config = self.config
        gate = _dense(config, config.intermediate_size, "gate")(x)
        up = _dense(config, config.intermediate_size, "up")(x)
        return _dense(config, config.hidden_size, "down")(nn.silu(gate) * up)


def _dense(
    config: DecoderConfig, features: int | tuple[int, ...], name: str, axis: Any = -1
) -> nn.Module:
    """A bias-free Dense, or a DenseGeneral where the kernel has three axes."""
    options: dict[str, Any] = {
        "use_bias": False,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "kernel_init": _kernel_init,
        "name": name,
    }
    if isinstance(features, int) and axis == -1:
        return nn.Dense(features, **options)
    return nn.DenseGeneral(features, axis=axis, **options)


def _norm(config: DecoderConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )
