"""A histogram of magnitudes, and percentiles read from it.

`Histogram` is collected like other statistics; `jaxquant.algorithms.calibrate` reads static ranges
from it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.passes.observed import Operand, Seen
from jaxquant.passes.statistics import State, Summed

# Bins of the magnitude histogram: 64 to an octave from 2^-24 to 2^24, so a percentile read from
# it is within 1.1 percent of the true one; smaller magnitudes fall into the first bin.
BINS_PER_OCTAVE = 64
MIN_EXPONENT, MAX_EXPONENT = -24, 24
NUM_BINS = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE


@dataclasses.dataclass(frozen=True)
class Histogram(Summed):
    """Counts of the magnitudes on a logarithmic grid: float32 ``[NUM_BINS]``.

    Float32 counts are exact up to 2^24 values a bin and lose less than 1e-7 of a bin beyond.
    A value that is not finite counts in the last bin, so that no percentile hides it.
    """

    @property
    def name(self) -> str:
        """The name "histogram"."""
        return "histogram"

    def shape(self, use: Operand) -> tuple[int, ...]:
        """The bins."""
        return (NUM_BINS,)

    def empty(self, use: Operand) -> State:
        """Zeros."""
        return jnp.zeros(NUM_BINS, jnp.float32)

    def of(self, seen: Seen) -> State:
        """Float32 ``[NUM_BINS]``."""
        magnitude = jnp.abs(seen.x).astype(jnp.float32).ravel()
        exponent = jnp.log2(jnp.maximum(magnitude, 2.0**MIN_EXPONENT)) - MIN_EXPONENT
        index = jnp.where(jnp.isfinite(exponent), exponent * BINS_PER_OCTAVE, NUM_BINS - 1)
        index = jnp.clip(index.astype(jnp.int32), 0, NUM_BINS - 1)
        return jnp.zeros(NUM_BINS, jnp.float32).at[index].add(1)


@dataclasses.dataclass(frozen=True)
class Percentile(Histogram):
    """A percentile of the magnitudes, read from a `Histogram`: a float32 scalar.

    Attributes:
      percentile: in (0, 100].
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile} must lie in (0, 100]")

    @property
    def name(self) -> str:
        """For example "percentile_99.9"."""
        return f"percentile_{self.percentile:g}"

    def shape(self, use: Operand) -> tuple[int, ...]:
        """A scalar."""
        return ()

    def value(self, state: State) -> Any:
        """See `percentile_of_histogram`."""
        return percentile_of_histogram(state, self.percentile)


def percentile_of_histogram(counts: jax.Array, percentile: float) -> jax.Array:
    """The magnitude below which ``percentile`` per cent of the counted values lie.

    Args:
      counts: ``[..., NUM_BINS]`` from `Histogram`.
      percentile: in (0, 100].

    Returns:
      Float32 ``[...]``: the upper edge of the bin, so at most 1.1 percent above the true value;
      the smallest bin's edge, 2^-24, where only zeros were counted.
    """
    total = jnp.cumsum(counts, axis=-1)
    reached = total >= total[..., -1:] * (percentile / 100) * (1 - 1e-7)
    index = jnp.argmax(reached, axis=-1)
    return jnp.exp2((index + 1) / BINS_PER_OCTAVE + MIN_EXPONENT).astype(jnp.float32)
