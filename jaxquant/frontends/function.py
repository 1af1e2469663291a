"""`transform(fn)`: the one function transform every frontend is a thin shell on.

The arguments of ``fn`` may hold `QTensor` leaves anywhere. ``fn`` itself is traced with the float
arrays those leaves stand for, and the program goes through `jaxquant.passes.pipeline`. What the
leaves are decides: a call without QTensors is a call of ``fn``. No Flax here.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax

from jaxquant.core import _compat
from jaxquant.core.invariants import check_codes
from jaxquant.core.names import path_string
from jaxquant.core.qtensor import is_qtensor
from jaxquant.passes.events import Event
from jaxquant.passes.pass_manager import PassManager
from jaxquant.passes.pipeline import evaluate, quantizing_passes
from jaxquant.passes.program import Outputs, is_traceable, trace

F = TypeVar("F", bound=Callable[..., Any])
_CACHED_CALLS = 256  # of one function: structures and static values that eager calls came with


def transform(fn: F, *, strict: bool = False, on_event: Callable[[Event], None] | None = None) -> F:
    """A function like ``fn`` whose arguments may hold `QTensor` leaves in the place of arrays.

    It can be jitted, vmapped, scanned, rematerialised, differentiated (with respect to float
    arguments) and called inside shard_map. Called eagerly it is compiled once per signature:
    shapes, dtypes, tree structure, and the values of arguments that are not arrays. So give a
    number that changes from call to call as an array, or call the function inside `jax.jit`.

    Args:
      fn: function of pytrees. Arguments that are not arrays (numbers, strings, None, …) are
        static. A parameter that it returns unchanged comes back as the QTensor it was.
      strict: raise `StrictError` where a weight would be dequantized instead.
      on_event: called with an `Event` for each decision, whenever the function is traced.

    Returns:
      The transformed function. Without any QTensor among its arguments it calls ``fn`` itself,
      so float results are bit-identical.

    Raises:
      TypeError: ``fn`` is no function.
    """
    if not callable(fn):
        raise TypeError(f"transform takes a function, not {fn!r}")
    compiled: dict[Hashable, Callable[..., Any]] = {}

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten((args, kwargs), is_leaf=is_qtensor)
        if not any(map(is_qtensor, leaves)):
            return fn(*args, **kwargs)
        dynamic = [i for i, leaf in enumerate(leaves) if is_traceable(leaf)]
        static = {i: leaf for i, leaf in enumerate(leaves) if not is_traceable(leaf)}
        values = [leaves[i] for i in dynamic]

        def run(values: Sequence[Any]) -> _Result:
            full = [static.get(i) for i in range(len(leaves))]
            for i, value in zip(dynamic, values, strict=True):
                full[i] = value
            args, kwargs = jax.tree_util.tree_unflatten(tree, full)
            return _run(fn, args, kwargs, strict, on_event)

        key = _signature(tree, static)
        inside_a_trace = any(map(_compat.is_tracer, jax.tree_util.tree_leaves(values)))
        if key is None or inside_a_trace or not _compat.is_eager():
            return run(values).unwrap()
        program = compiled.get(key)
        if program is None:
            if len(compiled) >= _CACHED_CALLS:  # the oldest goes: a step number may be an argument
                compiled.pop(next(iter(compiled)), None)
            program = compiled[key] = jax.jit(run)
        return program(values).unwrap()

    return wrapped  # type: ignore[return-value]


def _signature(tree: Any, static: dict[int, Any]) -> Hashable | None:
    """Key of a compiled call; None if a static argument cannot be hashed."""
    # True == 1 == 1.0 in a dict, and 0.0 == -0.0, but the function may tell them apart.
    values = ((i, type(v), v.hex() if type(v) is float else v) for i, v in static.items())
    key = (tree, tuple(values))
    try:
        hash(key)
    except TypeError:
        return None
    return key


@jax.tree_util.register_pytree_node_class
class _Result:
    """What a function returned, on its way out of `jax.jit`: arrays, and the rest as static."""

    def __init__(self, leaves: Sequence[Any], outputs: Outputs) -> None:
        self.leaves, self.outputs = list(leaves), outputs

    def tree_flatten(self) -> tuple[list[Any], Outputs]:
        return self.leaves, self.outputs

    @classmethod
    def tree_unflatten(cls, outputs: Outputs, leaves: Any) -> _Result:
        return cls(leaves, outputs)

    def unwrap(self) -> Any:
        return self.outputs.assemble(self.leaves)


def _run(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    strict: bool,
    on_event: Callable[[Event], None] | None,
) -> _Result:
    """Traces ``fn`` with float arrays, quantizes the program, and evaluates it."""

    def call(arguments: Any) -> Any:
        args, kwargs = arguments
        return fn(*args, **kwargs)

    program = trace(call, (args, kwargs), paths=_argument_paths((args, kwargs)))
    arguments = program.flatten((args, kwargs))
    weights = {i: value for i, value in enumerate(arguments) if is_qtensor(value)}
    for i, weight in weights.items():
        check_codes(weight, program.inputs[i].path or "a QTensor")
    passes = quantizing_passes(weights, strict=strict, on_event=on_event)
    program = PassManager(passes, title=_title(fn)).run(program)
    arrays = evaluate(program, jax.tree_util.tree_leaves(arguments))
    return _Result(program.outputs.leaves(arrays, arguments), program.outputs)


def _title(fn: Callable[..., Any]) -> str:
    """The function's name in dumps; the shells of Linen and NNX know their module's."""
    shell = getattr(fn, "__self__", None)
    return str(getattr(shell, "title", None) or getattr(fn, "__name__", type(fn).__name__))


def _argument_paths(arguments: Any) -> list[str]:
    """Names of the leaves: the path inside their own argument; with it where two are the same."""
    flat, _ = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_qtensor)
    short = [path_string(path[2:]) for path, _ in flat]
    counts = collections.Counter(short)
    return [
        name if counts[name] == 1 else path_string(path[1:])
        for name, (path, _) in zip(short, flat, strict=True)
    ]
