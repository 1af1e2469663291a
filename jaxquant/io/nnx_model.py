"""Values of a checkpoint put into an NNX model: every path, variable type and shape must agree.

Called by `restore(model=)`, once with descriptions of the arrays, before any is read, and once with
the arrays. The caller's model is split, never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxquant.core.names import path_string
from jaxquant.io.manifest import CheckpointError


def model_classes(model: Any) -> tuple[type, ...]:
    """The variable types of a model, which its checkpoint may name."""
    if model is None:
        return ()
    return tuple({type(leaf) for _, leaf in _flat(_split(model)[1])})


def put_into_model(model: Any, tree: Any, where: str) -> Any:
    """A new model with the structure of `model` and the values of `tree`; see `match_model`."""
    merged = [
        (path, own.replace(value) if isinstance(own, nnx.Variable) else value)
        for path, own, value in match_model(model, tree, where)
    ]
    return nnx.merge(_split(model)[0], nnx.from_flat_state(merged))


def match_model(model: Any, tree: Any, where: str) -> list[tuple[tuple[Any, ...], Any, Any]]:
    """For every path the model's own variable and the value that the tree has for it.

    Args:
      model: an `nnx.Module`, concrete or abstract.
      tree: an `nnx.State`, or nested mappings of the same paths without variables. Its arrays may
        be anything with a shape.
      where: name of the checkpoint, for messages.

    Raises:
      TypeError: `model` is no NNX module.
      CheckpointError: paths, variable types or shapes differ; names them.
    """
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"{where} holds a {type(tree).__name__}, not the state of an NNX model; restore it"
            " without model="
        )
    given = dict(_flat(tree))
    wanted = dict(_flat(_split(model)[1]))
    missing = [path_string(path) for path in wanted if path not in given]
    surplus = [path_string(path) for path in given if path not in wanted]
    if missing or surplus:
        raise CheckpointError(
            f"{where} is of another model: it lacks {_list(missing)} and has {_list(surplus)}"
            " beside"
        )
    return [(path, own, _value(own, given[path], path, where)) for path, own in wanted.items()]


def _split(model: Any) -> Any:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module (or nnx.eval_shape of one), not {type(model).__name__};"
            " the variables of a Linen model are restored without it"
        )
    return nnx.split(model)


def _flat(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Paths and variables (or bare values) of nested mappings."""
    if not isinstance(tree, Mapping):
        return [((), tree)]
    mapping = tree.raw_mapping if isinstance(tree, nnx.State) else tree
    return [((key, *path), leaf) for key, value in mapping.items() for path, leaf in _flat(value)]


def _value(own: Any, given: Any, path: tuple[Any, ...], where: str) -> Any:
    """The value that the checkpoint has for the model's own variable."""
    name = path_string(path)
    if isinstance(given, nnx.Variable):
        if type(own) is not type(given):
            raise CheckpointError(
                f"{where}: {name!r} is a {type(given).__name__}; in the model it is a"
                f" {type(own).__name__}"
            )
        given = given.get_value()
    current = own.get_value() if isinstance(own, nnx.Variable) else own
    shapes = [getattr(value, "shape", None) for value in (given, current)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{where}: {name!r} has the shape {shapes[0]}; in the model it is {shapes[1]}"
        )
    return given


def _list(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) + (" ..." if len(names) > 5 else "")
    return shown or "nothing"
