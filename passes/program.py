"""`Program`: a traced function together with what its inputs and outputs are.

The passes take and give programs; `trace` makes one from a function whose first argument holds
the parameters. Called by `transform`, `compile`, `explain` and `ptq`; knows nothing of Flax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxquant.core.names import path_string
from jaxquant.core.qtensor import is_qtensor

Stage = Literal["float", "quantized"]


@dataclasses.dataclass(frozen=True)
class Input:
    """What one input of a program's jaxpr is.

    Attributes:
      path: path of the parameter it is, or is a part of; None for an input that is no parameter.
      part: None for a float array; for an array of a `QTensor` its place in it: "codes", "scale",
        "zero_point", "input_scale", or "scale/codes" and so on where scales are quantized too.
    """

    path: str | None = None
    part: str | None = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """How a function's result is put together from the outputs of a jaxpr.

    Attributes:
      tree: structure of the result.
      static: leaves of it that are not arrays, by position.
      arguments: leaves that are a `QTensor` argument handed through, which the jaxpr does not
        put out: position, and number of the argument among the program's arguments.
    """

    tree: Any
    static: tuple[tuple[int, Any], ...] = ()
    arguments: tuple[tuple[int, int], ...] = ()

    def leaves(self, arrays: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The leaves that are not static, in order.

        Args:
          arrays: outputs of the jaxpr.
          arguments: what `Program.flatten` gave for the call.
        """
        handed = {position: arguments[number] for position, number in self.arguments}
        static, rest = dict(self.static), iter(arrays)
        count = len(static) + len(handed) + len(arrays)
        return [
            handed[i] if i in handed else next(rest) for i in range(count) if i not in static
        ]

    def assemble(self, leaves: Sequence[Any]) -> Any:
        """The function's result, from what `leaves` gave."""
        static, rest = dict(self.static), iter(leaves)
        count = len(static) + len(leaves)
        full = [static[i] if i in static else next(rest) for i in range(count)]
        return jax.tree_util.tree_unflatten(self.tree, full)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A closed jaxpr and the meaning of its inputs.

    Attributes:
      jaxpr: the closed jaxpr.
      inputs: what each input is.
      outputs: how the function's result is made from what the jaxpr puts out.
      flatten: turns the function's arguments into the jaxpr's flat inputs.
      stage: "float" as traced, or "quantized" once `insert_scales` has run.
      facts: results of analyses by name. They hold for this jaxpr; a changed one starts without.
    """

    jaxpr: Any
    inputs: tuple[Input, ...]
    outputs: Outputs
    flatten: Callable[..., list[Any]]
    stage: Stage = "float"
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def paths(self) -> tuple[str | None, ...]:
        """For each input the path of the float parameter that it is, or None."""
        return tuple(i.path if i.part is None else None for i in self.inputs)

    @property
    def parameters(self) -> dict[str, Any]:
        """Abstract value of each float parameter by path."""
        return {
            path: var.aval
            for path, var in zip(self.paths, self.jaxpr.jaxpr.invars, strict=True)
            if path is not None
        }

    def with_facts(self, **facts: Any) -> Self:
        """The same program, with more known about it."""
        return dataclasses.replace(self, facts={**self.facts, **facts})

    def with_jaxpr(self, jaxpr: Any, **changes: Any) -> Self:
        """A program of another jaxpr; facts about the old one are dropped unless given."""
        return dataclasses.replace(self, jaxpr=jaxpr, **{"facts": {}, **changes})


def is_traceable(leaf: Any) -> bool:
    """Whether a leaf becomes an input of the jaxpr; everything else is static."""
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return isinstance(leaf, kinds) or is_qtensor(leaf)


def trace(
    fn: Callable[..., Any],
    tree: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    paths: Sequence[str | None] | None = None,
) -> Program:
    """Traces ``fn(tree, *args, **kwargs)`` in float; the leaves of ``tree`` are the parameters.

    Args:
      fn: the function.
      tree: parameters: arrays, `jax.ShapeDtypeStruct`s or `QTensor`s; of the last ones the
        function sees the float arrays that they stand for.
      args: further positional arguments; leaves that are not arrays are static.
      kwargs: keyword arguments, likewise.
      paths: for each leaf of ``tree`` its name, or None for one that is no parameter. When None,
        all leaves are parameters, named by their place in the tree.

    Raises:
      ValueError: two leaves of ``tree`` have the same path.
    """
    example = (tree, tuple(args), dict(kwargs or {}))
    keyed, treedef = jax.tree_util.tree_flatten_with_path(example, is_leaf=is_qtensor)
    dynamic = [i for i, (_, leaf) in enumerate(keyed) if is_traceable(leaf)]
    leaves = [leaf for _, leaf in keyed]
    outputs: Outputs | None = None

    def flat(*values: Any) -> list[Any]:
        nonlocal outputs
        full = list(leaves)
        for i, value in zip(dynamic, values, strict=True):
            full[i] = value
        tree, args, kwargs = jax.tree_util.tree_unflatten(treedef, full)
        outs, out_tree = jax.tree_util.tree_flatten(fn(tree, *args, **kwargs))
        static = tuple((i, x) for i, x in enumerate(outs) if not _is_array(x))
        outputs = Outputs(out_tree, static)
        return [x for x in outs if _is_array(x)]

    closed = jax.make_jaxpr(flat)(*(_float_input(leaves[i]) for i in dynamic))
    assert outputs is not None
    if paths is None:
        paths = [path_string(path[1:]) for path, _ in keyed if path[0].idx == 0]
    names = tuple(paths[i] if i < len(paths) else None for i in dynamic)
    named = [p for p in names if p is not None]
    if len(set(named)) != len(named):
        twice = sorted({p for p in named if named.count(p) > 1})
        raise ValueError(f"parameters share a path: {', '.join(twice)}")

    def flatten(tree: Any, *args: Any, **kwargs: Any) -> list[Any]:
        given, other = jax.tree_util.tree_flatten(
            (tree, tuple(args), dict(kwargs)), is_leaf=is_qtensor
        )
        if cast(Any, other) != treedef:
            raise ValueError(
                f"the arguments differ in structure from those traced: {other} is not {treedef}"
            )
        return [given[i] for i in dynamic]

    return Program(closed, tuple(map(Input, names)), outputs, flatten)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _float_input(leaf: Any) -> Any:
    """What the function is traced with in the place of a leaf."""
    if not is_qtensor(leaf):
        return leaf
    sharding = getattr(jax.typeof(leaf.codes), "sharding", None)
    explicit = isinstance(sharding, NamedSharding) and sharding.mesh._any_axis_explicit
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if explicit else None)
