"""The range that needs no search, and the type of all ranges.

The default of `quantize_array`; the others are in `jaxquant.algorithms.ranges`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxquant.core.blocks import reduce_blocks, scale_shape
from jaxquant.core.qtypes import QType

RangeFn = Callable[[jax.Array, tuple[int, ...], QType, bool], tuple[jax.Array, jax.Array]]
"""(w, block_shape, qtype, symmetric) -> (lo, hi), float32 with one value a block; hashable."""


def absmax_range(
    w: jax.Array, block_shape: tuple[int, ...], qtype: QType, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """The whole range of each block: (-max|w|, max|w|), or (min, max) if asymmetric.

    One bit, symmetric, has the range (-mean|w|, mean|w|) instead: its scale is the mean
    magnitude, which minimizes the squared error of sign(w) * scale (XNOR-Net, arXiv 1603.05279).
    """

    def reduce(fn: Callable[..., jax.Array]) -> jax.Array:
        return reduce_blocks(w, block_shape, fn).astype(jnp.float32)

    if not symmetric:
        return reduce(jnp.min), reduce(jnp.max)
    if qtype.bits == 1:
        # Scaled first, so that the sum of huge values does not overflow.
        n = float(max(1, w.size // max(1, _count(w.shape, block_shape))))
        hi = reduce(lambda x, axis: jnp.sum(jnp.abs(x).astype(jnp.float32) / n, axis=axis))
    else:
        # Not max(abs(w)): on CPU XLA keeps a copy of |w| and takes many times as long.
        hi = jnp.maximum(reduce(jnp.max), -reduce(jnp.min))
    return -hi, hi


def _count(shape: Sequence[int], block_shape: Sequence[int]) -> int:
    return math.prod(scale_shape(shape, block_shape))
