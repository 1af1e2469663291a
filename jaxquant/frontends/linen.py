"""`@quantize` on Flax Linen: a lifted transform over every method of a module class.

The decorated class is a subclass with the same names and fields. Where no QTensor is in sight its
methods are the original ones, called directly. Otherwise the variables in the module's scope are
lifted (`flax.core.lift.pack`) and the method runs inside `transform`, where every leaf is a float
tracer; so no Flax module ever meets a QTensor. `apply` on a QTensor tree is transformed as a whole,
compiled once per module and kind of call.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import errors
from flax import linen as nn
from flax.core import lift

from jaxquant.core._compat import is_eager
from jaxquant.core.recipe import Recipe
from jaxquant.frontends import trees
from jaxquant.frontends.fingerprint import UnhashableError, fingerprint
from jaxquant.frontends.function import transform
from jaxquant.frontends.marks import LIFTED, RECIPE
from jaxquant.frontends.scopes import linen_scopes

# What a dataclass generates, and would generate anew for the subclass over the user's own.
_KEPT = ("__init__", "__eq__", "__hash__")
_CACHED_CALLS = 256


def decorate_class(cls: Any, recipe: Recipe) -> Any:
    """The decorated subclass of a Linen module class; `cls` itself is left as it is.

    The same class and recipe give the same subclass, so instances of it share compiled calls.
    """
    return _decorated(cls, recipe)


@functools.cache
def _decorated(cls: Any, recipe: Recipe) -> Any:

    @nn.nowrap
    @functools.wraps(cls.apply)
    def apply(
        self: nn.Module,
        variables: Any,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        options = {
            "method": method,
            "mutable": mutable,
            "capture_intermediates": capture_intermediates,
        }
        if not trees.has_qtensor((variables, args, kwargs)):
            return cls.apply(self, variables, *args, rngs=rngs, **options, **kwargs)
        try:
            return _apply(_ApplyCall(cls.apply, self, options), variables, rngs, args, kwargs)
        except trees.NEEDS_VALUES:
            if not is_eager():
                raise
            return cls.apply(self, variables, *args, rngs=rngs, **options, **kwargs)

    def __init_subclass__(sub: type[nn.Module], **kwargs: Any) -> None:
        super(decorated, sub).__init_subclass__(**kwargs)
        _lift_methods(sub, vars(sub))

    body = {name: vars(cls)[name] for name in _KEPT if name in vars(cls)}
    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {RECIPE: recipe, "apply": apply, "__init_subclass__": classmethod(__init_subclass__)}
    metaclass: Any = type(cls)
    decorated = metaclass(cls.__name__, (cls,), body)
    inherited = {name for base in decorated.__mro__ for name in vars(base)}
    _lift_methods(decorated, inherited - set(dir(nn.Module)) | {"__call__"})
    return decorated


def decorate_instance(module: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of an unbound module, of the decorated class.

    Raises:
      ValueError: the module is already attached to a parent or to variables.
    """
    if module.scope is not None:
        raise ValueError(
            f"this {type(module).__name__} is already bound; decorate its class, "
            f"jaxquant.quantize(...)({type(module).__name__})(...), or an unbound instance"
        )
    names = (f.name for f in dataclasses.fields(module) if f.init)
    fields = {name: getattr(module, name) for name in names}
    return decorate_class(type(module), recipe)(**fields)


def uncached_reason(module: nn.Module) -> str | None:
    """Why eager calls of a module cannot be cached, or None."""
    try:
        fingerprint(module)
    except UnhashableError as error:
        return str(error)
    return None


# Methods: lifted ---------------------------------------------------------------------------------


def _lift_methods(cls: type[nn.Module], names: Any) -> None:
    for name in sorted(names):
        method = inspect.getattr_static(cls, name, None)
        if (
            inspect.isfunction(method)
            and hasattr(method, "method_handler_wrapped")  # Flax manages it: no nowrap, no field
            and not hasattr(method, LIFTED)
            and (name == "__call__" or not name.startswith("__"))
            and name != "setup"
        ):
            setattr(cls, name, _lifted_method(method))


def _lifted_method(method: Callable[..., Any]) -> Callable[..., Any]:
    quantized = nn.transforms.lift_transform(_lift, method)

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _sees_qtensor(self, args, kwargs):
            return method(self, *args, **kwargs)
        try:
            return quantized(self, *args, **kwargs)
        except errors.TransformedMethodReturnValueError:
            return method(self, *args, **kwargs)  # it hands out submodules: nothing to compute
        except trees.NEEDS_VALUES:
            if not is_eager():
                raise
            return method(self, *args, **kwargs)

    setattr(wrapper, LIFTED, True)
    return wrapper


