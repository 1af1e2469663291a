"""NNX modules as people write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, DIM = 32, 16
TRACES = {"calls": 0}


class Mlp(nnx.Module):
    """Two linears; keyword arguments; an einsum layer."""

    def __init__(self, dim: int = DIM, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.mix = nnx.Einsum("...i,io->...o", (2 * dim, 2 * dim), (2 * dim,), rngs=rngs)
        self.down = nnx.Linear(2 * dim, dim, use_bias=False, rngs=rngs)

    def __call__(self, x, *, gain: float = 1.0):
        TRACES["calls"] += 1
        return self.down(nnx.gelu(self.mix(self.up(x)))) * gain

    def encode(self, x):
        return self.up(x)


class Block(nnx.Module):
    """Norm, MLP, attention and dropout with a stream of its own."""

    def __init__(self, dim: int = DIM, rate: float = 0.0, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.mlp = Mlp(dim, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, dim, rngs=rngs, decode=False)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = x + self.mlp(self.norm(x))
        return x + self.drop(self.attn(x))


class Model(nnx.Module):
    """Tied embedding and a list of blocks; one of them under nnx.remat."""

    block = Block

    def __init__(self, layers: int = 2, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.blocks = nnx.List([self.block(DIM, rngs=rngs) for _ in range(layers)])

    def __call__(self, tokens):
        x = self.embed(tokens) * 2.0
        for block in self.blocks[:-1]:
            x = block(x)
        x = nnx.remat(lambda block, x: block(x))(self.blocks[-1], x)
        return self.embed.attend(x)


class Stacked(nnx.Module):
    """Blocks stacked by nnx.vmap and run by nnx.scan."""

    def __init__(self, layers: int = 3, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return Mlp(DIM, rngs=rngs)

        self.layers = create(rngs)
        self.head = nnx.Linear(DIM, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return x + layer(x)

        return self.head(run(x, self.layers))


class NormNet(nnx.Module):
    """BatchNorm statistics, a counter variable, a python attribute, dropout."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)
        self.norm = nnx.BatchNorm(DIM, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(DIM, 4, rngs=rngs)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.calls = 0

    def __call__(self, x):
        self.count[...] = self.count[...] + 1
        return self.head(self.drop(nnx.relu(self.norm(self.linear(x)))))

    def counted(self, x):
        self.calls += 1
        self.history = nnx.Cache(x.mean())
        return self(x)


class Sowing(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, x):
        h = self.linear(x)
        self.sow(nnx.Intermediate, "h", h)
        return nnx.relu(h)


class Recurrent(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(DIM, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class ConvNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean(axis=(1, 2)))


class RawModule(nnx.Module):
    """Parameters used by hand."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.proj_w = nnx.Param(jax.random.normal(rngs.params(), (DIM, DIM)))
        self.experts_w = nnx.Param(jax.random.normal(rngs.params(), (3, DIM, DIM)))

    def __call__(self, x):
        x = jnp.einsum("...i,io->...o", x, self.proj_w[...].astype(jnp.float32))
        return x @ self.experts_w[1]


def inputs(name: str):
    tokens = jnp.arange(12).reshape(2, 6) % VOCAB
    image = jnp.cos(jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32)).reshape(2, 8, 8, 3)
    x = jnp.sin(jnp.arange(2 * 6 * DIM, dtype=jnp.float32)).reshape(2, 6, DIM)
    return {"Model": tokens, "ConvNet": image}.get(name, x)


CLASSES = (Mlp, Block, Model, Stacked, Recurrent, ConvNet, RawModule)
