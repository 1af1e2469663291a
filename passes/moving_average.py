"""The moving average of a range: the one statistic for which the order of batches counts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.passes.observed import Operand, Seen
from jaxquant.passes.statistics import AbsMax, Axes, ByChannel, MinMax, State


@dataclasses.dataclass(frozen=True)
class MovingAverage(ByChannel):
    """An exponential moving average of what `AbsMax` or `MinMax` see in each batch.

    ``average = momentum * average + (1 - momentum) * seen``, corrected for its start as Adam's
    moments are (arXiv 1412.6980), so that one batch gives its own value. It depends on the order.
    One observation is one execution of the operation: batches count in the order they are given,
    iterations of a loop and several uses of one parameter in the order they run, and an operation
    that did not run changes nothing. The state ``(decay, total)`` is the map ``v -> decay * v +
    total``; merging composes two maps, which is associative, so batches may be accumulated in parts
    as long as the parts are merged in order. Devices inside `shard_map` see one and the same moment
    and are merged by the extremes of their averages: exact for an operation that runs once.

    Attributes:
      channels: one average for each channel.
      of_what: "absmax" or "minmax".
      momentum: in [0, 1).
    """

    of_what: Literal["absmax", "minmax"] = "absmax"
    momentum: float = 0.99

    def __post_init__(self) -> None:
        if self.of_what not in ("absmax", "minmax"):
            raise ValueError(f"of_what={self.of_what!r} must be 'absmax' or 'minmax'")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")

    @property
    def name(self) -> str:
        """For example "moving_absmax" or "channel_moving_minmax"."""
        return f"{'channel_' if self.channels else ''}moving_{self.of_what}"

    @property
    def _inner(self) -> AbsMax | MinMax:
        kind = AbsMax if self.of_what == "absmax" else MinMax
        return kind(channels=self.channels)

    def shape(self, use: Operand) -> tuple[int, ...]:
        """As that of what is averaged."""
        return self._inner.shape(use)

    def _decay_shape(self, use: Operand) -> tuple[int, ...]:
        kept = use.kept_shape if self.channels else ()
        return (*kept, *[1] * (len(self.shape(use)) - len(kept)))

    def empty(self, use: Operand) -> State:
        """The map that changes nothing."""
        return {
            "decay": jnp.ones(self._decay_shape(use), jnp.float32),
            "total": jnp.zeros(self.shape(use), jnp.float32),
        }

    def of(self, seen: Seen) -> State:
        """The map of one observation; an expert without rows keeps its average."""
        value = self._inner.value(self._inner.of(seen))
        decay = jnp.full(self._decay_shape(seen.use), self.momentum, jnp.float32)
        if seen.use.experts and self.channels:
            busy = (seen.group_sizes > 0).reshape(decay.shape)
            decay = jnp.where(busy, decay, 1.0)
        return {"decay": decay, "total": (1 - decay) * value}

    def merge(self, a: State, b: State) -> State:
        """First ``a``, then ``b``."""
        total = b["decay"] * a["total"] + b["total"]
        return {"decay": a["decay"] * b["decay"], "total": total}

    def reduce(self, stacked: State) -> State:
        """One after the other."""
        return jax.tree.map(lambda x: x[-1], lax.associative_scan(self.merge, stacked))

    def across(self, x: State, axis_names: Axes) -> State:
        """The extremes of the averages; the decay of whoever saw most."""
        seen, value = x["decay"] < 1, self.value(x)
        high = lax.pmax(jnp.where(seen, value, -jnp.inf), axis_names)
        if self.of_what == "minmax":
            low = lax.pmin(jnp.where(seen, value, jnp.inf), axis_names)
            high = jnp.stack([low[..., 0], high[..., 1]], axis=-1)
        decay = lax.pmin(x["decay"], axis_names)
        return {"decay": decay, "total": jnp.where(decay < 1, (1 - decay) * high, 0.0)}

    def value(self, state: State) -> Any:
        """The average; 0 where nothing was seen."""
        weight = 1 - state["decay"]
        return state["total"] / jnp.where(weight == 0, 1.0, weight)
