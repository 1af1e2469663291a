"""What `find_weights` reports: one `OpUse` for each meeting of a parameter with an operation.

Read by `assign_recipe`, by plans and reports. Plain frozen data; no jaxpr is kept alive by it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxquant.passes.axes import Factor, Origin, Role

Site = tuple[int, ...]
Primitive = Literal["dot_general", "conv", "ragged_dot", "gather", "other"]


@dataclasses.dataclass(frozen=True)
class AxisUse:
    """What an operation does with one axis of a parameter.

    Attributes:
      axis: number of the axis.
      length: its length.
      parts: (length, role) of its pieces, major to minor; one piece unless it was reshaped.
      splits: lengths it was cut into; blocks must divide them or be multiples.
      align: blocks must divide this or be the whole axis, because the axis was sliced; else 0.
      minors: axes that were merged behind this one; blocks along it need all of theirs.
    """

    axis: int
    length: int
    parts: tuple[tuple[int, Role], ...]
    splits: tuple[int, ...] = ()
    align: int = 0
    minors: tuple[int, ...] = ()

    @property
    def role(self) -> Role:
        """Role of neighbours along the axis: that of its minor piece."""
        return self.parts[-1][1] if self.parts else "free"

    @property
    def contracted(self) -> int:
        """How many neighbours along the axis the operation sums over."""
        return self.run("contract")

    @property
    def is_layer(self) -> bool:
        """Whether the whole axis only numbers layers (or experts) outside the operation."""
        return bool(self.parts) and all(role == "layer" for _, role in self.parts)

    def allows(self, block: int) -> bool:
        """Whether the op still sees blocks of this size as blocks."""
        if self.length % block:
            return False
        sliced = self.align and block != self.length and self.align % block
        return not sliced and all(n % block == 0 or block % n == 0 for n in self.splits)

    def run(self, *roles: Role) -> int:
        """Length of the longest run of neighbours within pieces of these roles."""
        run = 1
        for length, role in reversed(self.parts):
            if role not in roles:
                break
            run *= length
        return run


@dataclasses.dataclass(frozen=True)
class OpUse:
    """One operation that a parameter takes part in, or a product of two activations.

    Attributes:
      site: place of the equation (see `interpreter.Context`).
      primitive: "dot_general", "conv", "ragged_dot", "gather" (a lookup whose rows are used as
        activations), or "other" (anything that has no quantized form).
      kind: op kind in the user's words, a key of `jaxquant.core.recipe.OP_KINDS`, or "other".
      module: path of the module, or None where no module is known.
      cls: name of the module's class, or None.
      param: path of the parameter, or None for a product of two activations.
      joined: paths of other parameters that are part of the same operand (stacked, concatenated).
      weight_side: which operand of a product the parameter is.
      axes: what happens to each axis of the parameter; empty for "other".
      gathered: whether the operand holds rows picked by an array of indices.
      x: shape and dtype of the other operand (the indices of a lookup); None for "other".
      weight: shape and dtype of the operand that the parameter became; None without one.
      out: shape and dtype of the result; None for "other".
      dimension_numbers: those of the equation.
      source: the user's source line.
      detail: for "other", what is done with the parameter.
      backward: whether it is part of a gradient that the program takes itself.
    """

    site: Site
    primitive: Primitive
    kind: str
    module: str | None
    cls: str | None
    param: str | None
    joined: tuple[str, ...] = ()
    weight_side: Literal["lhs", "rhs"] = "rhs"
    axes: tuple[AxisUse, ...] = ()
    gathered: bool = False
    x: Any = None
    weight: Any = None
    out: Any = None
    dimension_numbers: Any = None
    source: str = ""
    detail: str = ""
    backward: bool = False

    @property
    def is_product(self) -> bool:
        """Whether it multiplies and sums: a dot_general, conv or ragged_dot."""
        return self.primitive in ("dot_general", "conv", "ragged_dot")

    @property
    def contracts(self) -> bool:
        """Whether it sums over an axis of the parameter (a norm gain's product does not)."""
        return any(axis.contracted > 1 for axis in self.axes)

    @property
    def work(self) -> int:
        """Multiplications of one execution, for products; 0 otherwise."""
        if not self.is_product:
            return 0
        if self.primitive == "dot_general":
            contract = self.dimension_numbers[0][0 if self.weight_side == "rhs" else 1]
            terms = [self.x.shape[axis] for axis in contract]
        else:
            terms = [axis.contracted for axis in self.axes]
        return math.prod(self.out.shape) * math.prod(terms)

    def with_role(self, role: Role) -> tuple[int, ...]:
        """The parameter's axes that have this role."""
        return tuple(a.axis for a in self.axes if a.role == role)


def axis_uses(
    origin: Origin, shape: Sequence[int], role_of: Callable[[int], Role]
) -> tuple[AxisUse, ...]:
    """The use of each parameter axis, given the role of each dimension of the operand.

    Args:
      origin: where the operand's dimensions come from.
      shape: the parameter's shape.
      role_of: role of the operand's dimension i.
    """
    found: dict[int, list[tuple[Factor, Role]]] = {a: [] for a in range(len(shape))}
    present = [(f, role_of(d)) for d, factors in enumerate(origin.dims) for f in factors]
    for factor, role in (*origin.removed, *present):
        if factor.axis is not None:
            found[factor.axis].append((factor, role))
    uses = []
    for axis, length in enumerate(shape):
        pieces = sorted(found[axis], key=lambda piece: -piece[0].inner)
        splits = {n for a, n in origin.splits if a == axis}
        uses.append(
            AxisUse(
                axis,
                length,
                _merged([(f.extent, role) for f, role in pieces]),
                tuple(sorted(splits)),
                math.gcd(*(n for a, n in origin.aligns if a == axis)),
                tuple(sorted(minor for major, minor in origin.merges if major == axis)),
            )
        )
    return tuple(uses)


def _merged(parts: Sequence[tuple[int, Role]]) -> tuple[tuple[int, Role], ...]:
    merged: list[tuple[int, Role]] = []
    for length, role in parts:
        if merged and merged[-1][1] == role:
            length *= merged.pop()[0]
        merged.append((length, role))
    return tuple(merged)
