"""The decoder in Flax NNX: the same arithmetic, names and shapes as `linen.Decoder`.

With `scan_layers` the blocks are one module whose parameters have a leading axis of layers;
otherwise `layers` is a list. `params.from_nnx` and `params.to_nnx` read and write the checkpoint
that Linen uses.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.models import functional
from jaxquant.models.config import DecoderConfig

_kernel_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


class Decoder(nnx.Module):
    """A Llama-shaped language model: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Args:
      config: shape and numerics.
      rngs: the `params` stream initializes the parameters.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nnx.initializers.normal(config.hidden_size**-0.5),
            rngs=rngs,
        )
        self.layers: Any  # one stacked Block, or a list of them
        if config.scan_layers:
            self.layers = _stacked_blocks(config, rngs)
        else:
            self.layers = nnx.List(Block(config, rngs=rngs) for _ in range(config.num_layers))
        self.norm = _norm(config, rngs)
        if not config.tie_embeddings:
            self.lm_head = _dense(config, config.hidden_size, config.vocab_size, rngs)

    def init_cache(self, batch_size: int) -> None:
        """Makes an empty KV cache (variables of type `nnx.Cache`) in place of any former one."""
        config = self.config
        shape = (batch_size, config.max_length, config.num_kv_heads, config.head_dim)
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))
        self.cache_positions = nnx.Cache(jnp.full(shape[:2], -1, jnp.int32))
        if config.scan_layers:
            self.layers.attention.init_cache((config.num_layers, *shape))
        else:
            for layer in self.layers:
                layer.attention.init_cache(shape)

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
          decode: append to the KV cache and attend to all that it holds; `init_cache` comes first.
          positions: int32 [B, T]; by default 0 ... T-1, or where the cache ends. Negative positions
            mark padding: no query attends to them.

        Returns:
          float32 [B, T, V].

        Raises:
          ValueError: `tokens` is not [B, T], is longer than `max_length`, does not fit the rest of
            the cache (outside of a trace), or there is no cache of this batch size.
        """
        config = self.config
        functional.check_tokens(tokens, config.max_length)
        length = tokens.shape[1]
        start: Any = 0
        if decode:
            if not hasattr(self, "cache_index"):
                raise ValueError("decode=True needs a KV cache; call init_cache(batch_size) first")
            start = self.cache_index[...]
            functional.check_cache(start, self.cache_positions[...], tokens, config.max_length)
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), tokens.shape)
        positions = jnp.asarray(positions, jnp.int32)
        key_positions = positions
        if decode:
            key_positions = jax.lax.dynamic_update_slice(
                self.cache_positions[...], positions, (0, start)
            )
            self.cache_positions[...] = key_positions
            self.cache_index[...] = start + length

        cos, sin = functional.rope_tables(positions, config.head_dim, config.rope_theta)
        mask = functional.causal_mask(positions, key_positions)
        x = self.embed(tokens)
        x = self._run_layers(x, (cos, sin, mask, jnp.asarray(start, jnp.int32)), decode)
        x = self.norm(x)
        logits = self.embed.attend(x) if config.tie_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)

    def _run_layers(self, x: jax.Array, context: tuple[Any, ...], decode: bool) -> jax.Array:
        def call(block: Block, x: jax.Array, context: tuple[Any, ...]) -> jax.Array:
            return block(x, context, decode)

        if self.config.remat:
            call = nnx.remat(call, prevent_cse=not self.config.scan_layers)
        if not self.config.scan_layers:
            for layer in self.layers:
                x = call(layer, x, context)
            return x
        scanned = nnx.scan(call, in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        return scanned(self.layers, x, context)


def _stacked_blocks(config: DecoderConfig, rngs: nnx.Rngs) -> Block:
    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs=rngs)

    return make(rngs)


class Block(nnx.Module):
    """One pre-norm layer: attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, context: tuple[Any, ...], decode: bool = False) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), context, decode)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions and an optional KV cache."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        hidden, head_dim = config.hidden_size, config.head_dim
        self.query = _dense(config, hidden, (config.num_heads, head_dim), rngs)
        self.key = _dense(config, hidden, (config.num_kv_heads, head_dim), rngs)
        self.value = _dense(config, hidden, (config.num_kv_heads, head_dim), rngs)
        self.out = _dense(config, (config.num_heads, head_dim), hidden, rngs, axis=(-2, -1))

    def init_cache(self, shape: tuple[int, ...]) -> None:
        """Zeros of `shape`: [B, max_length, K, head_dim], after an axis of layers if scanned."""
        self.cached_key = nnx.Cache(jnp.zeros(shape, self.config.dtype))
        self.cached_value = nnx.Cache(jnp.zeros(shape, self.config.dtype))

    def __call__(self, x: jax.Array, context: tuple[Any, ...], decode: bool = False) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; `context` is (cos, sin, mask, first cache slot)."""
        cos, sin, mask, start = context
        query = functional.apply_rope(self.query(x), cos, sin)
        key = functional.apply_rope(self.key(x), cos, sin)
        value = self.value(x)
        if decode:
            key = jax.lax.dynamic_update_slice(self.cached_key[...], key, (0, start, 0, 0))
            value = jax.lax.dynamic_update_slice(self.cached_value[...], value, (0, start, 0, 0))
            self.cached_key[...], self.cached_value[...] = key, value
        return self.out(functional.grouped_attention(query, key, value, mask))


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _dense(config, config.hidden_size, config.intermediate_size, rngs)
        self.up = _dense(config, config.hidden_size, config.intermediate_size, rngs)
        self.down = _dense(config, config.intermediate_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def _dense(
    config: DecoderConfig,
    inputs: int | tuple[int, ...],
    outputs: int | tuple[int, ...],
    rngs: nnx.Rngs,
    axis: Any = -1,
) -> nnx.Module:
    """A bias-free Linear, or a LinearGeneral where the kernel has three axes."""
    options: dict[str, Any] = {
        "use_bias": False,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "kernel_init": _kernel_init,
        "rngs": rngs,
    }
    if isinstance(inputs, int) and isinstance(outputs, int):
        return nnx.Linear(inputs, outputs, **options)
    return nnx.LinearGeneral(inputs, outputs, axis=axis, **options)


def _norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )
