"""Linen modules as people write them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

VOCAB, DIM = 32, 16
TRACES = {"calls": 0}


class Block(nn.Module):
    """Norm, MLP, attention, sow and dropout; keyword `train`."""

    dim: int = DIM
    act: Any = nn.gelu

    @nn.compact
    def __call__(self, x, train: bool = False):
        TRACES["calls"] += 1
        h = nn.LayerNorm()(x)
        h = nn.Dense(self.dim, use_bias=False)(self.act(nn.Dense(2 * self.dim)(h)))
        h = nn.MultiHeadDotProductAttention(num_heads=4)(h)
        self.sow("intermediates", "h", h)
        return x + nn.Dropout(0.5, deterministic=not train)(h)


class Model(nn.Module):
    """Tied embedding: looked up, scaled, attended; blocks in a loop, auto-named."""

    block: type[nn.Module] = Block
    layers: int = 2

    @nn.compact
    def __call__(self, tokens, train: bool = False):
        embed = nn.Embed(VOCAB, DIM)
        x = embed(tokens) * 2.0
        for _ in range(self.layers):
            x = self.block()(x, train=train)
        return embed.attend(x)


class Scanned(nn.Module):
    """Blocks under nn.scan(nn.remat(...))."""

    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, DIM)
        x = embed(tokens)
        scanned = nn.scan(
            lambda block, carry, _: (block(carry), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = scanned(nn.remat(self.block)(name="layers"), x, None)
        return embed.attend(x)


class SetupModel(nn.Module):
    """`setup`, several public methods, a helper, a nowrap method, a property."""

    hidden: int = 24

    def setup(self):
        self.up = nn.Dense(self.hidden)
        self.down = [nn.Dense(DIM), nn.Dense(DIM)]

    def encode(self, x):
        return nn.tanh(self.up(x))

    def decode(self, h, *, which: int = 0):
        return self._helper(h, which)

    def _helper(self, h, which):
        return self.down[which](h)

    def __call__(self, x, which: int = 0):
        return self.decode(self.encode(x), which=which)

    @nn.nowrap
    def describe(self):
        return f"hidden {self.hidden}"

    @property
    def width(self):
        return self.hidden


class NormNet(nn.Module):
    """BatchNorm statistics and a counter in a collection of its own."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(DIM)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        count = self.variable("cache", "count", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            count.value = count.value + 1
        return nn.Dense(4)(nn.relu(x))


class Recurrent(nn.Module):
    """An LSTM under nn.RNN (a scan inside)."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(8))(x))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(5)(x.mean(axis=(1, 2)))


class RawModule(nn.Module):
    """Parameters used by hand: cast, sliced, transposed, contracted from the left."""

    @nn.compact
    def __call__(self, x):
        w = self.param("proj_w", nn.initializers.normal(), (DIM, DIM))
        experts = self.param("experts_w", nn.initializers.normal(), (3, DIM, DIM))
        x = jnp.einsum("...i,io->...o", x, w.astype(jnp.float32))
        return x @ experts[1]


class Caller(nn.Module):
    """A module handed in as a field, and keyword arguments that flax uses itself."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x, *, rngs_scale: float = 1.0, mode: str = "plain"):
        y = self.inner(x)
        return {"y": y * rngs_scale, "mode": mode, "count": 3}


def make(name: str):
    """(undecorated class, constructor arguments, call arguments, call keyword arguments)."""
    tokens = jnp.arange(12).reshape(2, 6) % VOCAB
    x = jnp.sin(jnp.arange(2 * 6 * DIM, dtype=jnp.float32)).reshape(2, 6, DIM)
    image = jnp.cos(jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32)).reshape(2, 8, 8, 3)
    return {
        "block": (Block, {}, (x,), {}),
        "model": (Model, {}, (tokens,), {}),
        "scanned": (Scanned, {}, (tokens,), {}),
        "setup": (SetupModel, {}, (x,), {"which": 1}),
        "recurrent": (Recurrent, {}, (x,), {}),
        "conv": (ConvNet, {}, (image,), {}),
        "raw": (RawModule, {}, (x,), {}),
        "attention": (nn.MultiHeadDotProductAttention, {"num_heads": 4}, (x,), {}),
        "general": (functools.partial(nn.DenseGeneral, features=(4, 4)), {}, (x,), {}),
    }[name]


NAMES = ("block", "model", "scanned", "setup", "recurrent", "conv", "raw", "attention", "general")


def keys():
    return {"params": jax.random.key(0), "dropout": jax.random.key(1)}
