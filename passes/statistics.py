"""What calibration collects about an activation: statistics that can be merged.

Each statistic is a monoid over arrays: `of` one value, `merge` of two, a `neutral` element. So
the same definition serves batches, layers of a scan, iterations of a loop, branches and devices.
Used by `observers`; turned into scales by `jaxquant.algorithms.activation_scales`.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

# Bins of the magnitude histogram: 64 to an octave from 2^-24 to 2^24, so a percentile read from
# it is within 1.1 percent of the true one; smaller magnitudes fall into the first bin.
BINS_PER_OCTAVE = 64
MIN_EXPONENT, MAX_EXPONENT = -24, 24
NUM_BINS = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE


class Statistic(Protocol):
    """A mergeable summary of an activation."""

    name: str

    def of(self, x: jax.Array) -> jax.Array:
        """The summary of one array of any shape."""

    def neutral(self) -> jax.Array:
        """The summary of nothing."""

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The summary of both; broadcasts over leading axes."""

    def reduce(self, stacked: jax.Array) -> jax.Array:
        """Merges the summaries along the first axis."""

    def across(self, x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
        """Merges the summaries of the devices along named mesh axes."""


class AbsMax:
    """The largest magnitude: a float32 scalar."""

    name = "absmax"

    def of(self, x: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(x), initial=0).astype(jnp.float32)

    def neutral(self) -> jax.Array:
        return jnp.zeros((), jnp.float32)

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b)

    def reduce(self, stacked: jax.Array) -> jax.Array:
        return jnp.max(stacked, axis=0)

    def across(self, x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
        return jax.lax.pmax(x, axis_names)


class Histogram:
    """Counts of the magnitudes on a logarithmic grid: float32 ``[NUM_BINS]``.

    Float32 counts are exact up to 2^24 values a bin and lose less than 1e-7 of a bin beyond.
    A value that is not finite counts in the last bin, so that no percentile hides it.
    """

    name = "histogram"

    def of(self, x: jax.Array) -> jax.Array:
        magnitude = jnp.abs(x).astype(jnp.float32).ravel()
        exponent = jnp.log2(jnp.maximum(magnitude, 2.0**MIN_EXPONENT)) - MIN_EXPONENT
        index = jnp.where(jnp.isfinite(exponent), exponent * BINS_PER_OCTAVE, NUM_BINS - 1)
        index = jnp.clip(index.astype(jnp.int32), 0, NUM_BINS - 1)
        return jnp.zeros(NUM_BINS, jnp.float32).at[index].add(1)

    def neutral(self) -> jax.Array:
        return jnp.zeros(NUM_BINS, jnp.float32)

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return a + b

    def reduce(self, stacked: jax.Array) -> jax.Array:
        return jnp.sum(stacked, axis=0)

    def across(self, x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
        return jax.lax.psum(x, axis_names)


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
