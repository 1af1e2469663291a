"""What a product does to its input before it meets the weight: factors, and a Hadamard matrix.

Where no parameter can absorb the inverse of what a transform did to a weight (`Smooth`, `Rotate`),
the quantized weight keeps it: ``x W = ((x * factor) H) W'``, of which W' is stored in codes. So a
weight with `QTensor.input_factor` and `QTensor.input_turn` still stands for W: whatever reads the
weight itself gets W, and only products transform their input. Called by `QTensor`, by the
primitives of products, and by ptq.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.blocks import broadcast_blocks
from jaxquant.core.rotations import Rotation, hadamard


class UnmetInputError(ValueError):
    """A product does not sum over what the weight wants its input to be transformed along."""


@dataclasses.dataclass(frozen=True)
class InputTurn:
    """A Hadamard matrix along one axis of a weight that its product sums over.

    Attributes:
      axis: the weight's axis, negative, so that removing leading axes keeps it.
      size: rows of the matrix; the axis consists of runs of that many, each turned by it.
      inner: distance along the axis of neighbours that are mixed.
    """

    axis: int
    size: int
    inner: int = 1

    @property
    def matrix(self) -> Rotation:
        """The matrix; it follows from the size alone."""
        return hadamard(self.size)

    def check(self, shape: Sequence[int]) -> str:
        """What is wrong with it for a weight of this shape, or ""."""
        if not -len(shape) <= self.axis < 0:
            return f"axis {self.axis} must be in [-{len(shape)}, -1]"
        n, step = shape[self.axis], self.size * self.inner
        if self.size < 2 or self.inner < 1 or n % step:
            return f"runs of {self.size} at distance {self.inner} do not fill an axis of {n}"
        try:
            hadamard(self.size)
        except ValueError as error:
            return str(error)
        return ""

    def __str__(self) -> str:
        """Its size, and where."""
        return f"H{self.size} along {self.axis}" + (f"/{self.inner}" if self.inner > 1 else "")

    def moved(self, move: Callable[[int], int], ndim: int) -> InputTurn:
        """The same after axes moved: `move` takes an axis from the front, and gives it negative."""
        return dataclasses.replace(self, axis=move(self.axis + ndim))


def weight_of(values: jax.Array, factor: Any, turn: InputTurn | None) -> jax.Array:
    """W of W': what a weight stands for, given what its codes do.

    Args:
      values: W', float.
      factor: `QTensor.input_factor` or None.
      turn: `QTensor.input_turn` or None.
    """
    if turn is not None:
        axis = turn.axis % values.ndim
        values = turn.matrix.apply(values, axis, turn.inner, inverse=True)
    if factor is not None:
        wide = jnp.promote_types(values.dtype, jnp.float32)
        spread = broadcast_blocks(factor.astype(wide), values.shape)
        values = (values.astype(wide) * spread).astype(values.dtype)
    return values


def input_of(
    x: jax.Array, factor: Any, turn: InputTurn | None, places: Sequence[int | None]
) -> jax.Array:
    """(x * factor) H: what the codes of a weight are multiplied with.

    One jitted call, so that equal ones can be told to be equal, and a program stays readable.

    Args:
      x: the input, float. Its dtype stays; in between it is float32 at least.
      factor: `QTensor.input_factor` or None.
      turn: `QTensor.input_turn` or None.
      places: for each axis of the weight the axis of x that it meets, or None.

    Raises:
      UnmetInputError: the factor differs, or x would be turned, along an axis that meets none
        of x's.
    """
    if factor is None and turn is None:
        return x
    if factor is not None:
        lost = [i for i, n in enumerate(factor.shape) if n != 1 and places[i] is None]
        if lost:
            raise UnmetInputError(
                f"its input factor differs along axis {lost[0]}, which this product does not sum"
            )
    if turn is not None and places[turn.axis] is None:
        raise UnmetInputError(
            f"its input is turned along axis {turn.axis}, which this product does not sum"
        )
    return transform_input(x, factor, turn=turn, places=tuple(places))


@functools.partial(jax.jit, static_argnames=("turn", "places"))
def transform_input(
    x: jax.Array, factor: Any, *, turn: InputTurn | None, places: tuple[int | None, ...]
) -> jax.Array:
    """`input_of` without its checks."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    if factor is not None:
        y = y * _at_x(factor.astype(wide), x.shape, places)
    if turn is not None:
        axis = places[turn.axis]
        assert axis is not None
        y = turn.matrix.apply(y, axis, turn.inner)
    return y.astype(x.dtype)


def _at_x(factor: jax.Array, x_shape: Sequence[int], places: Sequence[int | None]) -> jax.Array:
    """The factor laid out over x's axes."""
    kept = [i for i, place in enumerate(places) if place is not None]
    order = sorted(kept, key=lambda i: places[i] or 0)
    factor = lax.squeeze(factor, [i for i in range(factor.ndim) if i not in kept])
    factor = lax.transpose(factor, [kept.index(i) for i in order])
    there = [places[i] for i in order]
    factor = lax.expand_dims(factor, [d for d in range(len(x_shape)) if d not in there])
    sizes = [n if m != 1 else 1 for n, m in zip(x_shape, factor.shape, strict=True)]
    return broadcast_blocks(factor, sizes)
