"""Statistics of whole rows: what a product sums over, together.

A row is what one result of the product is a sum of: its contracted axes flattened, in the order of
the weight's axes. GPTQ needs the rows' second moments, algorithms that try things out a sample of
them. Used like the statistics of `statistics`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.passes.observed import Operand, Seen
from jaxquant.passes.statistics import Axes, State, Statistic, Summed


@dataclasses.dataclass(frozen=True)
class Hessian(Summed):
    """X^T X over the rows: float32 ``[*experts, K, K]`` (GPTQ, arXiv 2210.17323).

    Each observed operation has one of its own: 4 K^2 bytes, times the layers that a scan stacks.
    Sums are float32 whatever the dtype of x.

    Attributes:
      scaled: True for 2/n X^T X, the Hessian of the mean squared error over n rows; False for the
        plain sum.
    """

    scaled: bool = True
    name = "hessian"

    @property
    def by_channel(self) -> bool:
        """Yes."""
        return True

    def shape(self, use: Operand) -> tuple[int, ...]:
        """``(*experts, K, K)``."""
        return (*use.row_shape, use.row_shape[-1])

    def empty(self, use: Operand) -> State:
        """Zeros."""
        return {
            "sum": jnp.zeros(self.shape(use), jnp.float32),
            "count": jnp.zeros((*use.row_shape[:-1], 1, 1), jnp.float32),
        }

    def of(self, seen: Seen) -> State:
        """The sum of outer products, and the number of rows."""
        rows, mask = seen.rows()
        rows = rows.astype(jnp.float32)
        if mask is None:
            shape = (*rows.shape[:-2], 1, 1)
            count = jnp.full(shape, rows.shape[-2], jnp.float32)
        else:
            rows = jnp.where(mask, rows, 0)
            count = jnp.sum(mask, axis=-2, keepdims=True).astype(jnp.float32)
        total = jnp.einsum("...nk,...nl->...kl", rows, rows, precision=lax.Precision.HIGHEST)
        return {"sum": total, "count": count}

    def value(self, state: State) -> jax.Array:
        """The sum, or 2/n times it."""
        if not self.scaled:
            return state["sum"]
        return state["sum"] * (2 / jnp.maximum(state["count"], 1))


@dataclasses.dataclass(frozen=True)
class Reservoir(Statistic):
    """A uniform sample of rows without replacement: ``[*experts, capacity, K]`` in x's dtype.

    Every row draws a priority; the ``capacity`` rows of highest priority are the sample. So samples
    merge exactly, in any order, over batches, loops and devices. Draws depend on the seed, the
    number of the batch, the iteration of each loop and the row's place, never on values: the same
    run gives the same sample, and operations of one layer that see the same rows sample the same.
    Where fewer rows were seen, what is left over is NaN.

    Attributes:
      capacity: rows to keep.
      seed: another seed gives another sample.
    """

    capacity: int = 128
    seed: int = 0
    name = "reservoir"
    draws = True

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} must be at least 1")

    @property
    def by_channel(self) -> bool:
        """Yes."""
        return True

    def shape(self, use: Operand) -> tuple[int, ...]:
        """``(*experts, capacity, K)``."""
        return (*use.row_shape[:-1], self.capacity, use.row_shape[-1])

    def empty(self, use: Operand) -> State:
        """No rows: priorities of -1."""
        shape = self.shape(use)
        return {
            "rows": jnp.zeros(shape, use.dtype),
            "priority": jnp.full(shape[:-1], -1, jnp.float32),
        }

    def of(self, seen: Seen) -> State:
        """The rows of highest priority."""
        rows, mask = seen.rows()
        key = jax.random.fold_in(seen.key, self.seed)
        priority = jax.random.uniform(key, rows.shape[:-1])
        if mask is not None:
            priority = jnp.where(mask[..., 0], priority, -1)
        missing = self.capacity - rows.shape[-2]
        if missing > 0:
            lead = [(0, 0)] * (rows.ndim - 2)
            rows = jnp.pad(rows, [*lead, (0, missing), (0, 0)])
            priority = jnp.pad(priority, [*lead, (0, missing)], constant_values=-1)
        return self._best(rows, priority)

    def _best(self, rows: jax.Array, priority: jax.Array) -> State:
        priority, index = lax.top_k(priority, self.capacity)
        return {"rows": jnp.take_along_axis(rows, index[..., None], -2), "priority": priority}

    def merge(self, a: State, b: State) -> State:
        """The best of both."""
        lead = jnp.broadcast_shapes(a["priority"].shape[:-1], b["priority"].shape[:-1])
        rows = [jnp.broadcast_to(s["rows"], (*lead, *s["rows"].shape[-2:])) for s in (a, b)]
        drawn = [jnp.broadcast_to(s["priority"], (*lead, self.capacity)) for s in (a, b)]
        return self._best(jnp.concatenate(rows, -2), jnp.concatenate(drawn, -1))

    def reduce(self, stacked: State) -> State:
        """The best of all."""
        rows, priority = stacked["rows"], stacked["priority"]
        rows = jnp.moveaxis(rows, 0, -3)
        priority = jnp.moveaxis(priority, 0, -2)
        many = rows.shape[-3] * rows.shape[-2]
        return self._best(
            rows.reshape(*rows.shape[:-3], many, rows.shape[-1]),
            priority.reshape(*priority.shape[:-2], many),
        )

    def across(self, x: State, axis_names: Axes) -> State:
        """The best of all devices."""
        index = lax.axis_index(axis_names)

        def gather(part: jax.Array) -> jax.Array:
            """As all_gather, in a form whose type says that all devices have the same."""
            room = jnp.zeros((lax.axis_size(axis_names), *part.shape), part.dtype)
            return lax.psum(room.at[index].set(part), axis_names)

        return self.reduce(jax.tree.map(gather, x))

    def value(self, state: State) -> jax.Array:
        """The rows by falling priority; NaN where there are none."""
        return jnp.where(state["priority"][..., None] < 0, jnp.nan, state["rows"])
