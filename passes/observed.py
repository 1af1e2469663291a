"""What of an operation is observed: one operand, and what the operation does with its axes.

`observers` makes an `Operand` of each product it meets and hands every statistic a `Seen`: the
values, seen along the axes that the product sums over. Called by `statistics` and
`row_statistics`; knows no parameter and no program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.reference_conv import plain_ragged


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of a product, as an abstract value.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      contract: the axes that are summed over, in the order of the other operand's axes.
      kept: batch axes that number experts of a weight: statistics of channels keep them apart.
      experts: for a ragged dot how many experts share the rows, else 0.
      conv: parameters of a convolution, with the kernel's shape under "kernel"; else None.
    """

    shape: tuple[int, ...]
    dtype: Any
    contract: tuple[int, ...]
    kept: tuple[int, ...] = ()
    experts: int = 0
    conv: Any = dataclasses.field(default=None, compare=False)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Sizes of the axes that are kept apart."""
        return (self.experts,) if self.experts else tuple(self.shape[a] for a in self.kept)

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Sizes of the axes that are summed over; the input features of a convolution."""
        return tuple(self.shape[a] for a in self.contract)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """``(*kept, K)``, where K is how many products are summed for one result."""
        if self.conv is None:
            return (*self.kept_shape, math.prod(self.channel_shape))
        groups = self.conv["feature_group_count"]
        window = [n for a, n in enumerate(self.conv["kernel"]) if a != self._out_features]
        return (*((groups,) if groups > 1 else ()), math.prod(window))

    @property
    def _out_features(self) -> int:
        return self.conv["dimension_numbers"].rhs_spec[0]


@dataclasses.dataclass(frozen=True)
class Seen:
    """Values of an `Operand`.

    Attributes:
      x: the values.
      use: what they are.
      key: a key for statistics that draw at random, or None.
      group_sizes: of a ragged dot, how many rows belong to each expert.
    """

    x: jax.Array
    use: Operand
    key: Any = None
    group_sizes: Any = None

    def channels(self) -> tuple[jax.Array, jax.Array | None]:
        """``[*kept, n, *contract]``, and None or which of them count, ``[*kept, n, 1, ...]``."""
        use = self.use
        free = [a for a in range(self.x.ndim) if a not in use.kept and a not in use.contract]
        order = (*use.kept, *free, *use.contract)
        count = math.prod(self.x.shape[a] for a in free)
        kept = tuple(self.x.shape[a] for a in use.kept)
        values = lax.transpose(self.x, order).reshape(*kept, count, *use.channel_shape)
        if not use.experts:
            return values, None
        ends = jnp.cumsum(self.group_sizes)
        rows = lax.broadcasted_iota(ends.dtype, (use.experts, count), 1)
        mask = (rows < ends[:, None]) & (rows >= (ends - self.group_sizes)[:, None])
        mask = mask.reshape(use.experts, count, *[1] * len(use.contract))
        return jnp.broadcast_to(values, (use.experts, *values.shape)), mask

    def rows(self) -> tuple[jax.Array, jax.Array | None]:
        """``[*kept, n, K]``, and None or which rows count, ``[*kept, n, 1]``.

        The K values of a row are in the order of the weight's axes. For a convolution they are
        the patches under its window.
        """
        if self.use.conv is not None:
            return self._patches(), None
        values, mask = self.channels()
        k = self.use.row_shape[-1]
        lead = len(self.use.kept_shape) + 1
        values = values.reshape(*values.shape[:lead], k)
        return values, None if mask is None else mask.reshape(*mask.shape[:lead], 1)

    def _patches(self) -> jax.Array:
        p, use = self.use.conv, self.use
        numbers = p["dimension_numbers"]
        out_features, in_features, *spatial = numbers.rhs_spec
        window = [p["kernel"][a] for a in spatial]
        patches = lax.conv_general_dilated_patches(
            self.x, window, p["window_strides"], p["padding"], p["lhs_dilation"],
            p["rhs_dilation"], dimension_numbers=numbers, precision=lax.Precision.HIGHEST,
        )  # fmt: skip
        patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
        groups, per_group = p["feature_group_count"], p["kernel"][in_features]
        # Features come major to the window; the kernel may have its axes in another order.
        patches = patches.reshape(-1, groups, per_group, *window)
        axes = sorted(a for a in range(len(p["kernel"])) if a != out_features)
        order = [2 if a == in_features else 3 + spatial.index(a) for a in axes]
        patches = lax.transpose(patches, (1, 0, *order)).reshape(groups, -1, use.row_shape[-1])
        return patches if groups > 1 else patches[0]


Side = Literal["lhs", "rhs"]


def dot_operand(eqn: Any, side: int, *, weight: bool) -> Operand:
    """The operand number ``side`` of a dot_general.

    Args:
      eqn: the equation.
      side: 0 or 1.
      weight: whether the other operand is a weight, whose batch axes are kept apart.
    """
    contract, batch = eqn.params["dimension_numbers"]
    aval = eqn.invars[side].aval
    # In the order of the other operand's axes, so that it is the weight that says which is first.
    own, other = contract[side], contract[1 - side]
    ordered = tuple(a for _, a in sorted(zip(other, own))) if weight else tuple(sorted(own))
    kept = ()
    if weight:
        kept = tuple(a for _, a in sorted(zip(batch[1 - side], batch[side])))
    return Operand(tuple(aval.shape), aval.dtype, ordered, kept)


def conv_operand(eqn: Any) -> Operand:
    """The input of a convolution."""
    aval, kernel = eqn.invars[0].aval, eqn.invars[1].aval
    params = {**eqn.params, "kernel": tuple(kernel.shape)}
    features = eqn.params["dimension_numbers"].lhs_spec[1]
    return Operand(tuple(aval.shape), aval.dtype, (features,), conv=params)


def ragged_operand(eqn: Any) -> Operand | None:
    """The rows of a ragged dot; None where it is not [m, k] with [experts, k, n]."""
    x, values, sizes = (v.aval for v in eqn.invars[:3])
    if len(eqn.invars) != 3 or not plain_ragged(x, values, sizes, eqn.params):
        return None
    return Operand(tuple(x.shape), x.dtype, (1,), experts=values.shape[0])
