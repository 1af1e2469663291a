"""What must turn with what, if a value is rotated along one axis: the search behind `rotate`.

Like `channel_flow`, for an orthogonal matrix instead of factors. A value that is rotated makes the
values it is added to, or read and written by, rotate along; sums of squares do not notice, which is
how a norm commutes. A search ends with the parameters that absorb the matrix, or with the first
operation that does not commute. Between the two: a norm's gain must be folded into its readers
first (it is noted), and a mean over channels asks for a matrix that leaves the ones vector alone.

No operation is known by name: embeddings, attention, norms and heads are what their equations are.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.passes import registry
from jaxquant.passes.channel_graph import REPEAT, Node, Value
from jaxquant.passes.channel_solver import SAME, constant

Form = Literal["rotated", "squared"]


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a value is rotated: a part of a dimension.

    Attributes:
      dim: the dimension.
      size: size of the matrix.
      inner: distance along the dimension of neighbours that are mixed; its length is a multiple of
        ``size * inner``.
    """

    dim: int
    size: int
    inner: int = 1

    def at(self, dim: int) -> Spot:
        """The same in another dimension."""
        return dataclasses.replace(self, dim=dim)


class Conflict(Exception):
    """An operation that does not commute with the rotation of a value."""

    def __init__(self, why: str, node: Node | None, value: Value | None = None) -> None:
        self.why, self.node, self.value = why, node, value
        place = f"{node.kind} at {node.source.rpartition('/')[2]}: " if node else ""
        super().__init__(place + why)


class Turn:
    """A search for all that rotates with one value.

    Attributes:
      spots: where each value is rotated.
      before: for each of them the operation and the value that made it rotate.
      gains: products with a parameter that would have to be one: the operand that rotates, and the
        parameter (or what was made of it by moving elements).
      fixes_ones: whether the matrix must leave the vector of ones as it is.
      joins: sums of two values that rotate.
    """

    def __init__(self) -> None:
        self.spots: dict[Value, Spot] = {}
        self.before: dict[Value, tuple[Node | None, Value | None]] = {}
        self.gains: dict[Node, tuple[int, Value]] = {}
        self.fixes_ones = False
        self.joins: list[Node] = []
        self._squared: set[Value] = set()
        self._todo: deque[Node] = deque()

    def run(self, starts: Sequence[tuple[Value, Spot]]) -> Turn:
        """Searches from some values.

        Raises:
          Conflict: something that would have to rotate cannot.
        """
        for value, spot in starts:
            self.rotate(value, spot, None, None)
        while self._todo:
            node = self._todo.popleft()
            rule = RULES.get(node.kind)
            if rule is None:
                raise Conflict("does not commute with a rotation", node)
            rule(self, node)
        return self

    def get(self, value: Value) -> Spot | None:
        """Where a value is rotated, or None."""
        return None if value in self._squared else self.spots.get(value)

    def squared(self, value: Value) -> Spot | None:
        """Where a value holds squares of a rotated one, or None."""
        return self.spots.get(value) if value in self._squared else None

    def rotate(
        self, value: Value, spot: Spot, node: Node | None, source: Value | None,
        form: Form = "rotated",
    ) -> None:  # fmt: skip
        """States that a value is rotated."""
        if value in self.spots:
            if self.spots[value] != spot or (form == "squared") != (value in self._squared):
                raise Conflict("would rotate in two ways", node, value)
            return
        if form == "rotated" and uniform(value, spot.dim):
            if constant(value) != 0:
                self.fixes_ones = True
            return
        if value.explicit == "fixed":
            raise Conflict("lies behind an explicit rotation", node, value)
        if value.is_result:
            raise Conflict("is a result of the function", node, value)
        if value.is_input:
            raise Conflict("is an input of the function that is no parameter", node, value)
        if value.producer is None and value.path is None and not value.explicit:
            raise Conflict("is a constant of the program", node, value)
        if not value.is_float:
            raise Conflict("holds no floating point numbers", node, value)
        self.spots[value], self.before[value] = spot, (node, source)
        if form == "squared":
            self._squared.add(value)
        self._todo.extend(value.users)
        if value.producer is not None:
            self._todo.append(value.producer)


TurnRule = Callable[[Turn, Node], None]

RULES: dict[Primitive | str, TurnRule] = {}


def register(*kinds: Primitive | str) -> Callable[[TurnRule], TurnRule]:
    """Decorator that enters a rule for operations; a second rule for one is an error."""
    return registry.register(RULES, *kinds)


# --- what is the same along an axis, and what is a gain -----------------------------------------

_ELEMENTWISE = frozenset(
    {
        *SAME, jp.add_p, jp.sub_p, jp.mul_p, jp.div_p, jp.max_p, jp.min_p, jp.neg_p, jp.exp_p,
        jp.log_p, jp.rsqrt_p, jp.sqrt_p, jp.square_p, jp.integer_pow_p, jp.pow_p, jp.select_n_p,
        jp.tanh_p, jp.logistic_p, jp.abs_p,
    }
)  # fmt: skip


def uniform(value: Value, dim: int) -> bool:
    """Whether a value is known to be the same along a dimension."""
    if not value.shape or value.shape[dim] == 1 or constant(value) is not None:
        return True
    node = value.producer
    if node is None:
        return False
    if node.kind is jp.broadcast_in_dim_p:
        dims = [int(d) for d in node.params["broadcast_dimensions"]]
        return dim not in dims or uniform(node.ins[0], dims.index(dim))
    if node.kind == REPEAT:
        return uniform(node.ins[0], dim)
    if node.kind in _ELEMENTWISE:
        return all(uniform(v, dim) for v in node.ins)
    return False


def gain_of(value: Value, dim: int) -> Value | None:
    """The parameter that is all of a value which differs along a dimension, or None."""
    if value.params and not value.from_input:
        return value
    node = value.producer
    if node is None:
        return None
    if node.kind in SAME:
        return gain_of(node.ins[0], dim)
    if node.kind is jp.mul_p and all(len(v.shape) == len(value.shape) for v in node.ins):
        varying = [v for v in node.ins if not uniform(v, dim)]
        return gain_of(varying[0], dim) if len(varying) == 1 else None
    return None
