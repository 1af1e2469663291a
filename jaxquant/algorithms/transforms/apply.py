"""The transforms that a recipe names, carried out on the float model before it is quantized.

Called by `ptq`, which computes, and by `explain`, which has shapes only and computes nothing: both
go through the same decisions. Each input of quantized weights gets one `TransformRow` a transform:
folded into parameters, an operation that is stored with the weights, left as it is, or refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.algorithms.calibrate import Call
from jaxquant.algorithms.transforms.recipe_rotate import apply_rotate
from jaxquant.algorithms.transforms.recipe_smooth import apply_smooth
from jaxquant.algorithms.transforms.subject import Example, Subject
from jaxquant.algorithms.transforms.work import Work, is_abstract
from jaxquant.core.recipe import Recipe
from jaxquant.core.transforms import Smooth
from jaxquant.passes.assign_recipe import Assignment
from jaxquant.passes.plan import TransformRow


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
    if is_abstract(example) and calls:
        example = calls[0]
    return _transform(Work(fn, tree, paths, example, assignment, calls))


def explain_transforms(
    fn: Callable[..., Any],
    tree: Any,
    paths: Sequence[str | None],
    example: Example,
    assignment: Assignment,
) -> Transformed:
    """What `transform_model` would do, on shapes; what it would refuse is a row, not an error."""
    return _transform(Work(fn, tree, paths, example, assignment, None))


def _transform(work: Work) -> Transformed:
    for transform in work.recipe.transforms:
        what = work.name(transform)
        subject = Subject(work.fn, work.tree, work.paths, work.example, what)
        if isinstance(transform, Smooth):
            apply_smooth(work, transform, subject)
        else:
            apply_rotate(work, transform, subject)
    inputs: dict[str, dict[str, Any]] = {}
    for path, factor in work.factors.items():
        array = np.asarray(factor, np.float32)
        value: Any = jax.ShapeDtypeStruct(array.shape, array.dtype)
        inputs[path] = {"input_factor": jnp.asarray(array) if work.computes else value}
    for path, turn in work.turns.items():
        inputs.setdefault(path, {})["input_turn"] = turn
    return Transformed(work.fn, work.tree, inputs, work.alike, tuple(work.rows))


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
