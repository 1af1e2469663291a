"""What calibration collects about an activation: statistics that can be merged.

Each statistic is a monoid over arrays: `of` one value, `merge` of two, zeros for nothing. So
the same definition serves batches, layers of a scan, iterations of a loop, branches and devices.
Used by `observers`; turned into scales by `jaxquant.algorithms.activation_scales`.
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp

# Bins of the magnitude histogram: 64 to an octave from 2^-24 to 2^24, so a percentile read from
# it is within 1.1 percent of the true one; smaller magnitudes fall into the first bin.
BINS_PER_OCTAVE = 64
MIN_EXPONENT, MAX_EXPONENT = -24, 24
NUM_BINS = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE


class Statistic(abc.ABC):
    """A mergeable summary of an activation; zeros of `shape` summarize nothing."""

    name: str
    shape: tuple[int, ...]

    @abc.abstractmethod
    def of(self, x: jax.Array) -> jax.Array:
        """The summary of one array of any shape."""

    @abc.abstractmethod
    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The summary of both; broadcasts over leading axes."""

    @abc.abstractmethod
    def reduce(self, stacked: jax.Array) -> jax.Array:
        """Merges the summaries along the first axis."""

    @abc.abstractmethod
    def across(self, x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
        """Merges the summaries of the devices along named mesh axes."""


class AbsMax(Statistic):
    """The largest magnitude: a float32 scalar."""

    name = "absmax"
    shape = ()

    def of(self, x: jax.Array) -> jax.Array:
        """Float32 scalar."""
        return jnp.max(jnp.abs(x), initial=0).astype(jnp.float32)

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The larger."""
        return jnp.maximum(a, b)

    def reduce(self, stacked: jax.Array) -> jax.Array:
        """The largest."""
        return jnp.max(stacked, axis=0)

    def across(self, x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
        """The largest."""
        return jax.lax.pmax(x, axis_names)


class Histogram(Statistic):
    """Counts of the magnitudes on a logarithmic grid: float32 ``[NUM_BINS]``.

    Float32 counts are exact up to 2^24 values a bin and lose less than 1e-7 of a bin beyond.
    A value that is not finite counts in the last bin, so that no percentile hides it.
    """

    name = "histogram"
    shape = (NUM_BINS,)

    def of(self, x: jax.Array) -> jax.Array:
        """Float32 ``[NUM_BINS]``."""
        magnitude = jnp.abs(x).astype(jnp.float32).ravel()
        exponent = jnp.log2(jnp.maximum(magnitude, 2.0**MIN_EXPONENT)) - MIN_EXPONENT
        index = jnp.where(jnp.isfinite(exponent), exponent * BINS_PER_OCTAVE, NUM_BINS - 1)
        index = jnp.clip(index.astype(jnp.int32), 0, NUM_BINS - 1)
        return jnp.zeros(NUM_BINS, jnp.float32).at[index].add(1)

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The sum."""
        return a + b

    def reduce(self, stacked: jax.Array) -> jax.Array:
        """The sum."""
        return jnp.sum(stacked, axis=0)

    def across(self, x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
        """The sum."""
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
