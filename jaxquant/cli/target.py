"""What a command works on: the shipped model, or one that the user's factory makes."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

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

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `explain` and `ptq` take after the model: variables, if any, and the example."""
        return self.example if self.variables is None else (self.variables, *self.example)

    def quantizable(self, recipe: Recipe | None) -> Any:
        """The model under a recipe; under its own (or the default) where None is given."""
        return jq.quantize(recipe or recipe_of(self.model))(self.model)

    def restore(self, path: epath.Path) -> Any:
        """A checkpoint of quantized weights, in the form in which `ptq` returns them."""
        return jq.restore(path, model=self.model if self.variables is None else None)


def recipe_of(model: Any) -> Recipe:
    """The recipe that a model is decorated with; the default if it is not decorated."""
    from jaxquant.frontends import marks

    return marks.recipe_of(model) or get_recipe(None)


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


def load(
    model: str | None,
    checkpoint: str | None,
    batches: int | None = None,
    *,
    shapes_only: bool = False,
) -> Target:
    """The target that the command line names.

    Args:
      model: "module:factory", or None for the shipped model.
      checkpoint: a directory of float variables for it, or None.
      batches: use at most so many batches of every slice.
      shapes_only: whether shapes will do for the variables of a Linen model that has none.

    Raises:
      UsageError: the factory cannot be found, returns something else than the help says, or a
        checkpoint is given without a model.
    """
    if model is None:
        if checkpoint is not None:
            raise UsageError("--checkpoint holds the variables of a --model; give --model as well")
        return shipped(batches)
    entries = _call_factory(model)
    example = entries["example"]
    subject, variables = _filled(
        entries["model"], entries.get("variables"), checkpoint, example, shapes_only
    )
    data = entries.get("data") or {}
    return Target(
        name=model,
        model=subject,
        variables=variables,
        example=example,
        calibration=tuple(entries.get("calibration", ())),
        data={name: list(itertools.islice(group, batches)) for name, group in data.items()},
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


def recipes(texts: Iterable[str]) -> dict[str, Recipe]:
    """Recipe name to recipe, for several of the command line's.

    Raises:
      UsageError: as `recipe`, or where two have one name.
    """
    found: dict[str, Recipe] = {}
    for text in texts:
        chosen = recipe(text)
        assert chosen is not None
        if chosen.name in found:
            raise UsageError(f"recipe {chosen.name} is given twice")
        found[chosen.name] = chosen
    return found


def existing(directory: str) -> epath.Path:
    """The path of a directory that must exist; remote ones ("gs://...") too."""
    path = epath.Path(directory)
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {directory}: there is no such directory")
    return path


def _filled(
    model: Any,
    variables: Any,
    checkpoint: str | None,
    example: tuple[Any, ...],
    shapes_only: bool,
) -> tuple[Any, Any]:
    """The model with its float weights: as it is, from a checkpoint, or (Linen) as shapes."""
    from flax import linen, nnx

    if isinstance(model, nnx.Module):
        if checkpoint is not None:
            model = jq.restore(existing(checkpoint), model=model)
        return model, None
    if checkpoint is not None:
        return model, jq.restore(existing(checkpoint))
    if variables is None and shapes_only and isinstance(model, linen.Module):
        import jax

        return model, jax.eval_shape(model.init, jax.random.key(0), *example)
    if variables is None:
        raise UsageError("the factory's mapping has no variables: give them, or --checkpoint")
    return model, variables


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
    entries = {name: entry for name, entry in entries.items() if entry is not None}
    try:
        _check_kinds(entries)
    except TypeError as error:
        raise UsageError(f"--model {spec}: {error}") from error
    return entries


def _check_kinds(entries: Mapping[str, Any]) -> None:
    """Refuses what is of a wrong kind in a factory's mapping."""
    from jaxquant.frontends.batches import check_batches

    model, example, data = entries["model"], entries["example"], entries.get("data", {})
    if isinstance(model, type):
        raise TypeError(f"model is a class; give an instance, such as {model.__name__}(...)")
    if not isinstance(example, tuple):
        raise TypeError(f"example is a tuple of arguments, such as (x,); got {type(example)}")
    check_batches(entries.get("calibration", ()), "calibration")
    if not isinstance(data, Mapping):
        raise TypeError(f"data is a mapping from slice name to a list of batches; got {type(data)}")
    for name, batches in data.items():
        check_batches(batches, f"slice {name!r} of data")
