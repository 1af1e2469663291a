"""The range that loses least: a search over shrunken ranges, block by block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxquant.core.blocks import map_blocks, reduce_blocks
from jaxquant.core.codes import code_values, nearest_code
from jaxquant.core.qtypes import QType
from jaxquant.core.quantize_array import absmax_range
from jaxquant.core.scales import scale_from_range

CANDIDATES = 80
GRID = 100
NORM = 2.4


def mse_range(
    w: jax.Array, block_shape: tuple[int, ...], qtype: QType, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """The absmax range times the best p of 1, 0.99, ..., 0.21 for each block.

    The best p has the least sum of |w - q(w)|^2.4, the search of GPTQ's reference code (Frantar
    et al., arXiv 2210.17323), 80 fused passes over w. Of equal ones the widest is taken. For
    mxfp4 this chooses among the powers of two. For nvfp4 the rounding of the scale itself is not
    part of the search. One bit, symmetric, has its own range (`absmax_range`).
    """
    lo, hi = absmax_range(w, block_shape, qtype, symmetric)
    if symmetric and qtype.bits == 1:
        return lo, hi
    size = jnp.maximum(-lo, hi)
    size = jnp.where(size == 0, 1.0, size)

    def error(p: jax.Array) -> jax.Array:
        scale, zero_point = scale_from_range(
            lo * p, hi * p, qtype, symmetric=symmetric, dtype=w.dtype
        )
        scale = scale.astype(jnp.float32)
        scale = jnp.where(scale == 0, 1.0, scale)
        zero = jnp.zeros_like(scale) if zero_point is None else zero_point.astype(jnp.float32)

        def loss(x: jax.Array, s: jax.Array, z: jax.Array, m: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            value = code_values(nearest_code(x / s + z, qtype, symmetric=symmetric), qtype)
            # Relative to the block's size, so that the power neither over- nor underflows.
            return jnp.power(jnp.abs(x - (value - z) * s) / m, NORM)

        return reduce_blocks(map_blocks(loss, w, scale, zero, size), block_shape, jnp.sum)

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, best_p = best
        p = 1.0 - i.astype(jnp.float32) / GRID
        found = error(p)
        return jnp.minimum(found, least), jnp.where(found < least, p, best_p)

    start = jnp.full(lo.shape, jnp.inf), jnp.ones(lo.shape)
    _, p = jax.lax.fori_loop(0, CANDIDATES, step, start)
    return lo * p, hi * p
