"""Who is compared: the float model and every recipe, each as something that runs.

For: :mod:`jaxquant.evaluate.compare`. The only file here that knows about models; it asks
:func:`jaxquant.frontends.describe` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxquant.evaluate.runner import Runner
from jaxquant.evaluate.trees import is_quantized
from jaxquant.frontends import ModelAdapter, describe, quantize
from jaxquant.frontends.marks import recipe_of

FLOAT = "float"


def float_and_recipes(
    model: Any, variables: Any, qvars: Any, names: str | Sequence[str] | None
) -> tuple[Runner, list[Runner]]:
    """Sorts out the arguments of :func:`jaxquant.compare`.

    Args:
      model: Linen module, NNX module or function.
      variables: float variables or parameters; None where ``model`` holds them itself (NNX).
      qvars: one quantized tree or model, a mapping of name to them, or a sequence of them.
      names: the name of one, or the names of a sequence.

    Returns:
      The float runner and one per recipe.

    Raises:
      TypeError: where the float tree is quantized, or ``qvars`` is neither like it nor made of such
        trees.
      ValueError: where names are missing, repeated or taken.
    """
    adapter = _adapter(model)
    fn, tree = adapter.pure(variables)
    _check_float(tree)
    recipes = []
    decorated = recipe_of(model)
    default = "quantized" if decorated is None else decorated.name
    for name, one in _named(variables, qvars, names, default).items():
        if variables is None:
            other = _adapter(one)
            recipes.append(Runner(name, other.apply, other.pure(None)[1]))
        else:
            recipes.append(Runner(name, adapter.apply, adapter.pure(one)[1]))
    return Runner(FLOAT, fn, tree), recipes


def _check_float(tree: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    found = [jax.tree_util.keystr(path) for path, leaf in leaves if is_quantized(leaf)]
    if found:
        raise TypeError(
            f"the float model, which all are compared with, holds {len(found)} quantized weights "
            f"({found[0]} first): give float parameters there, and quantized ones as qvars"
        )


def _adapter(model: Any) -> ModelAdapter:
    """The model's adapter. An undecorated model is decorated: its leaves say what runs."""
    return describe(quantize()(model) if recipe_of(model) is None else model)


def _named(
    variables: Any, qvars: Any, names: str | Sequence[str] | None, default: str
) -> dict[str, Any]:
    if _is_one(variables, qvars):
        if names is not None and not isinstance(names, str):
            raise ValueError(f"one quantized tree has one name; got names={list(names)}")
        found = {names or default: qvars}
    elif isinstance(qvars, Mapping):
        if names is not None:
            raise ValueError("a mapping of recipes names them itself: drop names=")
        found = dict(qvars)
    elif isinstance(qvars, list | tuple):
        given = [names] if isinstance(names, str) else list(names or ())
        if len(given) != len(qvars) or len(set(given)) != len(given):
            raise ValueError(
                f"{len(qvars)} quantized trees need as many different names; got {given}"
            )
        found = dict(zip(given, qvars, strict=True))
    else:
        raise TypeError(_unlike(variables, qvars, "qvars"))
    if not found:
        raise ValueError("compare got no quantized tree")
    for name, one in found.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"recipe names are non-empty strings; got {name!r}")
        if name == FLOAT:
            raise ValueError(f"the name {FLOAT!r} is the float model's own")
        if not _is_one(variables, one):
            raise TypeError(_unlike(variables, one, f"recipe {name!r}"))
    return found


def _is_one(variables: Any, tree: Any) -> bool:
    """Whether ``tree`` is one candidate: a model, or a tree keyed as the float one."""
    if variables is None:
        return not isinstance(tree, Mapping | list | tuple)
    if _structure(tree) == _structure(variables):
        return True
    if isinstance(variables, Mapping):
        return isinstance(tree, Mapping) and set(tree) == set(variables)
    return type(tree) is type(variables) and not isinstance(tree, list | tuple)


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=is_quantized)


def _unlike(variables: Any, tree: Any, what: str) -> str:
    if variables is None:
        return (
            f"{what} is a {type(tree).__name__}; without variables it is a quantized model (or a "
            "mapping "
            "of recipe name to quantized models)"
        )
    have = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
    want = (
        sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
    )
    return (
        f"{what} is neither a quantized tree like the float one nor a mapping of recipe names to "
        "such "
        f"trees: the float tree has {want} at its top, this has {have}"
    )
