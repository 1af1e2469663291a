"""`jq.qat`: a model that trains for being quantized.

A thin shell over `jaxquant.passes.insert_fake_quant`: each call traces the float model, lets the
recipe decide, inserts fake quantization and evaluates that under whatever trace is open. There is
no context to enter and no cache of its own: `jax.jit`, `grad`, `vmap` and `nnx.jit` around it see
an ordinary function of its arguments, and the model itself stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxquant.algorithms import static_ranges
from jaxquant.algorithms.calibrate import Call, batch_calls, chain
from jaxquant.algorithms.planning import assign
from jaxquant.algorithms.rtn import range_function
from jaxquant.algorithms.transforms.apply import refuse_transforms
from jaxquant.core.qtensor import QTensor, is_qtensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.recipe import Recipe, get_recipe
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.adapter import ModelAdapter
from jaxquant.frontends.marks import recipe_of
from jaxquant.frontends.scopes import nnx_scopes
from jaxquant.passes.assign_recipe import Assignment, ParamPlan
from jaxquant.passes.insert_fake_quant import InsertFakeQuant, Steps, require_learnable
from jaxquant.passes.pass_manager import PassManager
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.program import Program


def qat(model: Any, recipe: str | Recipe | None = None) -> FakeQuantized:
    """The model with fake quantization: for training float leaves to be quantized afterwards.

    ``qmodel.apply(variables, x)`` (Linen), ``qmodel(params, x)`` (functions) and ``qmodel(x)``
    (NNX) compute what the model will after ``jq.ptq`` with the same recipe, to rounding, and have
    straight-through gradients: 1 for a weight that its grid can reach, 0 for one that is clipped.
    Scales follow the live weights, as ``ptq`` would choose them, unless steps are given
    (`FakeQuantized.init_steps`). The leaves stay float; then ``jq.ptq(model, variables, x)`` gives
    what was trained.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      recipe: a preset's name or a `Recipe`. When None, the decorator's; without one, "w8a8".

    Returns:
      The wrapped model. Call it inside `jax.jit`: each call traces the model.
    """
    chosen = None if recipe is None else get_recipe(recipe)
    if recipe_of(model) is None:
        model = quantize(chosen)(model)
    adapter = describe(model)
    return FakeQuantized(adapter, chosen or adapter.recipe)


class FakeQuantized:
    """A model with fake quantization; made by `qat`.

    Attributes:
      model: the model, decorated.
      recipe: the recipe it is trained for.
    """

    def __init__(self, adapter: ModelAdapter, recipe: Recipe) -> None:
        self._adapter, self.recipe = adapter, recipe
        self.model = adapter.model

    def apply(self, variables: Any, *args: Any, steps: Steps | None = None, **kwargs: Any) -> Any:
        """As the Linen module's ``apply``, with ``rngs=``, ``mutable=``, ``method=`` and the rest.

        Args:
          variables: the float variables.
          *args: the model's arguments.
          steps: scales from `init_steps`, or None.
          **kwargs: keyword arguments.

        Raises:
          TypeError: the model is no Linen module.
          ValueError: the variables are quantized already, or a static activation scheme lacks its
            scale.
        """
        if self._adapter.kind != "linen":
            raise TypeError(f"{self._adapter.name} is no Linen module: call the wrapped model")
        fn, tree = self._adapter.pure(variables)
        return self._run(fn, tree, self._adapter.param_paths(tree), args, kwargs, steps)

    def __call__(self, *args: Any, steps: Steps | None = None, **kwargs: Any) -> Any:
        """As a call of the function or of the NNX module, whose state is updated alike.

        Args:
          *args: the function's parameters and other arguments; the module's arguments.
          steps: scales from `init_steps`, or None.
          **kwargs: keyword arguments.

        Raises:
          TypeError: the model is a Linen module.
          ValueError: see `apply`.
        """
        if self._adapter.kind == "linen":
            raise TypeError(f"{self._adapter.name} is a Linen module: use qmodel.apply(variables)")
        if self._adapter.kind == "nnx":
            return self._call_nnx(args, kwargs, steps)
        fn, tree = self._adapter.pure(args[0])
        return self._run(fn, tree, self._adapter.param_paths(tree), args[1:], kwargs, steps)

    def _call_nnx(self, args: Any, kwargs: Any, steps: Steps | None) -> Any:
        graphdef, state = nnx.split(self.model)

        def fn(tree: Any, *args: Any, **kwargs: Any) -> Any:
            copy = nnx.merge(graphdef, tree, copy=True)
            with nnx_scopes(copy):
                out = copy(*args, **kwargs)
            return out, nnx.state(copy, nnx.Not(nnx.Param))

        paths = self._adapter.param_paths(state)
        out, changed = self._run(fn, state, paths, args, kwargs, steps)
        nnx.update(self.model, changed)
        return out

    def _run(
        self,
        fn: Callable[..., Any],
        tree: Any,
        paths: Sequence[str | None],
        args: Any,
        kwargs: Any,
        steps: Steps | None,
    ) -> Any:
        given = {} if steps is None else steps
        program, _ = self._assign(fn, tree, paths, (args, kwargs))
        fake = InsertFakeQuant(given, range_function)
        program = PassManager([fake], title=f"qat {self._adapter.name}").run(program)
        inputs = program.flatten((tree, given) if given else tree, *args, **kwargs)
        arrays = evaluate(program, inputs)
        return program.outputs.assemble(program.outputs.leaves(arrays, inputs))

    def _assign(
        self, fn: Any, tree: Any, paths: Sequence[str | None], example: Any
    ) -> tuple[Program, Assignment]:
        if any(map(is_qtensor, jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor))):
            raise ValueError(
                "qat trains float leaves, and this tree is quantized already: call the model itself"
            )
        refuse_transforms(self.recipe, "qat")
        return assign(fn, tree, paths, example, self.recipe)

    def init_steps(
        self,
        *args: Any,
        learned: bool = True,
        calibration: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, jax.Array]]:
        """Scales as parameters of their own (learned step sizes, LSQ), and static input scales.

        They start as those that ``ptq`` would choose. Train them beside the variables, with the
        gradient for ``steps``; LSQ's gradient scale, 1/sqrt(n * qmax), is applied already. Give
        them to ``jq.ptq(model, variables, x, steps=steps)`` in the end.

        Args:
          *args: as for `jaxquant.ptq`: Linen: the variables; function: its parameters; NNX:
            nothing; then the model's own arguments as the example.
          learned: True for a step for each block of each weight. False for only the input scales
            that the recipe's static activation schemes need.
          calibration: batches, for static activation schemes.
          **kwargs: keyword arguments of the model.

        Returns:
          ``{path: {"weight": one a block, "input": one a layer}}``, float32, either or both.

        Raises:
          ValueError: a scheme whose scales cannot be learned (asymmetric, or with scales that are
            prescribed or quantized themselves), or a static scheme without calibration.
        """
        given, rest = ((), args) if self._adapter.kind == "nnx" else (args[:1], args[1:])
        fn, tree = self._adapter.pure(*given)
        paths = self._adapter.param_paths(tree)
        calls = batch_calls(calibration, kwargs)
        first: Call | None = next(calls, None)
        example = (rest, kwargs) if rest or first is None else first
        _, assignment = self._assign(fn, tree, paths, example)
        inputs = static_ranges.input_scales(fn, tree, paths, chain(first, calls), assignment)
        leaves = dict(zip(paths, jax.tree_util.tree_leaves(tree), strict=True))
        steps: dict[str, dict[str, jax.Array]] = {}
        for plan in assignment.quantized:
            own = {"weight": _weight_step(leaves[plan.path], plan)} if learned else {}
            if plan.path in inputs:
                own["input"] = inputs[plan.path]
            if own:
                steps[plan.path] = own
        return steps


def _weight_step(w: jax.Array, plan: ParamPlan) -> jax.Array:
    require_learnable(plan)
    assert plan.scheme is not None and plan.block_shape is not None
    found = quantize_array(
        w, plan.scheme.qtype, plan.block_shape, range_fn=range_function(plan.scheme),
        stack_axes=plan.stack_axes, name=plan.path,
    )  # fmt: skip
    assert not isinstance(found.scale, QTensor)
    return found.scale
