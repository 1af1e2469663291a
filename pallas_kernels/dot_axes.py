"""The axes of a dot_general between an activation and a weight, whichever side the weight is on.

Used by the reference, by the choice of a method and by kernels' dispatch, so that none of them
has to think in left and right. Shapes only; no arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
from jax import lax

Side = Literal["lhs", "rhs"]
DotDimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


class DotAxes(NamedTuple):
    """Which axis of the activation x and of the weight w plays which part.

    `x_contract[i]` meets `w_contract[i]`, `x_batch[i]` meets `w_batch[i]`; free axes are in
    their own order. The result has the batch axes, then the free axes of the left operand, then
    those of the right one.
    """

    x_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    x_free: tuple[int, ...]
    w_contract: tuple[int, ...]
    w_batch: tuple[int, ...]
    w_free: tuple[int, ...]
    weight_side: Side

    @classmethod
    def make(
        cls, dimension_numbers: DotDimensionNumbers, x_ndim: int, w_ndim: int, weight_side: Side
    ) -> DotAxes:
        """From lax.dot_general's `((lhs, rhs) contracting, (lhs, rhs) batch)` dimensions."""
        contract, batch = dimension_numbers
        x, w = (0, 1) if weight_side == "rhs" else (1, 0)
        x_contract, w_contract = tuple(contract[x]), tuple(contract[w])
        x_batch, w_batch = tuple(batch[x]), tuple(batch[w])
        return cls(
            x_contract,
            x_batch,
            _others(x_ndim, x_contract + x_batch),
            w_contract,
            w_batch,
            _others(w_ndim, w_contract + w_batch),
            weight_side,
        )

    @property
    def dimension_numbers(self) -> DotDimensionNumbers:
        """As lax.dot_general takes them."""
        if self.weight_side == "rhs":
            return (self.x_contract, self.w_contract), (self.x_batch, self.w_batch)
        return (self.w_contract, self.x_contract), (self.w_batch, self.x_batch)

    @property
    def x_first(self) -> DotAxes:
        """The same product with the weight on the right."""
        return self._replace(weight_side="rhs")

    @property
    def stacked(self) -> DotAxes:
        """The same product with one more batch axis, the first of both operands."""
        return DotAxes(
            _shifted(self.x_contract),
            (0, *_shifted(self.x_batch)),
            _shifted(self.x_free),
            _shifted(self.w_contract),
            (0, *_shifted(self.w_batch)),
            _shifted(self.w_free),
            self.weight_side,
        )

    @property
    def with_x_row(self) -> DotAxes:
        """The same product after an axis was put in front of an x that has no free axes."""
        return self._replace(
            x_contract=_shifted(self.x_contract), x_batch=_shifted(self.x_batch), x_free=(0,)
        )

    @property
    def without_batch(self) -> DotAxes:
        """The same product of one element of the batch axes, which are gone from both operands."""
        return DotAxes(
            _ranks(self.x_contract, self.x_batch),
            (),
            _ranks(self.x_free, self.x_batch),
            _ranks(self.w_contract, self.w_batch),
            (),
            _ranks(self.w_free, self.w_batch),
            self.weight_side,
        )

    def without_w_free(self, axis: int) -> DotAxes:
        """The same product after a free axis of the weight was taken out."""
        contract, batch, free = (
            tuple(a - (a > axis) for a in part if a != axis)
            for part in (self.w_contract, self.w_batch, self.w_free)
        )
        return self._replace(w_contract=contract, w_batch=batch, w_free=free)

    def rows(self, x_shape: Sequence[int]) -> int:
        """M: how many rows of x meet one matrix of the weight (batch axes not counted)."""
        return math.prod(x_shape[a] for a in self.x_free)

    def columns(self, w_shape: Sequence[int]) -> int:
        """N: how many columns one matrix of the weight has (batch axes not counted)."""
        return math.prod(w_shape[a] for a in self.w_free)

    def weight_out_axis(self, w_axis: int) -> int:
        """Where a free or batch axis of the weight lies in the result."""
        if w_axis in self.w_batch:
            return self.w_batch.index(w_axis)
        before = len(self.w_batch) + self.w_free.index(w_axis)
        return before if self.weight_side == "lhs" else before + len(self.x_free)

    def x_to_out(self, x_part: jax.Array) -> jax.Array:
        """Lays out an array over x's axes, of size 1 on contracted ones, to fit the result."""
        part = lax.squeeze(x_part, self.x_contract)
        order = _ranks(self.x_batch + self.x_free, self.x_contract)
        part = lax.transpose(part, order)
        start = len(self.x_batch)
        if self.weight_side == "rhs":
            start += len(self.x_free)
        return lax.expand_dims(part, range(start, start + len(self.w_free)))

    def w_to_out(self, w_part: jax.Array) -> jax.Array:
        """Lays out an array over w's axes, of size 1 on contracted ones, to fit the result."""
        swapped = DotAxes(
            self.w_contract,
            self.w_batch,
            self.w_free,
            self.x_contract,
            self.x_batch,
            self.x_free,
            "rhs" if self.weight_side == "lhs" else "lhs",
        )
        return swapped.x_to_out(w_part)

    def w_to_x(self, w_part: jax.Array) -> jax.Array:
        """Lays out an array over w's axes, of size 1 on free ones, to fit x."""
        part = lax.squeeze(w_part, self.w_free)
        sources = self.w_batch + self.w_contract
        targets = self.x_batch + self.x_contract
        by_target = tuple(s for _, s in sorted(zip(targets, sources, strict=True)))
        part = lax.transpose(part, _ranks(by_target, self.w_free))
        return lax.expand_dims(part, self.x_free)


def _shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes' numbers behind a new leading axis."""
    return tuple(a + 1 for a in axes)


def _others(ndim: int, taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a not in taken)


def _ranks(axes: tuple[int, ...], removed: tuple[int, ...]) -> tuple[int, ...]:
    """The axes' numbers after the removed ones are gone."""
    return tuple(a - sum(r < a for r in removed) for a in axes)
