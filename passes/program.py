"""`Program`: a traced function together with what each of its inputs is.

The passes take and give programs; `trace` makes one from a function whose first argument holds
the parameters. Called by `explain`, `ptq` and the frontends; knows nothing of Flax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, cast

import jax
import numpy as np

from jaxquant.core.names import path_string

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


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A closed jaxpr and the meaning of its inputs.

    Attributes:
      jaxpr: the closed jaxpr.
      inputs: what each input is.
      out_shape: the function's result as a tree of shapes and dtypes.
      flatten: turns the function's arguments into the jaxpr's flat inputs.
      stage: "float" as traced, or "quantized" once `insert_scales` has run.
      facts: results of analyses by name. They hold for this jaxpr; a changed one starts without.
    """

    jaxpr: Any
    inputs: tuple[Input, ...]
    out_shape: Any
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
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def trace(
    fn: Callable[..., Any],
    tree: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    paths: Sequence[str | None] | None = None,
) -> Program:
    """Traces ``fn(tree, *args, **kwargs)``; the array leaves of ``tree`` are the parameters.

    Args:
      fn: the function.
      tree: parameters, arrays or `jax.ShapeDtypeStruct`s.
      args: further positional arguments; leaves that are not arrays are static.
      kwargs: keyword arguments, likewise.
      paths: for each leaf of ``tree`` its name, or None for one that is no parameter. When None,
        all leaves are parameters, named by their place in the tree.

    Raises:
      ValueError: two leaves of ``tree`` have the same path.
    """
    example = (tree, tuple(args), dict(kwargs or {}))
    keyed, treedef = jax.tree_util.tree_flatten_with_path(example)
    dynamic = [i for i, (_, leaf) in enumerate(keyed) if is_traceable(leaf)]
    leaves = [leaf for _, leaf in keyed]

    def flat(*values: Any) -> Any:
        full = list(leaves)
        for i, value in zip(dynamic, values, strict=True):
            full[i] = value
        tree, args, kwargs = jax.tree_util.tree_unflatten(treedef, full)
        out = fn(tree, *args, **kwargs)
        return [x for x in jax.tree_util.tree_leaves(out) if isinstance(x, jax.Array)]

    closed, out_shape = jax.make_jaxpr(flat, return_shape=True)(*(leaves[i] for i in dynamic))
    if paths is None:
        paths = [path_string(path[1:]) for path, _ in keyed if path[0].idx == 0]
    names = tuple(paths[i] if i < len(paths) else None for i in dynamic)
    named = [p for p in names if p is not None]
    if len(set(named)) != len(named):
        twice = sorted({p for p in named if named.count(p) > 1})
        raise ValueError(f"parameters share a path: {', '.join(twice)}")

    def flatten(tree: Any, *args: Any, **kwargs: Any) -> list[Any]:
        given, other = jax.tree_util.tree_flatten((tree, tuple(args), dict(kwargs)))
        if cast(Any, other) != treedef:
            raise ValueError(
                f"the arguments differ in structure from those traced: {other} is not {treedef}"
            )
        return [given[i] for i in dynamic]

    return Program(closed, tuple(map(Input, names)), out_shape, flatten)
