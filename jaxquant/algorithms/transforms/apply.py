"""The transforms that a recipe names, carried out on the float model before it is quantized.

Called by `ptq`, which computes, and by `explain`, which has shapes only and computes nothing: both
go through the same decisions. Each input of quantized weights gets one `TransformRow` a transform:
folded into parameters, an operation that is stored with the weights, left as it is, or refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.algorithms.calibrate import Call
from jaxquant.algorithms.transforms.smooth import channel_statistics, smooth_factors
from jaxquant.algorithms.transforms.subject import Example, Folded, Subject, with_pass
from jaxquant.core.recipe import Recipe
from jaxquant.core.transforms import Rotate, Smooth, Transform
from jaxquant.core.turns import InputTurn
from jaxquant.passes.assign_recipe import Assignment
from jaxquant.passes.channel_flow import ChannelGroup, find_channel_groups, unseen_weights
from jaxquant.passes.find_turns import FoundTurn
from jaxquant.passes.fold_transforms import (
    FACT,
    FoldError,
    FoldTransforms,
    fold_parameters,
    group_factors,
)
from jaxquant.passes.pass_manager import Pass
from jaxquant.passes.plan import TransformRow
from jaxquant.passes.program import Program
from jaxquant.passes.rotate import FACT as ROTATIONS
from jaxquant.passes.rotate import Rotate as RotatePass
from jaxquant.passes.rotate import rotate_parameters


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A float model after a recipe's transforms.

    Attributes:
      fn: the function, with explicit operations where there are some: for calibration. The
        quantized model runs the function as it was, since the weights say what is explicit.
      tree: its parameters.
      inputs: by path of a weight the fields of its `QTensor` that say what is done to its input.
      inputs_alike: for each of these a key that is equal where the input factors are.
      rows: what was done.
    """

    fn: Callable[..., Any]
    tree: Any
    inputs: Mapping[str, Mapping[str, Any]]
    inputs_alike: Mapping[str, Any]
    rows: tuple[TransformRow, ...]


def transform_model(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    example: Example,
    assignment: Assignment,
    calls: Iterable[Call],
) -> Transformed:
    """Carries out the transforms of a recipe.

    Args:
      fn: the float function ``fn(tree, *args, **kwargs)``.
      tree: its parameters; where some are `jax.ShapeDtypeStruct`s nothing is computed.
      paths: for each leaf of ``tree`` its parameter path, or None.
      example: positional and keyword arguments, on which the function is compared.
      assignment: what the recipe makes of the program of this example.
      calls: calibration batches; not touched where the recipe has no transforms.

    Raises:
      ValueError: there is no batch, and the recipe smooths.
      FoldError: something is refused, or a transform changed the function.
    """
    if not assignment.recipe.transforms:
        return Transformed(fn, tree, {}, {}, ())
    calls = list(calls)
    if _abstract(example) and calls:
        example = calls[0]
    return _transform(_Work(fn, tree, paths, example, assignment, calls))


def explain_transforms(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    example: Example,
    assignment: Assignment,
) -> Transformed:
    """What `transform_model` would do, on shapes; what it would refuse is a row, not an error."""
    return _transform(_Work(fn, tree, paths, example, assignment, None))


def _transform(work: _Work) -> Transformed:
    for transform in work.recipe.transforms:
        work.apply(transform)
    return work.done()


def _abstract(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree_util.tree_leaves(tree))


def refuse_transforms(recipe: Recipe, what: str) -> None:
    """Refuses a recipe with transforms where they cannot be carried out.

    Raises:
      ValueError: says what to do instead.
    """
    if recipe.transforms:
        kinds = ", ".join(transform.kind for transform in recipe.transforms)
        raise ValueError(
            f"{what} takes the weights as they are, and recipe {recipe.name!r} has transforms "
            f"({kinds}): transform the model first (jaxquant.smooth, jaxquant.rotate) and give "
            "recipe.with_transforms(), which has none"
        )


