"""`describe(model)`: one view of a decorated model for everything that works on whole models.

explain, ptq, compare and the files need the same few things of a Linen module with its variables,
an NNX module that holds them, or a function: the tree of leaves, the names of its parameters, the
undecorated float computation, and the quantized call. Nothing above this floor asks which library
a model is written in.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as flax_linen
from flax import nnx as flax_nnx

from jaxquant.core.names import path_string
from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.recipe import Recipe
from jaxquant.frontends import linen, nnx
from jaxquant.frontends.marks import recipe_of
from jaxquant.frontends.scopes import linen_scopes, nnx_scopes

PureFn = Callable[..., Any]


class ModelAdapter(abc.ABC):
    """A decorated model, whichever library it is written in.

    Attributes:
      model: the user's object.
      recipe: the recipe it is decorated with.
      kind: "linen", "nnx" or "function".
    """

    kind: str

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe

    @property
    def name(self) -> str:
        """The class or function name, for reports."""
        return getattr(self.model, "__name__", type(self.model).__name__)

    @property
    def notes(self) -> list[str]:
        """What a report on the model should say about how it is called."""
        reason = self._uncached_reason()
        if reason is None:
            return []
        return [
            f"{self.name} cannot be hashed ({reason}), so every eager call with quantized weights "
            "traces the model again: call it inside jax.jit"
        ]

    def _uncached_reason(self) -> str | None:
        return None

    @abc.abstractmethod
    def pure(self, variables: Any = None) -> tuple[PureFn, Any]:
        """The undecorated float computation, and the tree of leaves it starts from.

        Args:
          variables: Linen: the variables, required. Function: the parameters, its first
            argument, required. NNX: None for the module's own state, or a state.

        Returns:
          ``fn(tree, *args, **kwargs) -> output`` with the module scopes open, and ``tree``.
          Leaves may be arrays or ShapeDtypeStruct; Linen's ``rngs=``, ``mutable=`` and
          ``method=`` go through as keyword arguments of ``fn``.
        """

    @abc.abstractmethod
    def with_tree(self, tree: Any) -> Any:
        """What a user gets back for a new tree: variables, parameters, or a new NNX module."""

    @abc.abstractmethod
    def apply(self, tree: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on a tree whose leaves may be QTensors."""

    @abc.abstractmethod
    def param_paths(self, tree: Any) -> list[str | None]:
        """The name of each leaf that is a parameter; None for other state.

        Returns:
          One entry per leaf, in the order of `jax.tree_util.tree_leaves(tree,
          is_leaf=is_qtensor)`.
        """


class LinenAdapter(ModelAdapter):
    """A Linen module; the tree is its variables, the parameters its "params" collection."""

    kind = "linen"

    def _uncached_reason(self) -> str | None:
        return linen.uncached_reason(self.model)

    def pure(self, variables: Any = None) -> tuple[PureFn, Any]:
        """See `ModelAdapter.pure`."""
        _require(variables, f"{self.name} is a Linen module: give its variables")
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"{self.name} is a Linen module: its variables, a mapping of collections, come "
                f"before its own arguments, not {type(variables).__name__}"
            )

        def fn(tree: Any, *args: Any, **kwargs: Any) -> Any:
            with linen_scopes():
                return self.model.apply(tree, *args, **kwargs)

        return fn, variables

    def with_tree(self, tree: Any) -> Any:
        """The variables."""
        return tree

    def apply(self, tree: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.apply`."""
        return self.model.apply(tree, *args, **kwargs)

    def param_paths(self, tree: Any) -> list[str | None]:
        """See `ModelAdapter.param_paths`."""
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
        return [
            path_string(path) if getattr(path[0], "key", None) == "params" else None
            for path, _ in flat
        ]


class NnxAdapter(ModelAdapter):
    """An NNX module; the tree is its state, the parameters are its `nnx.Param` variables."""

    kind = "nnx"

    def _uncached_reason(self) -> str | None:
        return nnx.uncached_reason(self.model)

    def pure(self, variables: Any = None) -> tuple[PureFn, Any]:
        """See `ModelAdapter.pure`; updates of the state are dropped."""
        graphdef, state = flax_nnx.split(self.model)

        def fn(tree: Any, *args: Any, **kwargs: Any) -> Any:
            copy = flax_nnx.merge(graphdef, tree, copy=True)
            with nnx_scopes(copy):
                return copy(*args, **kwargs)

        if variables is None:
            variables = jax.tree_util.tree_map(lambda x: x, state)  # not the live variables
        return fn, variables

    def with_tree(self, tree: Any) -> Any:
        """A new module of the same structure that holds the tree."""
        return flax_nnx.merge(flax_nnx.graphdef(self.model), tree, copy=True)

    def apply(self, tree: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a module that holds the tree; updates of its state are dropped."""
        return self.with_tree(tree)(*args, **kwargs)

    def param_paths(self, tree: Any) -> list[str | None]:
        """See `ModelAdapter.param_paths`."""
        paths: list[str | None] = []
        flat, _ = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: isinstance(x, flax_nnx.Variable)
        )
        for path, variable in flat:
            inner, _ = jax.tree_util.tree_flatten_with_path(variable, is_leaf=is_qtensor)
            is_param = isinstance(variable, flax_nnx.Param)
            paths += [path_string((*path, *sub)) if is_param else None for sub, _ in inner]
        return paths


class FunctionAdapter(ModelAdapter):
    """A function; the tree is its first argument, all of whose leaves are parameters."""

    kind = "function"

    def pure(self, variables: Any = None) -> tuple[PureFn, Any]:
        """See `ModelAdapter.pure`."""
        _require(variables, f"{self.name} is a function: give its parameters (first argument)")
        original = self.model.__wrapped__

        def fn(tree: Any, *args: Any, **kwargs: Any) -> Any:
            with linen_scopes():
                return original(tree, *args, **kwargs)

        return fn, variables

    def with_tree(self, tree: Any) -> Any:
        """The parameters."""
        return tree

    def apply(self, tree: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.model(tree, *args, **kwargs)

    def param_paths(self, tree: Any) -> list[str | None]:
        """See `ModelAdapter.param_paths`."""
        flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
        return [path_string(path) for path, _ in flat]


def describe(model: Any) -> ModelAdapter:
    """The adapter of a decorated model.

    Args:
      model: a decorated Linen or NNX instance, or a decorated function.

    Raises:
      TypeError: it is a class, or not decorated; the message says what to do.
    """
    if isinstance(model, type):
        raise TypeError(
            f"{model.__name__} is a class: give an instance, such as {model.__name__}(...)"
        )
    recipe = recipe_of(model)
    if recipe is None:
        raise TypeError(_undecorated(model))
    if isinstance(model, flax_linen.Module):
        return LinenAdapter(model, recipe)
    if isinstance(model, flax_nnx.Module):
        return NnxAdapter(model, recipe)
    return FunctionAdapter(model, recipe)


def _undecorated(model: Any) -> str:
    if isinstance(model, flax_linen.Module | flax_nnx.Module):
        name = type(model).__name__
        return (
            f"this {name} is not decorated: put @jaxquant.quantize(recipe) on its class, or use "
            "jaxquant.quantize(recipe)(model)"
        )
    if callable(model):
        name = getattr(model, "__name__", repr(model))
        return f"{name} is not decorated: use jaxquant.quantize(recipe)({name})"
    return f"expected a decorated Flax module or function, got {type(model).__name__}: {model!r}"


def _require(variables: Any, message: str) -> None:
    if variables is None:
        raise TypeError(message)
