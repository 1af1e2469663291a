"""Percentile ranges: clip the rarest magnitudes of each block."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxquant.core.blocks import map_blocks, reduce_blocks, scale_shape
from jaxquant.core.qtypes import QType
from jaxquant.core.quantize_array import absmax_range


@dataclasses.dataclass(frozen=True)
class PercentileRange:
    """The range up to a percentile of each block, as numpy's "linear" method defines it.

    Symmetric: (-t, t), where t is the percentile of |w|. Asymmetric: from the percentile
    100 - p to the percentile p of w. One bit, symmetric, has its own range (`absmax_range`).

    Attributes:
      percentile: in (0, 100]; 100 is the absolute maximum.
    """

    percentile: float

    def __call__(
        self, w: jax.Array, block_shape: tuple[int, ...], qtype: QType, symmetric: bool
    ) -> tuple[jax.Array, jax.Array]:
        """See `jaxquant.algorithms.ranges`."""
        if symmetric and qtype.bits == 1:
            return absmax_range(w, block_shape, qtype, symmetric)
        if symmetric:
            hi = _percentile(jnp.abs(w), block_shape, self.percentile)
            return -hi, hi
        lo = _percentile(w, block_shape, 100.0 - self.percentile)
        return lo, _percentile(w, block_shape, self.percentile)


def _percentile(x: jax.Array, block_shape: tuple[int, ...], percentile: float) -> jax.Array:
    """The percentile of every block: order statistics by bisection, since a sort would copy x.

    Floats are ordered like their bits read as integers (negative ones mirrored), so 32 halvings
    of the integers find the value at a rank exactly; each is one fused pass over x.
    """
    x = x.astype(jnp.float32)
    n = math.prod(block_shape)
    position = (n - 1) * percentile / 100.0
    rank = min(math.floor(position), n - 1)
    shape = scale_shape(x.shape, block_shape)

    def count_up_to(keys: jax.Array) -> jax.Array:
        below = map_blocks(lambda x, k: (_key(x) <= k).astype(jnp.int32), x, keys)
        return reduce_blocks(below, block_shape, jnp.sum)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down, without overflow
        enough = count_up_to(middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    info = jnp.iinfo(jnp.int32)
    bounds = jnp.full(shape, info.min), jnp.full(shape, info.max)
    _, key = jax.lax.fori_loop(0, 32, halve, bounds)
    lower = _unkey(key)
    larger = map_blocks(lambda x, k: jnp.where(_key(x) > k, x, jnp.inf), x, key)
    larger = reduce_blocks(larger, block_shape, jnp.min)
    upper = jnp.where((count_up_to(key) > rank + 1) | (rank + 1 >= n), lower, larger)
    fraction = position - rank
    return lower * (1.0 - fraction) + upper * fraction


def _key(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats; -0 and 0 are one."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unkey(key: jax.Array) -> jax.Array:
    bits = jnp.where(key < 0, key ^ 0x7FFFFFFF, key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