class _Work:
    """The model between two transforms."""

    def __init__(
        self,
        fn: Callable[..., Any],
        tree: Any,
        paths: Sequence[str | None],
        example: Example,
        assignment: Assignment,
        calls: Sequence[Call] | None,
    ) -> None:
        self._fn, self._tree, self._paths, self._example = fn, tree, paths, example
        self._computes = calls is not None and not _abstract(tree)
        if self._computes and _abstract(example):
            raise ValueError(
                f"recipe {assignment.recipe.name!r} has transforms, which are checked on data: "
                "give an example of arrays, or calibration="
            )
        self._explains = calls is None
        self._calls = calls or ()
        self.recipe = assignment.recipe
        self._shapes = {path: plan.shape for path, plan in assignment.params.items()}
        self._quantized = {plan.path for plan in assignment.quantized}
        self._kept = {
            use.param
            for use, rule in zip(assignment.uses, assignment.rules, strict=True)
            if rule is not None and not rule.transforms and use.param is not None
        }
        self._read = {use.site: use.param for use in assignment.uses if use.is_product}
        self._factors: dict[str, Any] = {}
        self._alike: dict[str, Any] = {}
        self._turns: dict[str, InputTurn] = {}
        self._rows: list[TransformRow] = []

    def done(self) -> Transformed:
        inputs: dict[str, dict[str, Any]] = {}
        for path, factor in self._factors.items():
            array = np.asarray(factor, np.float32)
            value: Any = jax.ShapeDtypeStruct(array.shape, array.dtype)
            inputs[path] = {"input_factor": jnp.asarray(array) if self._computes else value}
        for path, turn in self._turns.items():
            inputs.setdefault(path, {})["input_turn"] = turn
        return Transformed(self._fn, self._tree, inputs, self._alike, tuple(self._rows))

    def apply(self, transform: Transform) -> None:
        subject = Subject(self._fn, self._tree, self._paths, self._example, self._name(transform))
        if isinstance(transform, Smooth):
            self._smooth(transform, subject)
        else:
            self._rotate(transform, subject)

    def _name(self, transform: Transform) -> str:
        return f"{transform.kind} of recipe {self.recipe.name!r}"

    def _take(self, subject: Subject, step: Pass, program: Program, fold: Folded) -> None:
        """Goes on with the model after a step."""
        if self._computes:
            self._tree = subject.after(program, fold)
        if program.jaxpr is not subject.program.jaxpr:
            self._fn = with_pass(self._fn, self._paths, step, getattr(self._fn, "__name__", "fn"))

    def _settle(self, transform: Transform, rows: Iterable[TransformRow]) -> None:
        """Keeps the rows; what is refused is an error, unless it is only to be said."""
        rows = list(rows)
        self._rows += rows
        refused = [row for row in rows if row.status == "refused"]
        if refused and not self._explains:
            lines = [f"  {', '.join(row.weights)}: {row.reason}" for row in refused]
            raise FoldError(
                f"{self._name(transform)}: these inputs cannot be folded into parameters "
                "(unfoldable='leave' leaves them, 'multiply' makes explicit operations; a rule "
                "with transforms=False leaves one out):\n" + "\n".join(lines)
            )

    # --- factors ------------------------------------------------------------------------------

    def _smooth(self, transform: Smooth, subject: Subject) -> None:
        groups = find_channel_groups(subject.program)
        rows = [self._smoothed(transform, group) for group in groups]
        told = {path for group in groups for path in group.consumers}
        self._settle(transform, [*rows, *self._unseen(transform, subject, told)])
        chosen: dict[tuple[str, ...], ChannelGroup] = {}
        explicit: list[ChannelGroup] = []
        for row, group in zip(rows, groups, strict=True):
            if row.status == "multiply":
                assert group.explicit is not None
                explicit.append(group.explicit)
                chosen[group.explicit.consumers] = group.explicit
            elif row.status == "folded":
                chosen[group.consumers] = group
        values = self._values(transform, subject, chosen)

        def factors(group: ChannelGroup) -> Any:
            return values.get(group.consumers)

        step = FoldTransforms(factors, "multiply" if explicit else "leave")
        program = step.run(subject.program).program
        for group in explicit:
            for path, array in group_factors(group, values[group.consumers]).items():
                self._multiply(path, 1 / array, group.consumers)
        fold = functools.partial(fold_parameters, factors=program.facts[FACT])
        self._take(subject, step, program, fold)

    def _unseen(
        self, transform: Smooth, subject: Subject, told: set[str]
    ) -> Iterator[TransformRow]:
        """Weights that are in no group."""
        unseen = unseen_weights(subject.program)
        refuses = transform.unfoldable == "refuse"
        for path in dict.fromkeys(self._read.values()):
            if path is not None and path not in told:
                why = self._not_wanted((path,))
                other = unseen.get(path, "no product sums over channels of its input")
                row = functools.partial(TransformRow, "smooth", (path,), reason=why or other)
                yield row("refused") if refuses and not why else row("left")

    def _smoothed(self, transform: Smooth, group: ChannelGroup) -> TransformRow:
        """What becomes of a group."""
        row = functools.partial(TransformRow, "smooth", group.consumers)
        why = self._not_wanted(group.consumers)
        if why:
            return row("left", reason=why)
        obstacles = "; ".join(group.obstacles)
        if group.foldable:
            into = tuple(absorber.path for absorber in group.producers)
            kept = int(np.count_nonzero(group.channels == 0))
            reason = f"{kept} of {group.channels.size} channels stay: {obstacles}" if kept else ""
            return row("folded", into, reason)
        if transform.unfoldable != "multiply":
            refuses = transform.unfoldable == "refuse"
            return row("refused" if refuses else "left", reason=obstacles)
        explicit = group.explicit
        why = "the weight cannot take factors alone" if explicit is None else self._not_storable(
            [weight.path for weight in explicit.weights]
        )  # fmt: skip
        if why:
            return row("left", reason=f"{why}; {obstacles}")
        return row("multiply", reason=obstacles)

    def _values(
        self,
        transform: Smooth,
        subject: Subject,
        chosen: Mapping[tuple[str, ...], ChannelGroup],
    ) -> dict[tuple[str, ...], Any]:
        """Factors by number, of each group; ones where nothing is computed."""
        if not self._computes:
            return {consumers: np.ones(group.count) for consumers, group in chosen.items()}
        if not self._calls:
            raise ValueError(
                f"{self._name(transform)} needs statistics of activations: give batches of data as "
                "calibration="
            )
        found = channel_statistics(subject, self._calls, list(chosen.values()))
        return {
            consumers: smooth_factors(group, subject.parameters, found, transform.alpha)
            for consumers, group in chosen.items()
        }

    def _multiply(self, path: str, factor: Any, key: Any) -> None:
        before = self._factors.get(path)
        self._factors[path] = factor if before is None else before * factor
        self._alike[path] = (*self._alike.get(path, ()), key)

    # --- rotations ------------------------------------------------------------------------------

    def _rotate(self, transform: Rotate, subject: Subject) -> None:
        inputs = self._quantized - self._kept - set(self._turns)
        multiplies = transform.unfoldable == "multiply"
        step = RotatePass(
            stream=transform.stream,
            heads=transform.heads,
            inputs=frozenset(inputs if multiplies else ()),
            fixed=frozenset(self._kept | set(self._turns)),
            seed=transform.seed,
        )
        result = step.run(subject.program)
        turned = result.program.facts[ROTATIONS]
        rows, read = [], set()
        for found, rotation in turned:
            weights = tuple(dict.fromkeys(filter(None, map(self._read.get, sorted(found.readers)))))
            if found.role == "input":
                weights = tuple(path for path, _, _ in found.absorbed)
                self._turn(found, rotation.signs)
            read |= set(weights)
            rows.append(_rotated(found, weights))
        notes = [note for note in result.notes if "not rotated" in note or "be rotated" in note]
        notes += [f"{path}: {why}" for path, why in unseen_weights(subject.program).items()]
        for path in [p for p in dict.fromkeys(self._read.values()) if p and p not in read]:
            rows.append(self._unturned(transform, path, notes))
        self._settle(transform, rows)
        fold = functools.partial(rotate_parameters, turned=turned)
        self._take(subject, step, result.program, fold)

    def _turn(self, found: FoundTurn, signs: Any) -> None:
        """Notes how the input of the weights of a rotation is turned."""
        for path, spot, _ in found.absorbed:
            shape = self._shapes[path]
            own = [1] * len(shape)
            own[spot.dim] = shape[spot.dim]
            index = np.arange(shape[spot.dim]) // spot.inner % spot.size
            self._multiply(path, signs[index].reshape(own), (found.size, signs.tobytes()))
            self._turns[path] = InputTurn(spot.dim - len(shape), spot.size, spot.inner)

    def _unturned(self, transform: Rotate, path: str, notes: Sequence[str]) -> TransformRow:
        row = functools.partial(TransformRow, "rotate", (path,))
        why = self._not_wanted((path,))
        if why:
            return row("left", reason=why)
        own = [note.partition(": ")[2] for note in notes if note.startswith(f"{path}: ")]
        general = [note for note in notes if note.startswith("no residual stream")]
        reason = "; ".join(own or general) or "it reads no stream and no heads that can be rotated"
        return row("refused" if transform.unfoldable == "refuse" else "left", reason=reason)

    # --- what the rules say ---------------------------------------------------------------------

    def _not_wanted(self, paths: Sequence[str]) -> str:
        """Why the rules want an input left as it is, or ""."""
        kept = [path for path in paths if path in self._kept]
        if kept:
            return f"a rule with transforms=False names {kept[0]}"
        return "" if self._quantized & set(paths) else "no rule quantizes what reads it"

    def _not_storable(self, paths: Sequence[str]) -> str:
        """Why weights cannot keep what is done to their input, or ""."""
        floats = [path for path in paths if path not in self._quantized]
        if floats:
            return f"{floats[0]} stays float, and only a quantized weight keeps factors"
        turned = [path for path in paths if path in self._turns]
        return f"the input of {turned[0]} is rotated explicitly already" if turned else ""


def _rotated(found: FoundTurn, weights: tuple[str, ...]) -> TransformRow:
    what = {"stream": "the residual stream", "heads": "the value heads", "input": "the input"}
    reason = f"{what[found.role]} of {found.size} channels"
    if found.role == "input":
        reason = f"a Hadamard matrix of {found.size} rows; parameters alone cannot turn it"
        return TransformRow("rotate", weights, "multiply", reason=reason)
    into = tuple(path for path, _, _ in found.absorbed if path not in weights)
    gains = tuple(path for path, _ in found.gains)
    return TransformRow("rotate", weights, "folded", (*into, *gains), reason)
