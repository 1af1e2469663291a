"""What calibration collects about an activation: statistics that can be merged.

Each statistic is a monoid: the state `of` one value, `merge` of two (the first is the earlier one),
and `empty` for nothing. So one definition serves batches, layers of a scan, iterations of a loop,
branches and devices. `value` is what the user gets of a state. Used by `observer`. Here are the ABC
and the plain ones; others are in `moving_average`, `histogram` and `row_statistics`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.passes.observed import Operand, Seen

State = Any  # an array, or a small tree of arrays
Axes = tuple[str, ...]


class Statistic(abc.ABC):
    """A mergeable summary of an activation. Subclasses are frozen dataclasses.

    Attributes:
      draws: whether it needs a random key.
    """

    draws: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The key of its values in results; statistics of one operation differ in it."""

    @property
    def by_channel(self) -> bool:
        """Whether it tells the channels that are summed over apart."""
        return False

    @abc.abstractmethod
    def shape(self, use: Operand) -> tuple[int, ...]:
        """Shape of the value for one operand."""

    @abc.abstractmethod
    def empty(self, use: Operand) -> State:
        """The summary of nothing."""

    @abc.abstractmethod
    def of(self, seen: Seen) -> State:
        """The summary of one array."""

    @abc.abstractmethod
    def merge(self, a: State, b: State) -> State:
        """The summary of both, ``a`` being earlier; broadcasts over leading axes."""

    @abc.abstractmethod
    def reduce(self, stacked: State) -> State:
        """Merges the summaries along the first axis, in order."""

    @abc.abstractmethod
    def across(self, x: State, axis_names: Axes) -> State:
        """Merges the summaries of the devices along named mesh axes."""

    def value(self, state: State) -> Any:
        """What the user gets; leading axes number layers."""
        return state


