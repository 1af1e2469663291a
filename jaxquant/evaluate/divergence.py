"""What two outputs of one model say about each other, position by position, on the device.

For: :mod:`jaxquant.evaluate.compare`, batch by batch. Everything here is jitted, works in float32
whatever the outputs are stored in, and reduces logits to a few numbers per position before anything
goes to the host. Rows are taken one after another, so that the float32 copies are of one row.

Logits are ``[B, P, V]``: row, position, class; a classifier has one position.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_SERIES_BELOW = 0.03  # |log p - log q| under which the series is more exact than the closed form


class RowScores(NamedTuple):
    """Of one model's logits, each ``[B, P]``."""

    nll: jax.Array  # -log p[target], float32; 0 where the target is negative (none)
    top: jax.Array  # argmax, int32
    top_probability: jax.Array  # float32
    bad: jax.Array  # bool: a NaN or +inf among the position's logits


class ValueScores(NamedTuple):
    """Of two outputs that are no logits, each ``[B]`` float32."""

    signal: jax.Array  # sum of squares of the float output
    noise: jax.Array  # sum of squares of the difference
    bad: jax.Array  # [B] bool: a non-finite value in the second output


@jax.jit
def row_scores(logits: jax.Array, targets: jax.Array) -> RowScores:
    """Scores one model's logits.

    Args:
      logits: ``[B, P, V]`` floating. ``-inf`` (a masked class) is allowed.
      targets: ``[B, P]`` integers; negative where there is none.
    """

    def one_row(args: tuple[jax.Array, jax.Array]) -> RowScores:
        row, target = args
        log_probs = jax.nn.log_softmax(row.astype(jnp.float32), axis=-1)
        top = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
        picked = jnp.take_along_axis(log_probs, target.clip(0)[:, None], axis=-1)[:, 0]
        best = jnp.take_along_axis(log_probs, top[:, None], axis=-1)[:, 0]
        bad = (jnp.isnan(row) | jnp.isposinf(row)).any(axis=-1)
        return RowScores(jnp.where(target >= 0, -picked, 0.0), top, jnp.exp(best), bad)

    return jax.lax.map(one_row, (logits, targets))


@jax.jit
def kl_divergence(float_logits: jax.Array, other_logits: jax.Array) -> jax.Array:
    """KL(float || other) of the two softmax distributions, in nats.

    Sums ``p (log p - log q) - p + q`` rather than ``p (log p - log q)``: the sums are equal since
    both distributions sum to one, but every term is non-negative and an error of a log-normalizer
    enters only to second order. A plain float32 sum is noise below about 1e-6, where 8-bit weights
    live.

    Args:
      float_logits: ``[B, P, V]`` floating.
      other_logits: ``[B, P, V]`` floating.

    Returns:
      ``[B, P]`` float32, at least 0; infinite where the other model gives no probability to a class
      that has some.
    """

    def one_row(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in args)
        p, q, diff = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
        series = diff * diff * (1 / 2 - diff * (1 / 6 - diff * (1 / 24 - diff / 120)))
        near = p * series
        far = jnp.where(p > 0, p * diff, 0.0) - p + q
        return jnp.where(jnp.abs(diff) < _SERIES_BELOW, near, jnp.maximum(far, 0.0)).sum(axis=-1)

    return jax.lax.map(one_row, (float_logits, other_logits))


@jax.jit
def value_scores(float_leaves: list[jax.Array], other_leaves: list[jax.Array]) -> ValueScores:
    """Squared size of the output and of the error, per example.

    Args:
      float_leaves: arrays ``[B, ...]`` of the float model's output.
      other_leaves: as many arrays of the same shapes.
    """

    def squares(leaf: jax.Array) -> jax.Array:
        return jnp.square(leaf).reshape(leaf.shape[0], -1).sum(axis=-1)

    def wide(leaf: jax.Array) -> jax.Array:
        kind = jnp.complex64 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else jnp.float32
        return leaf.astype(kind)

    rows = float_leaves[0].shape[0]
    signal = noise = jnp.zeros(rows, jnp.float32)
    bad = jnp.zeros(rows, bool)
    for left, right in zip(float_leaves, other_leaves, strict=True):
        a, b = wide(left), wide(right)
        signal += squares(jnp.abs(a))
        noise += squares(jnp.abs(b - a))
        bad |= ~jnp.isfinite(right).reshape(rows, -1).all(axis=-1)
    return ValueScores(signal, noise, bad)
