"""What the rules of `find_weights` are written in: followed values, steps, and the two tables.

`MOVES` has the operations that only move elements; `STRUCTURE` has products (those of two
activations are listed too) and equations with sub-jaxprs, whose rules run whether or not a
parameter takes part. The rules are in `weight_moves` and `weight_products`; they mirror those of
`rewrite`: what is followed here must keep its codes there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jax.extend.core import Primitive

from jaxquant.core import _compat
from jaxquant.passes import registry
from jaxquant.passes.axes import Origin, Role
from jaxquant.passes.interpreter import Site


@dataclasses.dataclass(frozen=True)
class Followed:
    """A value whose elements all come from parameters.

    Attributes:
      shape: its shape.
      origins: where it comes from; several where parameters were joined.
    """

    shape: tuple[int, ...]
    origins: tuple[Origin, ...]

    def moved(
        self, shape: Sequence[int], move: Callable[[Origin], Origin | None]
    ) -> Followed | None:
        """The value after an operation; None when nothing of its origins is left."""
        origins = tuple(o for o in map(move, self.origins) if o is not None)
        return Followed(tuple(shape), origins) if origins else None

    @property
    def gathered(self) -> bool:
        """Whether it holds rows that were looked up."""
        return any(o.gathered is not None for o in self.origins)


Values = list[Followed | None]


class Walker(Protocol):
    """What rules need of the walk through the jaxpr."""

    def run(
        self,
        jaxpr: Any,
        args: Sequence[Followed | None],
        site: Site,
        names: tuple[str, ...],
        backward: bool = False,
    ) -> Values:
        """Follows values through an open jaxpr."""

    def end(self, value: Followed, detail: str, step: Step | None = None) -> None:
        """Lists a use that has no quantized form; the way of the value ends here."""

    def remember_lookup(self, step: Step, value: Followed, roles: Sequence[Role]) -> None:
        """A lookup of rows, to be listed once the rows are used as activations."""

    def product(
        self, step: Step, primitive: str, value: Followed | None, roles: Sequence[Role], side: int
    ) -> None:
        """Lists a product with a weight at operand ``side``, or with none."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation on the way: its place and scope names, those of enclosing calls included.

    Attributes:
      walker: the walk.
      eqn: the equation.
      site: its place (see `interpreter.Context`).
      names: its scope names.
      backward: whether it is part of a gradient that the program takes itself.
    """

    walker: Walker
    eqn: Any
    site: Site
    names: tuple[str, ...]
    backward: bool = False

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.eqn.outvars[0].aval.shape

    def enter(self, sub: int, jaxpr: Any, args: Sequence[Followed | None]) -> Values:
        """Follows values through sub-jaxpr number ``sub``."""
        inner, _ = _compat.open_jaxpr(jaxpr)
        return self.walker.run(inner, args, (*self.site, sub), self.names, self.backward)

    def end(self, values: Sequence[Followed | None], detail: str) -> None:
        """Values that leave the followed world here."""
        for value in values:
            if value is not None:
                self.walker.end(value, detail, self)


Rule = Callable[[Step, Values], Values]
MOVES: dict[Primitive, Rule] = {}
STRUCTURE: dict[Primitive, Rule] = {}


def register(table: dict[Primitive, Rule], *primitives: Primitive) -> Callable[[Rule], Rule]:
    """Decorator that enters a rule for ``primitives``; a second rule for one is an error.

    A rule returns what the outputs come from, None for what comes from no parameter alone. It
    raises `Unstructured` with what the equation does to the parameter; then its way ends.
    """
    return registry.register(table, *primitives, others=(MOVES, STRUCTURE))