class Summed(Statistic):
    """A statistic whose states are added."""

    def merge(self, a: State, b: State) -> State:
        """The sums."""
        return jax.tree.map(jnp.add, a, b)

    def reduce(self, stacked: State) -> State:
        """The sums."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)

    def across(self, x: State, axis_names: Axes) -> State:
        """The sums."""
        return lax.psum(x, axis_names)


@dataclasses.dataclass(frozen=True)
class ByChannel(Statistic):
    """A statistic of a whole tensor, or of each channel.

    Attributes:
      channels: True for one value for each channel that the product sums over, in the order of
        the weight's axes, behind the axes that number its experts.
    """

    channels: bool = False

    @property
    def by_channel(self) -> bool:
        """As `Statistic.by_channel`."""
        return self.channels

    def shape(self, use: Operand) -> tuple[int, ...]:
        """``(*experts, *contracted axes)``, or a scalar."""
        return (*use.kept_shape, *use.channel_shape) if self.channels else ()

    def values(self, seen: Seen) -> tuple[jax.Array, jax.Array | None, tuple[int, ...]]:
        """Floats, which of them count (None: all), and the axes to reduce."""
        if not self.channels:
            return seen.x.astype(jnp.float32), None, tuple(range(seen.x.ndim))
        values, mask = seen.channels()
        return values.astype(jnp.float32), mask, (len(seen.use.kept_shape),)


@dataclasses.dataclass(frozen=True)
class AbsMax(ByChannel):
    """The largest magnitude: float32, a scalar or one for each channel."""

    @property
    def name(self) -> str:
        """Either "absmax" or "channel_absmax"."""
        return "channel_absmax" if self.channels else "absmax"

    def empty(self, use: Operand) -> State:
        """Zeros."""
        return jnp.zeros(self.shape(use), jnp.float32)

    def of(self, seen: Seen) -> State:
        """The largest magnitude."""
        x, mask, axes = self.values(seen)
        x = jnp.abs(x)
        return jnp.max(x if mask is None else jnp.where(mask, x, 0), axis=axes, initial=0)

    def merge(self, a: State, b: State) -> State:
        """The larger."""
        return jnp.maximum(a, b)

    def reduce(self, stacked: State) -> State:
        """The largest."""
        return jnp.max(stacked, axis=0)

    def across(self, x: State, axis_names: Axes) -> State:
        """The largest."""
        return lax.pmax(x, axis_names)


@dataclasses.dataclass(frozen=True)
class MinMax(ByChannel):
    """The least and the greatest value: float32 ``[..., 2]``; zeros where nothing was seen."""

    @property
    def name(self) -> str:
        """Either "minmax" or "channel_minmax"."""
        return "channel_minmax" if self.channels else "minmax"

    def shape(self, use: Operand) -> tuple[int, ...]:
        """As for all, with a last axis of two."""
        return (*super().shape(use), 2)

    def empty(self, use: Operand) -> State:
        """An empty interval."""
        return jnp.broadcast_to(jnp.array([jnp.inf, -jnp.inf], jnp.float32), self.shape(use))

    def of(self, seen: Seen) -> State:
        """The interval of the values."""
        x, mask, axes = self.values(seen)
        low = x if mask is None else jnp.where(mask, x, jnp.inf)
        high = x if mask is None else jnp.where(mask, x, -jnp.inf)
        return jnp.stack(
            [
                jnp.min(low, axis=axes, initial=jnp.inf),
                jnp.max(high, axis=axes, initial=-jnp.inf),
            ],
            axis=-1,
        )

    def merge(self, a: State, b: State) -> State:
        """The interval that holds both."""
        low, high = jnp.minimum(a, b)[..., 0], jnp.maximum(a, b)[..., 1]
        return jnp.stack([low, high], axis=-1)

    def reduce(self, stacked: State) -> State:
        """The interval that holds all."""
        low, high = jnp.min(stacked, axis=0)[..., 0], jnp.max(stacked, axis=0)[..., 1]
        return jnp.stack([low, high], axis=-1)

    def across(self, x: State, axis_names: Axes) -> State:
        """The interval that holds all."""
        low, high = lax.pmin(x, axis_names)[..., 0], lax.pmax(x, axis_names)[..., 1]
        return jnp.stack([low, high], axis=-1)

    def value(self, state: State) -> Any:
        """The interval; zeros for an empty one."""
        return jnp.where(state[..., :1] > state[..., 1:], 0.0, state)


@dataclasses.dataclass(frozen=True)
class MeanAbs(Summed, ByChannel):
    """The mean magnitude, float32: of each channel (AWQ, arXiv 2306.00978), or of all.

    Its state is a sum and a count, so batches of different sizes weigh as many values as they have.
    """

    channels: bool = True

    @property
    def name(self) -> str:
        """Either "channel_mean" or "mean"."""
        return "channel_mean" if self.channels else "mean"

    def _count_shape(self, use: Operand) -> tuple[int, ...]:
        return (*use.kept_shape, *[1] * len(use.contract)) if self.channels else ()

    def empty(self, use: Operand) -> State:
        """Zeros."""
        return {
            "sum": jnp.zeros(self.shape(use), jnp.float32),
            "count": jnp.zeros(self._count_shape(use), jnp.float32),
        }

    def of(self, seen: Seen) -> State:
        """Sum of magnitudes and their number."""
        x, mask, axes = self.values(seen)
        shape = self._count_shape(seen.use)
        if mask is None:
            number = x.size if not self.channels else x.shape[axes[0]]
            count = jnp.full(shape, number, jnp.float32)
        else:
            x = jnp.where(mask, x, 0)
            count = jnp.sum(mask, axis=axes).astype(jnp.float32).reshape(shape)
        return {"sum": jnp.sum(jnp.abs(x), axis=axes), "count": count}

    def value(self, state: State) -> Any:
        """Sum by count; 0 where nothing was seen."""
        return state["sum"] / jnp.maximum(state["count"], 1)


@dataclasses.dataclass(frozen=True)
class NonFinite(Summed):
    """How many values are NaN or infinite: a float32 scalar. Collected beside every other one."""

    name = "nonfinite"

    def shape(self, use: Operand) -> tuple[int, ...]:
        """A scalar."""
        return ()

    def empty(self, use: Operand) -> State:
        """Zero."""
        return jnp.zeros((), jnp.float32)

    def of(self, seen: Seen) -> State:
        """Their number."""
        return jnp.sum(~jnp.isfinite(seen.x)).astype(jnp.float32)
