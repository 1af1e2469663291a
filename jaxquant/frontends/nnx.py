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

from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.recipe import Recipe
from jaxquant.frontends import trees
from jaxquant.frontends.function import transform
from jaxquant.frontends.marks import LIFTED, RECIPE
from jaxquant.frontends.scopes import SCOPED, nnx_scopes, public_methods, subclass

_CONTEXT = "jaxquant"  # tag of the nnx.update_context of a call
_CACHED_CALLS = 256


@functools.cache
def decorate_class(cls: type[nnx.Module], recipe: Recipe) -> type[nnx.Module]:
    """The decorated subclass of an NNX module class; `cls` itself is left as it is."""

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

    def __init__(self, method: Any, graphdef: nnx.GraphDef[Any]) -> None:
        self.method, self.graphdef = method, graphdef
        self.key: Hashable | None = (method, graphdef)
        try:
            hash(self.key)
        except TypeError:  # an attribute of a module that cannot be hashed
            self.key = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MethodCall) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def run(self, _: Any, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        """The call as a pure function.

        Returns:
          The method's result, the new graph definition or None if the structure is as before,
          and the new leaves: only those that changed, by index, if the structure is as before.
        """
        with nnx.merge_context(_CONTEXT, inner=True) as context:
            nodes = context.unflatten(self.graphdef, list(leaves))
        args, kwargs = _put_nodes_back((args, kwargs), nodes[1:])
        with nnx_scopes(nodes[0], *nodes[1:]):
            out = self.method.__get__(nodes[0], type(nodes[0]))(*args, **kwargs)
        if any(map(_is_node, jax.tree_util.tree_leaves(out, is_leaf=_is_node))):
            raise _ReturnsNodeError
        with nnx.split_context(_CONTEXT) as context:
            graphdef, new = context.flatten(nodes, with_paths=False)
        if graphdef == self.graphdef.with_same_outer_index():
            pairs = enumerate(zip(new, leaves, strict=True))
            return out, None, {i: n for i, (n, old) in pairs if not trees.same_leaf(n, old)}
        known = {id(leaf): i for i, leaf in enumerate(leaves)}
        return out, graphdef, [_Kept(known[id(n)]) if id(n) in known else n for n in new]


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
        variables = list(state.leaves)
        leaves = [v.get_raw_value() if isinstance(v, nnx.Variable) else v for v in variables]
        call = _MethodCall(method, graphdef)
        if call.key is None:
            result = transform(call.run)(trees.Uncached(), leaves, args, kwargs)
        else:
            result = _transformed(call)(None, leaves, args, kwargs)
        out, new_graphdef, new = result
        if new_graphdef is None and all(isinstance(variables[i], nnx.Variable) for i in new):
            for i, value in new.items():
                variables[i].set_raw_value(value)
            return out
        if new_graphdef is None:  # an array that is a plain attribute changed
            new_graphdef = graphdef.with_same_outer_index()
            new = [new.get(i, leaf) for i, leaf in enumerate(leaves)]
        full = [leaves[n.index] if isinstance(n, _Kept) else n for n in new]
        with nnx.merge_context(_CONTEXT, inner=False) as context:
            context.unflatten(new_graphdef, full)
        return out


def _put_nodes_back(tree: Any, nodes: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda leaf: nodes[leaf.index] if isinstance(leaf, _Placeholder) else leaf, tree
    )
