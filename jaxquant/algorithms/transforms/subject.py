"""A float model that is being transformed: its program, its parameters by path, and the way back.

What `smooth` and `rotate` share. Both change parameters, compare the function before and after on
an example, and give back what the user gave: variables, parameters, or a new NNX module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from jaxquant.core.qtensor import is_qtensor
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.marks import recipe_of
from jaxquant.passes.channel_graph import build_graph
from jaxquant.passes.fold_transforms import check_same
from jaxquant.passes.pass_manager import Pass
from jaxquant.passes.program import Program, trace


class Subject:
    """A model, its float parameters and an example call.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      variables: its variables or parameters; None for NNX.
      args: positional arguments of the example.
      kwargs: keyword arguments of the example.
      what: the public function that is running, for errors.

    Attributes:
      program: the float program of the example call.
      parameters: arrays by path.

    Raises:
      ValueError: the tree holds QTensors, or shapes instead of arrays.
    """

    def __init__(
        self, model: Any, variables: Any, args: Sequence[Any], kwargs: Mapping[str, Any], what: str
    ) -> None:
        if recipe_of(model) is None:
            model = quantize(model)
        self._adapter, self._what = describe(model), what
        self._fn, self._tree = self._adapter.pure(variables)
        leaves = jax.tree_util.tree_leaves(self._tree, is_leaf=is_qtensor)
        if any(map(is_qtensor, leaves)):
            raise ValueError(f"{what} takes the float tree; this one is quantized already")
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            raise ValueError(f"{what} computes new parameters: give arrays, not shapes")
        self._paths = self._adapter.param_paths(self._tree)
        self._args, self._kwargs = tuple(args), dict(kwargs)
        self.program = trace(self._fn, self._tree, args, kwargs, self._paths)
        self.parameters = {
            path: x for path, x in zip(self._paths, leaves, strict=True) if path is not None
        }

    def with_parameters(self, new: Mapping[str, Any]) -> Any:
        """The float tree with some parameters replaced, placed on devices as the old ones are."""
        leaves, treedef = jax.tree_util.tree_flatten(self._tree)
        for i, path in enumerate(self._paths):
            if path is not None and path in new:
                sharding = getattr(leaves[i], "sharding", None)
                leaves[i] = jax.device_put(new[path], sharding)
        return jax.tree_util.tree_unflatten(treedef, leaves)

    def check(self, program: Program, tree: Any, tolerance: float | None) -> float:
        """Compares the function before and after on the example.

        Args:
          program: the program after the transform.
          tree: the parameters after it.
          tolerance: as for `check_same`. When None, 1e-5 if the model computes in float32
            throughout, 0.05 if it uses a shorter type.

        Raises:
          FoldError: the function has changed.
        """
        if tolerance is None:
            short = any(
                v.is_float and jnp.finfo(v.dtype).eps > 1e-6
                for node in build_graph(self.program).nodes
                for v in node.values
            )
            tolerance = 0.05 if short else 1e-5
        before, after = (
            jax.jit(jaxpr_as_fun(p.jaxpr))(*p.flatten(t, *self._args, **self._kwargs))
            for p, t in ((self.program, self._tree), (program, tree))
        )
        return check_same(before, after, tolerance=tolerance, what=self._what)

    def result(self, tree: Any, step: Pass | None) -> Any:
        """What the user gets.

        Args:
          tree: the new parameters.
          step: a pass that the function needs as well, or None.

        Returns:
          The variables, parameters or module; with ``step`` the pair of a function
          ``fn(tree, *args, **kwargs)`` and the tree.
        """
        if step is None:
            return self._adapter.with_tree(tree)
        return _with_pass(self._fn, self._paths, step, self._adapter.name), tree


def _with_pass(
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
