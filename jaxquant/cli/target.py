"""What a command works on: the shipped model, or one that the user's factory makes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jaxquant as jq
from jaxquant.cli.errors import UsageError
from jaxquant.core.recipe import Recipe, get_recipe

_BATCH = (8, 256)  # rows and tokens of the shipped model's batches
_ENTRIES = ("model", "example", "variables", "calibration", "data", "metrics")


@dataclasses.dataclass(frozen=True)
class Target:
    """A model with what is needed to trace, calibrate and measure it.

    Attributes:
      name: for titles.
      model: a Flax module (Linen or NNX), or a function.
      variables: Linen variables, a function's parameters, or None for NNX.
      example: positional arguments to trace the model with.
      calibration: batches for static activation ranges; may be empty.
      data: slice name to held-out batches; may be empty.
      metrics: name to metric function; may be empty.
    """

    name: str
    model: Any
    variables: Any
    example: tuple[Any, ...]
    calibration: tuple[Any, ...] = ()
    data: Mapping[str, Iterable[Any]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def quantizable(self, recipe: Recipe | None) -> Any:
        """The model under a recipe; under its own (or the default) where None is given."""
        from jaxquant.frontends import describe

        if recipe is None:
            adapter = describe(self.model)
            recipe = adapter.recipe or get_recipe(None)
        return jq.quantize(recipe)(self.model)


def shipped(batches: int | None = None) -> Target:
    """The trained model of the package; the last batch of every slice is kept for calibration."""
    from jaxquant.models import shipped as source

    model, variables = source.load()
    slices = source.held_out(*_BATCH)
    return Target(
        name="the shipped model",
        model=model,
        variables=variables,
        example=(next(iter(slices.values()))[0],),
        calibration=tuple(group[-1] for group in slices.values()),
        data={name: group[: len(group) - 1][:batches] for name, group in slices.items()},
    )


def load(model: str | None, checkpoint: str | None, batches: int | None = None) -> Target:
    """The target that the command line names.

    Args:
      model: "module:factory", or None for the shipped model.
      checkpoint: a directory of float variables for it, or None.
      batches: use at most so many batches of every slice.

    Raises:
      UsageError: the factory cannot be found, returns something else than the help says, or a
        checkpoint is given without a model.
    """
    if model is None:
        if checkpoint is not None:
            raise UsageError("--checkpoint holds the variables of a --model; give --model as well")
        return shipped(batches)
    entries = _call_factory(model)
    variables = entries.get("variables")
    if checkpoint is not None:
        variables = jq.restore(existing(checkpoint))
    data = entries.get("data") or {}
    return Target(
        name=model,
        model=entries["model"],
        variables=variables,
        example=tuple(entries["example"]),
        calibration=tuple(entries.get("calibration") or ()),
        data={name: list(group)[:batches] for name, group in data.items()},
        metrics=entries.get("metrics") or {},
    )


def recipe(text: str | None) -> Recipe | None:
    """A preset by name, or a recipe from a JSON file; None stays None.

    Raises:
      UsageError: no such preset or file, or a file that does not hold a recipe.
    """
    if text is None:
        return None
    try:
        if text.endswith(".json"):
            return Recipe.from_json(Path(text).read_text(encoding="utf-8"))
        return get_recipe(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(str(error)) from error


def existing(directory: str) -> Path:
    """The path of a directory that must exist."""
    path = Path(directory)
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {directory}: there is no such directory")
    return path


def _call_factory(spec: str) -> Mapping[str, Any]:
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise UsageError(f"--model is module:factory, such as my_project.model:make; got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"--model {spec}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"--model {spec}: module {module_name} has no function {name}")
    entries = factory()
    if not isinstance(entries, Mapping):
        raise UsageError(
            f"--model {spec}: the factory returned a {type(entries).__name__}; it returns a "
            f"mapping with the entries {', '.join(_ENTRIES)} (see --help)"
        )
    missing = [key for key in ("model", "example") if key not in entries]
    unknown = sorted(set(entries) - set(_ENTRIES))
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise UsageError(f"--model {spec}: the factory's mapping {problem}")
    return entries
