"""The shape of the demo decoder: one frozen dataclass that Linen and NNX share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a Llama-like decoder. Hashable, so that it can be a module's field.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width D of the residual stream.
      num_layers: number of blocks L.
      num_heads: query heads H.
      num_kv_heads: key and value heads K; H must be a multiple of K (grouped-query attention).
      head_dim: width of one head; even, since RoPE rotates pairs.
      intermediate_size: width F of the SwiGLU layer.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of RMSNorm.
      max_length: longest sequence, and the length of the KV cache.
      tie_embeddings: the head is the transposed embedding table (no `lm_head`).
      scan_layers: one `layers` subtree with a leading axis L, run by a scan; otherwise L subtrees.
      remat: recompute every block's activations in the backward pass.
      dtype: dtype of the computation. Norm statistics, RoPE and softmax stay float32.
      param_dtype: dtype of the parameters at initialization.

    Raises:
      ValueError: a size is not positive, or sizes do not fit one another.
    """

    vocab_size: int = 3072
    hidden_size: int = 384
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_length: int = 256
    tie_embeddings: bool = True
    scan_layers: bool = True
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "intermediate_size", "max_length",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"DecoderConfig.{name} must be a positive int; got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; every key/value head serves as many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs of features")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"DecoderConfig.{name} must be positive; got {getattr(self, name)!r}"
                )

    def replace(self, **changes: Any) -> DecoderConfig:
        """Returns a copy with some fields changed (and the checks run again)."""
        return dataclasses.replace(self, **changes)
