"""Interceptors: while a Flax model is traced, every module call opens a named scope.

The scope carries the module's path and class into the jaxpr (`jaxquant.core.names`), for weightless
operations too. Interceptors compute nothing, and never see a QTensor. Linen: one method
interceptor. NNX: each module of a merged copy gets a subclass, so that loops, `nnx.remat`,
`nnx.jit` and `nnx.scan` inside the model keep it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core import freeze

from jaxquant.core import names

# Linen -------------------------------------------------------------------------------------------

_FLAG = "jaxquant_scopes"


@contextlib.contextmanager
def linen_scopes() -> Iterator[None]:
    """While open, every method call of a bound Linen module opens its named scope."""
    with nn.intercept_methods(_linen_interceptor):
        yield


def _linen_interceptor(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    if module.scope is None:
        return next_fun(*args, **kwargs)
    if not module.scope.has_flag(_FLAG):
        # nn.jit keys its cache on the flags: a trace without scopes is not reused for this one.
        module.scope.flags = freeze({**module.scope.flags, _FLAG: True})
    if context.method_name == "setup":
        return next_fun(*args, **kwargs)
    with names.module_scope(module.path, type(module)):
        return next_fun(*args, **kwargs)


# NNX ---------------------------------------------------------------------------------------------

SCOPED = "_jaxquant_scoped"  # class attribute of a scoping subclass: the class it stands for
# A static instance attribute: it survives split and merge inside transforms. The prefix is Flax's
# for attributes that are no part of the model: nnx.bridge.ToNNX takes all others for variables.
_PATH = "_pytree__jaxquant_path"


@contextlib.contextmanager
def nnx_scopes(root: nnx.Module, *others: Any) -> Iterator[None]:
    """While open, every public method call of a module below `root` opens its named scope.

    Args:
      root: a module that nobody else holds (a merged copy): its modules change class for a while.
      *others: graph nodes in which modules of `root` may turn up as well.
    """
    for path, module in list(nnx.iter_modules(root)):
        if not isinstance(module, nnx.List | nnx.Dict):
            vars(module)[_PATH] = "/".join(map(str, path))
            object.__setattr__(module, "__class__", _scoped(type(module)))
    try:
        yield
    finally:
        for node in (root, *others):
            for _, module in list(nnx.iter_modules(node)):
                original = vars(type(module)).get(SCOPED)
                if original is not None:
                    object.__setattr__(module, "__class__", original)
                    vars(module).pop(_PATH, None)


@functools.cache  # Flax registers every module class for good, so nothing is kept in vain
def _scoped(cls: type[nnx.Module]) -> type[nnx.Module]:
    if SCOPED in vars(cls):
        return cls
    body = {name: _opening_scope(cls, method) for name, method in public_methods(cls)}
    return subclass(cls, {SCOPED: cls, **body})


def _opening_scope(cls: type, method: Any) -> Any:
    @functools.wraps(method, updated=())
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with names.module_scope(vars(self).get(_PATH, ""), cls):
            return method.__get__(self, type(self))(*args, **kwargs)

    return wrapper


def subclass(cls: type[nnx.Module], body: dict[str, Any]) -> type[nnx.Module]:
    """A subclass of an NNX module class under the same name, of the same pytree kind."""
    same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind = {"pytree": getattr(cls, "_pytree__is_pytree", True)}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (cls,), {**same, **body}, **kind)


def public_methods(cls: type) -> list[tuple[str, Any]]:
    """The public methods of an NNX module class below `nnx.Module`, and ``__call__``."""
    found: dict[str, Any] = {}
    fields = getattr(cls, "__dataclass_fields__", {})
    for base in cls.__mro__:
        if base in nnx.Module.__mro__:
            continue
        for name, value in vars(base).items():
            # nnx.jit and the like leave callable objects that bind as methods do
            is_method = inspect.isfunction(value) or (
                hasattr(value, "__wrapped__")
                and callable(value)
                and hasattr(type(value), "__get__")
                and not isinstance(value, staticmethod | classmethod)
            )
            public = name == "__call__" or not name.startswith("_")
            if is_method and public and name not in found and name not in fields:
                found[name] = value
    return list(found.items())
