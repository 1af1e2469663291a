"""A float model that is being transformed: its program, its parameters by path, and the way back.

What `smooth`, `rotate` and the transforms of recipes share. All change parameters, compare the
function before and after on an example, and hand on a function and a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from jaxquant.algorithms.transforms.unchanged import check_unchanged
from jaxquant.core.qtensor import is_qtensor
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.adapter import ModelAdapter
from jaxquant.frontends.marks import recipe_of
from jaxquant.passes.pass_manager import Pass
from jaxquant.passes.program import Program, trace

Example = tuple[Sequence[Any], Mapping[str, Any]]
Folded = Callable[[Mapping[str, Any]], dict[str, Any]]


class Subject:
    """A float function, its parameters and an example call.

    Args:
      fn: ``fn(tree, *args, **kwargs)``.
      tree: its parameters and other state.
      paths: for each leaf of ``tree`` its parameter path, or None.
      example: positional and keyword arguments.
      what: the transform, for errors.

    Attributes:
      program: the float program of the example call.
      parameters: arrays by path.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        tree: Any,
        paths: Sequence[str | None],
        example: Example,
        what: str,
    ) -> None:
        self.fn, self.tree, self.paths, self.example, self._what = fn, tree, paths, example, what
        args, kwargs = example
        self.program = trace(fn, tree, args, kwargs, paths)
        leaves = jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor)
        self.parameters = {
            path: x for path, x in zip(paths, leaves, strict=True) if path is not None
        }

    def after(self, program: Program, fold: Folded, tolerance: float | None = None) -> Any:
        """The tree with new parameters, once it is known that the function stayed.

        Args:
          program: the program after the transform.
          fold: gives the parameters that change from all of them, in their dtypes.
          tolerance: see `check_unchanged`.

        Raises:
          FoldError: the function has changed.
        """
        args, kwargs = self.example
        inputs = self.program.flatten(self.tree, *args, **kwargs)
        check_unchanged(self.program, program, inputs, fold, tolerance=tolerance, what=self._what)
        return self._with(fold(self.parameters))

    def _with(self, new: Mapping[str, Any]) -> Any:
        """The tree with some parameters replaced, placed on devices as the old ones are."""
        leaves, treedef = jax.tree_util.tree_flatten(self.tree)
        for i, path in enumerate(self.paths):
            if path is not None and path in new:
                sharding = getattr(leaves[i], "sharding", None)
                leaves[i] = jax.device_put(new[path], sharding)
        return jax.tree_util.tree_unflatten(treedef, leaves)


def subject_of(
    model: Any, variables: Any, example: Example, what: str
) -> tuple[ModelAdapter, Subject]:
    """The subject of a public function that transforms a model.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      variables: its variables or parameters; None for NNX.
      example: positional and keyword arguments.
      what: the public function that is running, for errors.

    Raises:
      ValueError: the tree holds QTensors, or shapes instead of arrays.
    """
    if recipe_of(model) is None:
        model = quantize(model)
    adapter = describe(model)
    fn, tree = adapter.pure(variables)
    leaves = jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor)
    if any(map(is_qtensor, leaves)):
        raise ValueError(f"{what} takes the float tree; this one is quantized already")
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise ValueError(f"{what} computes new parameters: give arrays, not shapes")
    return adapter, Subject(fn, tree, adapter.param_paths(tree), example, what)


def with_pass(
    fn: Callable[..., Any], paths: Sequence[str | None], step: Pass, name: str
) -> Callable[..., Any]:
    """The function with a pass applied to each of its traces."""

    def transformed(tree: Any, *args: Any, **kwargs: Any) -> Any:
        program = trace(fn, tree, args, kwargs, paths)
        flat = program.flatten(tree, *args, **kwargs)
        after = step.run(program).program
        outs = jaxpr_as_fun(after.jaxpr)(*flat)
        return after.outputs.assemble(after.outputs.leaves(outs, flat))

    transformed.__name__ = transformed.__qualname__ = f"{name}_{step.name}"
    return transformed


def split_arguments(model: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The variables (None for NNX) and the model's own arguments."""
    kind = describe(model if recipe_of(model) is not None else quantize(model)).kind
    return (None, args) if kind == "nnx" else (args[0], args[1:])
