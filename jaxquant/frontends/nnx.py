"""`@quantize` on Flax NNX: split, transform, merge, and update what the call changed.

The decorated class is a subclass with the same names. Where no QTensor is in sight its methods are
the original ones, called directly. Otherwise the module (with any module or `nnx.Rngs` among the
arguments) is split into its graph definition and leaves, the method runs inside `transform` on a
merged copy with float leaves, and the variables it changed are written back into the user's own
objects. Variables it did not touch are not written, QTensor parameters least of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx

from jaxquant.core._compat import is_eager
from jaxquant.core.names import module_scope, path_string
from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.recipe import Recipe
from jaxquant.frontends import trees
from jaxquant.frontends.function import transform
from jaxquant.frontends.marks import LIFTED, RECIPE
from jaxquant.frontends.scopes import SCOPED, nnx_scopes, public_methods, subclass

_CONTEXT = "jaxquant"  # tag of the nnx.update_context of a call
_CACHED_CALLS = 256


def decorate_class(cls: Any, recipe: Recipe) -> Any:
    """The decorated subclass of an NNX module class; `cls` itself is left as it is.

    The same class and recipe give the same subclass, so instances of it share compiled calls.
    """
    return _decorated(cls, recipe)


@functools.cache
def _decorated(cls: Any, recipe: Recipe) -> Any:

    def __init_subclass__(sub: type[nnx.Module], **kwargs: Any) -> None:
        super(decorated, sub).__init_subclass__(**kwargs)
        if SCOPED not in vars(sub):
            _lift_methods(sub)

    body = {RECIPE: recipe, "__init_subclass__": classmethod(__init_subclass__)}
    decorated = subclass(cls, body)
    _lift_methods(decorated)
    return decorated


def decorate_instance(module: nnx.Module, recipe: Recipe) -> nnx.Module:
    """A module of the decorated class that shares all variables and submodules with `module`."""
    decorated = object.__new__(decorate_class(type(module), recipe))
    vars(decorated).update(vars(module))
    return decorated


def uncached_reason(module: nnx.Module) -> str | None:
    """Why eager calls of a module cannot be cached, or None."""
    try:
        hash(nnx.graphdef(module))
    except TypeError as error:
        return str(error)
    return None


def _lift_methods(cls: type[nnx.Module]) -> None:
    for name, method in public_methods(cls):
        if not hasattr(method, LIFTED):
            setattr(cls, name, _lifted_method(method))


def _lifted_method(method: Any) -> Callable[..., Any]:
    @functools.wraps(method, updated=())
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not holds_qtensor((self, args, kwargs)):
            return method.__get__(self, type(self))(*args, **kwargs)
        try:
            return _call(method, self, args, kwargs)
        except _ReturnsNodeError:  # it hands out modules or variables: nothing to compute
            return method.__get__(self, type(self))(*args, **kwargs)
        except trees.NEEDS_VALUES:
            if not is_eager():
                raise
            return method.__get__(self, type(self))(*args, **kwargs)

    setattr(wrapper, LIFTED, True)
    return wrapper


def holds_qtensor(tree: Any) -> bool:
    """Whether a QTensor is among the leaves of a tree, or the variables of its modules."""
    for leaf in jax.tree_util.tree_leaves(tree, is_leaf=_is_node_or_qtensor):
        if is_qtensor(leaf):
            return True
        if _is_node(leaf):
            variables = (v for _, v in nnx.iter_graph(leaf) if isinstance(v, nnx.Variable))
            if any(trees.has_qtensor(v.get_raw_value()) for v in variables):
                return True
    return False


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _is_node_or_qtensor(x: Any) -> bool:
    return _is_node(x) or is_qtensor(x)


class _ReturnsNodeError(Exception):
    """A method returned a module or variable of the merged copy."""


class _Placeholder:
    """Where a module stood among the arguments; it travels with the split graph."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Placeholder) and self.index == other.index

    def __hash__(self) -> int:
        return hash((_Placeholder, self.index))


