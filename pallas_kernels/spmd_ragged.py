"""Rows grouped by expert on several devices: which rows and which experts are one device's own.

Experts that are split over mesh axes stay where they lie (expert-parallel): each device multiplies
the rows of its experts and leaves zeros for the others, and the devices' results are summed. Rows
may be split over other mesh axes, at any place: what counts is known from the sizes of the groups.
Used by `jaxquant.pallas_kernels.ragged_dispatch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.spmd import Partition

# Rows [m, k] times experts [experts, k, n]; the experts' axis is neither.
RAGGED_AXES = DotAxes((1,), (), (0,), (1,), (), (2,), "rhs")
# Its transpose: cotangents [m, n] with the same experts, summed over n.
RAGGED_BACK = DotAxes((1,), (), (0,), (2,), (), (1,), "rhs")


@dataclasses.dataclass(frozen=True)
class LocalExperts:
    """One device's product, given the sizes of all groups of all rows; called in `shard_map`.

    Attributes:
      run: a `RaggedProduct` of the device's rows and experts, or the like by XLA.
      partition: what each device does.
    """

    run: Callable[..., jax.Array]
    partition: Partition

    def __call__(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        input_scale: jax.Array | None,
        group_sizes: jax.Array,
    ) -> jax.Array:
        """Arguments as of `RaggedProduct`, which are the device's own but for `group_sizes`."""
        p, rows = self.partition, x.shape[0]
        ends = jnp.cumsum(group_sizes)
        first = _index(p.x[0]) * rows
        inside = jnp.clip(jnp.stack([ends - group_sizes, ends]), first, first + rows)
        sizes = inside[1] - inside[0]  # of each group, what lies in the device's rows
        if not p.w[0]:
            return self.run(x, quantized, codes, scale, zero_point, input_scale, sizes)
        experts = p.weight.shape[0]
        own = _index(p.w[0]) * experts
        before = jnp.sum(jnp.where(jnp.arange(len(group_sizes)) < own, sizes, 0))

        def ahead(part: jax.Array) -> jax.Array:
            """The rows of the device's own experts go to the front."""
            return jnp.roll(part, -before, axis=0) if part.shape[0] == rows else part

        out = self.run(
            ahead(x),
            None if quantized is None else (ahead(quantized[0]), ahead(quantized[1])),
            codes,
            scale,
            zero_point,
            input_scale,
            jax.lax.dynamic_slice_in_dim(sizes, own, experts),
        )
        return jnp.roll(out, before, axis=0)


def _index(names: tuple[str, ...]) -> jax.Array | int:
    """Which piece of an axis that is split over these mesh axes is the device's."""
    return jax.lax.axis_index(names) if names else 0
