"""`transform(fn)`: the one function transform every frontend is a thin shell on.

The arguments of ``fn`` may hold `QTensor` leaves anywhere. ``fn`` itself is traced with the float
arrays those leaves stand for, and the jaxpr is run by `jaxquant.passes.rewrite`. What the leaves
are decides: a call without QTensors is a call of ``fn``. No Flax here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxquant.core import _compat
from jaxquant.core.names import path_string
from jaxquant.core.qtensor import is_qtensor
from jaxquant.passes.events import Event
from jaxquant.passes.forwarding import forwarded_inputs
from jaxquant.passes.interpreter import Weight, is_weight
from jaxquant.passes.program import is_traceable
from jaxquant.passes.rewrite import Rewriter

F = TypeVar("F", bound=Callable[..., Any])


def transform(fn: F, *, strict: bool = False, on_event: Callable[[Event], None] | None = None) -> F:
    """A function like ``fn`` whose arguments may hold `QTensor` leaves in the place of arrays.

    It can be jitted, vmapped, scanned, rematerialised, differentiated (with respect to float
    arguments) and called inside shard_map. Called eagerly it is compiled once per signature:
    shapes, dtypes, tree structure, and the values of arguments that are not arrays.

    Args:
      fn: function of pytrees. Arguments that are not arrays (numbers, strings, None, …) are
        static. A parameter that it returns unchanged comes back as the QTensor it was.
      strict: raise `StrictError` where a weight would be dequantized instead.
      on_event: called with an `Event` for each decision, whenever the function is traced.

    Returns:
      The transformed function. Without any QTensor among its arguments it calls ``fn`` itself,
      so float results are bit-identical.
    """
    compiled: dict[Hashable, Callable[..., Any]] = {}

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten((args, kwargs), is_leaf=is_qtensor)
        if not any(map(is_qtensor, leaves)):
            return fn(*args, **kwargs)
        dynamic = [i for i, leaf in enumerate(leaves) if _is_dynamic(leaf)]
        static = {i: leaf for i, leaf in enumerate(leaves) if not _is_dynamic(leaf)}
        values = [leaves[i] for i in dynamic]

        def run(values: Sequence[Any]) -> Any:
            full = [static.get(i) for i in range(len(leaves))]
            for i, value in zip(dynamic, values, strict=True):
                full[i] = value
            rewriter = Rewriter(on_event=on_event, strict=strict, op_rules=_op_rules(values))
            return _run(fn, tree, full, rewriter)

        key = _signature(tree, static)
        inside_a_trace = any(map(_compat.is_tracer, jax.tree_util.tree_leaves(values)))
        if key is None or inside_a_trace or not _compat.is_eager():
            return run(values).unwrap()
        if key not in compiled:
            compiled[key] = jax.jit(run)
        return compiled[key](values).unwrap()

    return wrapped  # type: ignore[return-value]


def _is_dynamic(leaf: Any) -> bool:
    return is_qtensor(leaf) or is_traceable(leaf)


def _signature(tree: Any, static: dict[int, Any]) -> Hashable | None:
    """Key of a compiled call; None if a static argument cannot be hashed."""
    # True == 1 == 1.0 in a dict, but the function may tell them apart.
    key = (tree, tuple((i, type(v), v) for i, v in static.items()))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _op_rules(values: Sequence[Any]) -> tuple[Any, ...]:
    rules: dict[Any, None] = {}
    for value in values:
        if is_qtensor(value):
            rules.update(dict.fromkeys(value.op_rules))
    return tuple(rules)


@jax.tree_util.register_pytree_node_class
class _Output:
    """The arrays a function returned as children; whatever else it returned is static."""

    def __init__(self, arrays: list[Any], tree: Any, others: dict[int, Any]) -> None:
        self.arrays, self.tree, self.others = arrays, tree, others

    def tree_flatten(self) -> tuple[list[Any], Any]:
        return self.arrays, (self.tree, tuple(self.others.items()))

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> _Output:
        tree, others = static
        return cls(list(arrays), tree, dict(others))

    def unwrap(self) -> Any:
        rest = iter(self.arrays)
        count = len(self.arrays) + len(self.others)
        leaves = [self.others[i] if i in self.others else next(rest) for i in range(count)]
        return jax.tree_util.tree_unflatten(self.tree, leaves)


def _run(fn: Callable[..., Any], tree: Any, leaves: list[Any], rewriter: Rewriter) -> _Output:
    """Traces ``fn`` with float arrays and evaluates the jaxpr with the QTensors."""
    dynamic = [i for i, leaf in enumerate(leaves) if _is_dynamic(leaf)]
    out_tree: Any = None
    others: dict[int, Any] = {}

    def flat(*values: Any) -> list[Any]:
        nonlocal out_tree
        full = list(leaves)
        for i, value in zip(dynamic, values, strict=True):
            full[i] = value
        args, kwargs = jax.tree_util.tree_unflatten(tree, full)
        outs, out_tree = jax.tree_util.tree_flatten(fn(*args, **kwargs))
        others.update({i: x for i, x in enumerate(outs) if not _is_array(x)})
        return [x for x in outs if _is_array(x)]

    closed = jax.make_jaxpr(flat)(*(_float_input(leaves[i]) for i in dynamic))
    paths = _argument_paths(tree)
    inputs = [Weight(leaves[i], paths[i]) if is_qtensor(leaves[i]) else leaves[i] for i in dynamic]
    jaxpr, consts = _compat.open_jaxpr(closed)
    outs = rewriter.run(jaxpr, consts, inputs)
    arrays = [
        _returned(rewriter, out, None if origin is None else inputs[origin])
        for origin, out in zip(forwarded_inputs(jaxpr), outs, strict=True)
    ]
    return _Output(arrays, out_tree, others)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _float_input(leaf: Any) -> Any:
    """What ``fn`` is traced with in the place of a leaf."""
    if not is_qtensor(leaf):
        return leaf
    sharding = getattr(jax.typeof(leaf.codes), "sharding", None)
    explicit = isinstance(sharding, NamedSharding) and sharding.mesh._any_axis_explicit
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if explicit else None)


def _argument_paths(tree: Any) -> list[str]:
    """Names of the leaves: the path inside their own argument."""
    dummy = jax.tree_util.tree_unflatten(tree, range(tree.num_leaves))
    flat, _ = jax.tree_util.tree_flatten_with_path(dummy)
    return [path_string(path[2:]) for path, _ in flat]


def _returned(rewriter: Rewriter, out: Any, argument: Any) -> Any:
    if is_weight(argument):
        return argument.value  # a parameter handed through: the user's QTensor, not a float copy
    return rewriter.returned(out) if is_weight(out) else out