def _lift(core_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The lifted transform: a function of scopes that runs `core_fn` inside `transform`."""

    def inner(
        scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def pure(_: Any, named: Any, rngs: Any, args: Any, kwargs: Any) -> Any:
            inputs = _from_named(named)
            scopes = scope_fn(inputs, rngs)
            with linen_scopes():
                out = core_fn(scopes, *args, **kwargs)
            return out, trees.mark_unchanged(repack_fn(scopes), inputs)

        # The closure is new each time, so an eager call is traced and run, not compiled.
        named = _to_named(variables, jax.tree_util.tree_leaves(scope_fn(variables, rngs)))
        out, new = transform(pure)(trees.Uncached(), named, rngs, args, kwargs)
        return out, trees.restore_unchanged(new, variables)

    return lift.pack(inner, (True,), (True,), (True,), name="quantize", enable_kwargs=True)


def _to_named(groups: Any, scopes: list[Any]) -> dict[str, Any]:
    """Packed variables, ``(({collection: tree}, one for each scope),)``, under readable names."""
    (collections,) = groups
    if len(collections) == 1:
        paths = ["/".join(scopes[0].path)]
    else:
        paths = [f"scope{i:04d}" for i in range(len(collections))]  # JAX sorts the keys
    names = {name for scope in collections for name in scope}
    return {
        name: {p: scope[name] for p, scope in zip(paths, collections, strict=True) if name in scope}
        for name in names
    } | {"": dict.fromkeys(paths)}


def _from_named(named: dict[str, Any]) -> Any:
    """Undoes `_to_named`."""
    return (
        tuple(
            {name: by_path[path] for name, by_path in named.items() if name and path in by_path}
            for path in named[""]
        ),
    )


def _sees_qtensor(module: Any, args: Any, kwargs: Any) -> bool:
    """Whether a QTensor is among the variables in reach of a bound module, or the arguments."""
    if not isinstance(module, nn.Module) or module.scope is None:
        return False
    if trees.has_qtensor((module.scope.variables(), args, kwargs)):
        return True
    # Modules and variables passed in from elsewhere live in scopes of their own.
    values = [v for n, v in vars(module).items() if n in module.__dataclass_fields__]
    for leaf in jax.tree_util.tree_leaves((values, args, kwargs)):
        if isinstance(leaf, nn.Module) and _sees_qtensor(leaf, (), {}):
            return True
        if isinstance(leaf, nn.Variable) and trees.has_qtensor(leaf.scope.variables()):
            return True
    return False


# apply: transformed as a whole, cached -----------------------------------------------------------


class _ApplyCall:
    """What is static in a call of `apply`; equal calls may share compiled code."""

    def __init__(
        self, apply: Callable[..., Any], module: nn.Module, options: dict[str, Any]
    ) -> None:
        self.apply, self.module, self.options = apply, module, options
        # The bound variables are those of the call, so flax unbinds a method; so does the key.
        method = options["method"]
        if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
            options = {**options, "method": method.__func__}
        self.key: Hashable | None = None
        if not getattr(nn.module, "_global_interceptor_stack", ()):
            rules = tuple(nn.get_logical_axis_rules())
            try:
                self.key = fingerprint((apply, module, options, rules))
            except UnhashableError:
                self.key = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ApplyCall) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def run(self, _: Any, variables: Any, rngs: Any, args: Any, kwargs: Any) -> Any:
        """The call as a pure function; of the variables only what changed comes back."""
        with linen_scopes():
            out = self.apply(self.module, variables, *args, rngs=rngs, **self.options, **kwargs)
        if self.returns_variables:
            return out[0], trees.mark_unchanged(out[1], variables)
        return out

    @property
    def title(self) -> str:
        """Name of the call in dumps."""
        return type(self.module).__name__

    @property
    def returns_variables(self) -> bool:
        return bool(self.options["capture_intermediates"]) or self.options["mutable"] is not False


@functools.lru_cache(maxsize=_CACHED_CALLS)
def _transformed(call: _ApplyCall) -> Callable[..., Any]:
    return transform(call.run)


def _apply(call: _ApplyCall, variables: Any, rngs: Any, args: Any, kwargs: Any) -> Any:
    if call.key is None:
        out = transform(call.run)(trees.Uncached(), variables, rngs, args, kwargs)
    else:
        out = _transformed(call)(None, variables, rngs, args, kwargs)
    if call.returns_variables:
        return out[0], trees.restore_unchanged(out[1], variables)
    return out
