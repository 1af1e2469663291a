"""Models of different shape for the tests of folds and rotations: names mean nothing here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.config import DecoderConfig

DECODER = DecoderConfig(
    vocab_size=32, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    intermediate_size=24, max_length=16,
)  # fmt: skip


class Encoder(nn.Module):
    """LayerNorm, attention with biases, GELU; then a ReLU block and a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, 16] to [B, T, 5]."""
        y = nn.LayerNorm(name="n1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="mix")(y)
        y = nn.Dense(24, name="wide")(nn.LayerNorm(name="n2")(x))
        x = x + nn.Dense(16, name="narrow")(nn.gelu(y))
        y = nn.Dense(24, name="wide_relu")(nn.LayerNorm(name="n3")(x))
        x = x + nn.Dense(16, name="narrow_relu")(nn.relu(y))
        return nn.Dense(5, name="head")(nn.LayerNorm(name="n4")(x))


def random_like(tree: Any, seed: int = 0) -> Any:
    """Normal numbers around one half in every float leaf: no gain is one and no bias zero."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [0.5 + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, new)


def gated_params(seed: int = 0, layers: int = 2) -> dict[str, Any]:
    """Parameters of `gated_decoder`: plain arrays, kernels of two axes, a fused gate and up."""
    shapes = {
        "e": (32, 16), "z": (16, 11),
        "g": (layers, 16), "a": (layers, 16, 16), "b": (layers, 16, 8), "c": (layers, 16, 8),
        "d": (layers, 16, 16), "h": (layers, 16), "u": (layers, 16, 2, 24), "w": (layers, 24, 16),
        "f": (16,),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    params = {
        name: jax.random.normal(key, shape) * shape[-2 if len(shape) > 1 else -1] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items())
    }
    return {k: v + 1.0 if k in "ghf" else v for k, v in params.items()}


def gated_decoder(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """A decoder in raw einsum: 4 heads over 2 key heads, [in, out] kernels, remat and scan."""

    def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain

    @jax.checkpoint
    def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        batch, length, _ = x.shape
        y = norm(x, p["g"])
        q = jnp.einsum("btd,de->bte", y, p["a"]).reshape(batch, length, 4, 4)
        k = jnp.einsum("btd,de->bte", y, p["b"]).reshape(batch, length, 2, 4)
        v = jnp.einsum("btd,de->bte", y, p["c"]).reshape(batch, length, 2, 4)
        k, v = (jnp.repeat(t, 2, axis=2).transpose(0, 2, 1, 3) for t in (k, v))
        scores = jnp.einsum("bthc,bhsc->bhts", q, k) / 2
        mask = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), -1)
        mixed = jnp.einsum("bhts,bhsc->bhtc", weights, v).transpose(0, 2, 1, 3)
        x = x + mixed.reshape(batch, length, 16) @ p["d"]
        both = jnp.einsum("btd,dif->btif", norm(x, p["h"]), p["u"])
        gate, up = both[:, :, 0], both[:, :, 1]
        return x + jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, p["w"]), None

    stacked = {k: params[k] for k in "gabcdhuw"}
    x, _ = jax.lax.scan(layer, params["e"][tokens], stacked)
    return norm(x, params["f"]) @ params["z"]