class _MethodCall:
    """What is static in a call; equal calls may share compiled code."""

    def __init__(self, method: Any, graphdef: nnx.GraphDef[Any], names: list[str]) -> None:
        self.method, self.graphdef, self.names = method, graphdef, names
        self.key: Hashable | None = (method, graphdef)
        try:
            hash(self.key)
        except TypeError:  # an attribute of a module that cannot be hashed
            self.key = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MethodCall) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def title(self) -> str:
        """Name of the call in dumps."""
        return str(self.method.__qualname__)

    def run(self, _: Any, named: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """The call as a pure function.

        Args:
          named: the leaves of the graph by name.
          args: positional arguments, with placeholders for modules.
          kwargs: keyword arguments, likewise.

        Returns:
          The method's result, the new graph definition or None if the structure is as before,
          and the new leaves by index (only those that changed, if the structure is as before).
        """
        leaves = [named[name] for name in self.names]
        with nnx.merge_context(_CONTEXT, inner=True) as context:
            # containers are copied: a dict that a variable holds may be written in place
            nodes = context.unflatten(self.graphdef, jax.tree_util.tree_map(lambda x: x, leaves))
        args, kwargs = _put_nodes_back((args, kwargs), nodes[1:])
        root = type(nodes[0])
        with nnx_scopes(nodes[0], *nodes[1:]), module_scope("", root):
            out = self.method.__get__(nodes[0], type(nodes[0]))(*args, **kwargs)
        if any(map(_is_node, jax.tree_util.tree_leaves(out, is_leaf=_is_node))):
            raise _ReturnsNodeError
        with nnx.split_context(_CONTEXT) as context:
            graphdef, new = context.flatten(nodes, with_paths=False)
        same_structure = graphdef == self.graphdef.with_same_outer_index()
        known = {id(leaf): i for i, leaf in enumerate(leaves)}
        changes = {
            i: _Kept(known[id(leaf)]) if id(leaf) in known else leaf
            for i, leaf in enumerate(new)
            if not (same_structure and trees.same_leaf(leaf, leaves[i]))
        }
        return out, None if same_structure else graphdef, changes


@jax.tree_util.register_static
class _Kept(_Placeholder):
    """Stands for the leaf of this index of the call's input."""


@functools.lru_cache(maxsize=_CACHED_CALLS)
def _transformed(call: _MethodCall) -> Callable[..., Any]:
    return transform(call.run)


def _call(method: Any, module: nnx.Module, args: Any, kwargs: Any) -> Any:
    nodes: list[Any] = [module]

    def take(leaf: Any) -> Any:
        if not _is_node(leaf):
            return leaf
        nodes.append(leaf)
        return _Placeholder(len(nodes) - 2)

    args, kwargs = jax.tree_util.tree_map(take, (args, kwargs), is_leaf=_is_node_or_qtensor)
    with nnx.update_context(_CONTEXT):
        with nnx.split_context(_CONTEXT) as context:
            graphdef, state = context.flatten(tuple(nodes))
        variables, names = list(state.leaves), [_leaf_name(path) for path in state.paths]
        leaves = [v.get_raw_value() if isinstance(v, nnx.Variable) else v for v in variables]
        call = _MethodCall(method, graphdef, names)
        named = dict(zip(names, leaves, strict=True))
        if call.key is None:
            result = transform(call.run)(trees.Uncached(), named, args, kwargs)
        else:
            result = _transformed(call)(None, named, args, kwargs)
        out, new_graphdef, changes = result
        if new_graphdef is None and all(isinstance(variables[i], nnx.Variable) for i in changes):
            for i, change in changes.items():
                # nnx.remat and the like hand every parameter through: this one is there already
                if not (is_qtensor(change) and is_qtensor(leaves[i])):
                    variables[i].set_raw_value(_new_leaf(change, leaves))
            return out
        new = {i: _new_leaf(change, leaves) for i, change in changes.items()}
        if new_graphdef is None:  # an array that is a plain attribute changed
            new_graphdef = graphdef.with_same_outer_index()
            new = dict(enumerate(leaves)) | new
        with nnx.merge_context(_CONTEXT, inner=False) as context:
            context.unflatten(new_graphdef, [new[i] for i in range(len(new))])
        return out


def _new_leaf(change: Any, leaves: list[Any]) -> Any:
    return leaves[change.index] if isinstance(change, _Kept) else change


def _leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf of ``(module, *module arguments)``."""
    node, *rest = path
    return path_string(rest if node == 0 else ("args", node - 1, *rest))


def _put_nodes_back(tree: Any, nodes: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda leaf: nodes[leaf.index] if isinstance(leaf, _Placeholder) else leaf, tree
    )
