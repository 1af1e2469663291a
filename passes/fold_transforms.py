"""`FoldTransforms`: factors per channel, folded into the parameters that can absorb them.

A transform of this kind (SmoothQuant, AWQ) leaves the float function as it is: weights are
multiplied by factors along their input channels, and what feeds them is divided. `channel_flow`
says which parameters take part, with proof. The pass changes parameters, not equations: it leaves
in the program's facts what each parameter is to be multiplied with, and `fold_parameters` does so.
Only where no parameter can absorb, and an explicit operation is wanted, the program changes.

Called by `jaxquant.smooth`, or put into a pipeline by users with factors of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.passes.channel_flow import ChannelGroup, find_channel_groups
from jaxquant.passes.channel_labels import Array
from jaxquant.passes.fold_multiply import insert_multiplies
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Program

Unfoldable = Literal["refuse", "leave", "multiply"]
ParameterFactors = Mapping[str, tuple[Array, ...]]

FACT = "parameter_factors"


class FoldError(ValueError):
    """A factor cannot be folded, or a fold changed the function."""


@dataclasses.dataclass(frozen=True, eq=False)
class FoldTransforms(Pass):
    """Folds factors per channel into parameters.

    Attributes:
      factors: by the path of any weight of a group the factors of its input channels, positive, of
        a shape that broadcasts to the group's ``channels``: one leading axis for each scan around
        the products, then the axes of the input. Or a function of a group that gives its factors
        by number, ``[group.count]``, or None to leave the group.
      unfoldable: what to do where no parameter can absorb the factors: "refuse" is an error,
        "leave" leaves the factors out, "multiply" divides the input by an explicit operation.

    The fact "parameter_factors" of the result holds arrays to multiply each parameter with.
    """

    factors: Mapping[str, Any] | Callable[[ChannelGroup], Array | None] = dataclasses.field(
        repr=False
    )
    unfoldable: Unfoldable = "refuse"

    name: ClassVar[str] = "fold_transforms"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    ensures: ClassVar[frozenset[str]] = frozenset({FACT})
    retraces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the option."""
        if self.unfoldable not in get_args(Unfoldable):
            raise ValueError(
                f"unfoldable={self.unfoldable!r} must be one of {list(get_args(Unfoldable))}"
            )

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`.

        Raises:
          FoldError: a group cannot be folded and that is refused; all of them are listed.
          ValueError: factors for a path that no group has, of a wrong shape, or not positive.
        """
        groups = find_channel_groups(program)
        notes: list[str] = []
        refused: list[str] = []
        folded = {path: list(arrays) for path, arrays in program.facts.get(FACT, {}).items()}
        inserted: dict[Any, Any] = {}
        for group, factors_of in self._wanted(groups):
            explicit = not group.foldable and self.unfoldable == "multiply"
            if explicit and group.explicit is not None:
                group = group.explicit
            values = factors_of(group)
            if values is None:
                continue
            if not group.foldable:
                refused.append(f"{group.name}: {'; '.join(group.obstacles)}")
                notes.append(f"{group.name}: left as it is: {'; '.join(group.obstacles)}")
                continue
            notes.append(_note(group, explicit))
            for path, array in group_factors(group, values).items():
                folded.setdefault(path, []).append(array)
            if explicit:
                divisors = _table(group, values)[group.count - group.channels]
                paths = frozenset(group.consumers)
                inserted.update(dict.fromkeys(group.readers, (paths, divisors)))
        if refused and self.unfoldable != "leave":
            raise FoldError(
                "these factors cannot be folded into parameters (unfoldable='leave' leaves them "
                "out, 'multiply' makes explicit operations where the weight can be changed):\n  "
                + "\n  ".join(refused)
            )
        if inserted:
            program = insert_multiplies(program, inserted)
        facts = {FACT: {path: tuple(arrays) for path, arrays in folded.items()}}
        return PassResult(program.with_facts(**facts), tuple(notes))

    def _wanted(
        self, groups: Sequence[ChannelGroup]
    ) -> list[tuple[ChannelGroup, Callable[[ChannelGroup], Array | None]]]:
        """The groups that get factors, and how to compute them by number."""
        if callable(self.factors):
            return [(group, self.factors) for group in groups]
        of_path = {path: group for group in groups for path in group.consumers}
        unknown = sorted(set(self.factors) - set(of_path))
        if unknown:
            raise ValueError(
                f"factors for {', '.join(unknown)}: no product contracts this weight; those that "
                f"do: {', '.join(sorted(of_path))}"
            )
        found: dict[str, tuple[str, ChannelGroup]] = {}
        for path in self.factors:
            first, _ = found.setdefault(of_path[path].name, (path, of_path[path]))
            if first != path:
                raise ValueError(
                    f"factors for {first!r} and for {path!r}, which share their input: give one"
                )
        return [(group, _of_channels(self.factors[path], path)) for path, group in found.values()]


def _note(group: ChannelGroup, explicit: bool) -> str:
    if explicit:
        return f"{group.name}: the input is divided by an explicit operation"
    fixed = int(np.count_nonzero(group.channels == 0))
    into = ", ".join(absorber.path for absorber in group.producers)
    rest = f"; {fixed} channels keep the factor 1" if fixed else ""
    return f"{group.name}: folded into {into}{rest}"


def _of_channels(values: Any, path: str) -> Callable[[ChannelGroup], Array]:
    """Factors by number from factors by channel; those that must be equal get their mean."""

    def of(group: ChannelGroup) -> Array:
        given = np.asarray(values, np.float64)
        try:
            given = np.broadcast_to(given, group.channels.shape)
        except ValueError as error:
            raise ValueError(
                f"factors for {path!r} have shape {given.shape}; its channels have "
                f"{group.channels.shape}"
            ) from error
        if not (np.isfinite(given).all() and (given > 0).all()):
            raise ValueError(f"factors for {path!r} must be positive and finite")
        numbers = np.abs(group.channels).ravel()
        logs = np.log(given).ravel() * np.sign(group.channels).ravel()
        total = np.bincount(numbers, logs, group.count + 1)
        return np.exp(total / np.maximum(np.bincount(numbers, minlength=group.count + 1), 1))[1:]

    return of


def group_factors(group: ChannelGroup, values: Array) -> dict[str, Array]:
    """What the parameters of a group are to be multiplied with.

    Args:
      group: the group.
      values: ``[group.count]``: factor number c is values[c - 1].

    Returns:
      Float64 arrays by path, that broadcast to the parameters.
    """
    table = _table(group, values)
    absorbers = (*group.producers, *group.weights)
    return {a.path: table[a.factors + group.count] ** float(a.power) for a in absorbers}


def _table(group: ChannelGroup, values: Array) -> Array:
    """Factors at index number + count, inverse ones where the number is negative."""
    values = np.asarray(values, np.float64)
    if values.shape != (group.count,):
        raise ValueError(f"{group.name} has {group.count} factors; got shape {values.shape}")
    return np.concatenate([1 / values[::-1], [1.0], values])


def fold_parameters(parameters: Mapping[str, Any], factors: ParameterFactors) -> dict[str, Any]:
    """The parameters after a fold.

    Args:
      parameters: arrays by path.
      factors: the fact "parameter_factors" of `FoldTransforms`.

    Returns:
      New arrays in the old dtypes, for the paths in ``factors``.
    """
    folded = {}
    for path, arrays in factors.items():
        value = jnp.asarray(parameters[path])
        wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        for array in arrays:
            wide = wide * jnp.asarray(array, wide.dtype)
        folded[path] = wide.astype(value.dtype)
    return folded


def check_same(before: Any, after: Any, *, tolerance: float, what: str) -> float:
    """Refuses a transform that changed what a function returns.

    Args:
      before: result of the function, any tree of arrays.
      after: result with the new parameters, of the same structure.
      tolerance: largest difference allowed, relative to the largest magnitude of each array.
      what: names the transform in the error.

    Returns:
      The largest relative difference found.

    Raises:
      FoldError: a difference is larger, or something is not finite; with the figures.
    """
    worst = 0.0
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    for number, (x, y) in enumerate(pairs):
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        size = max(float(np.max(np.abs(a), initial=0)), float(np.finfo(np.float32).tiny))
        difference = float(np.max(np.abs(a - b), initial=0))
        if not difference <= tolerance * size:
            raise FoldError(
                f"{what} changed the function: result {number} of shape {a.shape} differs by up to "
                f"{difference:.3g} where its largest magnitude is {size:.3g}; allowed is "
                f"{tolerance:.1g} of that"
            )
        worst = max(worst, difference / size)
    return worst
