"""The attributes by which decorated classes, functions and lifted methods are recognised."""

from __future__ import annotations

from typing import Any

from jaxquant.core.recipe import Recipe

RECIPE = "__jaxquant_recipe__"
LIFTED = "_jaxquant_lifted"


def recipe_of(obj: Any) -> Recipe | None:
    """The recipe of a decorated class, instance or function; None if it is not decorated."""
    cls = obj if isinstance(obj, type) else type(obj)
    for base in cls.__mro__:  # not getattr: a bound Linen module would run its setup
        if RECIPE in vars(base):
            return vars(base)[RECIPE]
    if not isinstance(obj, type) and callable(obj):
        return getattr(obj, "__dict__", {}).get(RECIPE)
    return None
