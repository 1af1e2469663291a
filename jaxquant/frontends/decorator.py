"""`quantize`, the decorator: one name for Linen and NNX classes and instances, and functions.

It only chooses the frontend and checks the recipe's name. The recipe is what `explain` and
`ptq` read; what runs is decided by the leaves (see `jaxquant.frontends.function`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

import jax
from flax import linen as flax_linen
from flax import nnx as flax_nnx

from jaxquant.core.recipe import Recipe, get_recipe
from jaxquant.frontends import linen, nnx
from jaxquant.frontends.function import transform
from jaxquant.frontends.marks import RECIPE
from jaxquant.frontends.scopes import linen_scopes

T = TypeVar("T")


@overload
def quantize(target: str | Recipe | None = None) -> Callable[[T], T]: ...
@overload
def quantize(target: T) -> T: ...
def quantize(target: Any = None) -> Any:
    """Makes a model accept `QTensor` parameters: ``@quantize("w4a16_g128")`` or ``@quantize``.

    Works on Linen and NNX module classes and instances (also as submodules of undecorated
    models) and on functions, whose parameters are their first argument. Where no leaf is a
    QTensor, the decorated object does exactly what the undecorated one does.

    Called eagerly, a decorated model is compiled once per kind of call. A decorated child of an
    undecorated model, and a Linen module that was bound by hand, is traced at every eager call:
    call those inside `jax.jit`.

    The submodules of a decorated model are not decorated themselves. One that is called from
    outside (``model.bind(variables).encoder(x)``, or ``model.encoder(x)`` in NNX) meets the
    QTensors: call it in a method (``model.apply(variables, x, method=...)``), or decorate it too.

    Args:
      target: a preset's name, a `Recipe`, or None for "w8a8": returns the decorator. Or the class,
        instance or function itself, decorated with "w8a8". An instance is not changed: an
        unbound Linen module is copied, an NNX module gets a twin that shares its variables.

    Returns:
      The decorated object, or the decorator.

    Raises:
      ValueError: the preset's name is unknown (the known ones are listed), or a Linen instance is
        bound already.
      TypeError: the object is none of the above, or a callable that holds its parameters itself
        (an Equinox module, a Hugging Face model): the message says what to decorate.
    """
    if target is None or isinstance(target, str | Recipe):
        recipe = get_recipe(target)
        return lambda obj: _decorate(obj, recipe)
    return _decorate(target, get_recipe(None))


def _decorate(obj: Any, recipe: Recipe) -> Any:
    if isinstance(obj, flax_linen.Module):
        return linen.decorate_instance(obj, recipe)
    if isinstance(obj, flax_nnx.Module):
        return nnx.decorate_instance(obj, recipe)
    if isinstance(obj, type) and issubclass(obj, flax_linen.Module):
        return linen.decorate_class(obj, recipe)
    if isinstance(obj, type) and issubclass(obj, flax_nnx.Module):
        return nnx.decorate_class(obj, recipe)
    if isinstance(obj, functools.partial) and isinstance(obj.func, type):
        return functools.partial(_decorate(obj.func, recipe), *obj.args, **obj.keywords)
    if callable(obj) and not isinstance(obj, type):
        _refuse_model(obj)
        return _decorate_function(obj, recipe)
    raise TypeError(
        f"quantize takes a flax.linen or flax.nnx module (class or instance) or a function, not "
        f"{obj!r}"
    )


def _refuse_model(obj: Any) -> None:
    """Refuses callables that hold their parameters: none of their arguments does."""
    name = type(obj).__name__
    if isinstance(getattr(obj, "module", None), flax_linen.Module):
        raise TypeError(
            f"this {name} holds a Linen module and its parameters; decorate a function of the "
            "parameters, quantize(...)(lambda params, *args: model(*args, params=params)), or the "
            "module, quantize(...)(model.module)"
        )
    leaves = jax.tree_util.tree_leaves(obj)
    if not isinstance(obj, functools.partial) and any(isinstance(x, jax.Array) for x in leaves):
        raise TypeError(
            f"this {name} holds its parameters itself; decorate a function that takes it, "
            "quantize(...)(lambda model, *args: model(*args)), and give it the model as its first "
            "argument"
        )


def _decorate_function(fn: Callable[..., Any], recipe: Recipe) -> Callable[..., Any]:
    @functools.wraps(fn)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with linen_scopes():
            return fn(*args, **kwargs)

    wrapped = functools.wraps(fn)(transform(scoped))
    setattr(wrapped, RECIPE, recipe)
    return wrapped
