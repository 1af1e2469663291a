"""`InsertFakeQuant`: a float program becomes one that trains for being quantized (QAT).

Every weight that the recipe quantizes is replaced by ``values * scale``: the values of the codes it
would have, with straight-through gradients (`jaxquant.core.fake_quant`). These travel as QTensors
do, so that all that `rewrite` decides is decided alike, and meet their operations as floats; inputs
are fake-quantized as the recipe's activation schemes say. The scales are those of `ptq`, of the
live weight; or they are learned, as extra inputs of the program. Called by `jaxquant.qat`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxquant.core import _compat
from jaxquant.core.absmax import RangeFn, absmax_range
from jaxquant.core.blocks import map_blocks
from jaxquant.core.fake_quant import Grid, fake_codes, scale_gradient
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import WeightScheme
from jaxquant.passes.assign_recipe import Assignment, ParamPlan
from jaxquant.passes.fake_products import FakeQuantizer
from jaxquant.passes.forwarding import forwarded_inputs
from jaxquant.passes.interpreter import Weight, is_weight
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Input, Program

Steps = Mapping[str, Mapping[str, Any]]
"""Scales that are given, by path: "weight" with one a block, "input" with one a layer, or both."""


def absmax_only(scheme: WeightScheme) -> RangeFn:
    """The range of a scheme, for callers that know no search for ranges."""
    if scheme.range != "absmax":
        raise ValueError(f"range={scheme.range!r}: give range_of= to InsertFakeQuant")
    return absmax_range


@dataclasses.dataclass(frozen=True, eq=False)
class InsertFakeQuant(Pass):
    """Fake-quantizes weights and activations.

    The result has the program's inputs and, behind them, the leaves of ``steps``; its ``flatten``
    takes ``(tree, steps)`` in the place of ``tree`` where there are any.

    Attributes:
      steps: scales that are inputs, arrays or their shapes; gradients go to them. A static
        activation scheme needs its "input" here.
      range_of: the range that a weight's scheme names.
    """

    steps: Steps = dataclasses.field(default_factory=dict)
    range_of: Callable[[WeightScheme], RangeFn] = absmax_only

    name: ClassVar[str] = "insert_fake_quant"
    requires: ClassVar[frozenset[str]] = frozenset({"float", "assignment"})
    retraces: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`.

        Raises:
          ValueError: a static activation scheme without its scale, or a step that fits no weight.
        """
        assignment: Assignment = program.facts["assignment"]
        plans = {plan.path: plan for plan in assignment.quantized}
        check_steps(self.steps, plans)
        jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
        given, tree = jax.tree_util.tree_flatten(_plain(self.steps))
        quantizer = FakeQuantizer(op_rules=assignment.op_rules)
        sources = forwarded_inputs(jaxpr)
        count = len(program.inputs)

        def evaluate(*leaves: Any) -> list[Any]:
            steps = jax.tree_util.tree_unflatten(tree, leaves[count:])
            inputs = [
                Weight(self._fake(x, plans[path], steps.get(path, {})), path)
                if path is not None and path in plans
                else x
                for x, path in zip(leaves[:count], program.paths, strict=True)
            ]
            outs = quantizer.run(jaxpr, consts, inputs)
            # A parameter that is handed through stays the float it is.
            outs = [o if s is None else leaves[s] for o, s in zip(outs, sources, strict=True)]
            return [quantizer.returned(o) if is_weight(o) else o for o in outs]

        avals = [v.aval for v in jaxpr.invars] + [_aval(x) for x in given]
        after = program.with_jaxpr(
            jax.make_jaxpr(evaluate)(*avals),
            inputs=(*program.inputs, *_described(self.steps)),
            flatten=_flatten(program, tree) if given else program.flatten,
        )
        notes = [f"{p.path}: {p.scheme}, input {p.act or 'float'}" for p in plans.values()]
        return PassResult(after, tuple(notes))

    def _fake(self, w: Any, plan: ParamPlan, steps: Mapping[str, Any]) -> QTensor:
        """A QTensor whose codes are the float values of codes."""
        assert plan.scheme is not None and plan.block_shape is not None
        qtype, step = get_qtype(plan.scheme.qtype), steps.get("weight")
        if step is None:
            grid = Grid(qtype, plan.scheme.symmetric)
            scale, zero_point = self._scales(w, plan)
        else:
            grid, zero_point = Grid(qtype), None
            size = math.prod(plan.block_shape)
            step = scale_gradient(step, 1 / math.sqrt(size * qtype.qmax))
            scale = usable_step(step, plan.scheme)
        compute = jnp.promote_types(jnp.float32, w.dtype)
        scale = scale.astype(compute)
        if qtype.step == 2 and zero_point is None:
            values, scale = _without_zero(grid, w, scale)
        else:
            values = fake_codes(grid, w, scale, zero_point)
        return QTensor(
            values, scale, input_scale=_input_scale(plan, steps.get("input")), qtype=qtype,
            dtype=jnp.dtype(w.dtype), act=plan.act, act_ops=plan.act_ops,
        )  # fmt: skip

    def _scales(self, w: Any, plan: ParamPlan) -> tuple[jax.Array, jax.Array | None]:
        """The scales and zero points that `ptq` would choose; constants of the gradient."""
        scheme, blocks = plan.scheme, plan.block_shape
        assert scheme is not None and blocks is not None
        found = quantize_array(
            jax.lax.stop_gradient(w), scheme.qtype, blocks, symmetric=scheme.symmetric,
            range_fn=self.range_of(scheme), scale_dtype=scheme.scale_dtype,
            double_quant=scheme.double_quant, stack_axes=plan.stack_axes, name=plan.path,
        )  # fmt: skip
        scale = found.scale.dequantize() if isinstance(found.scale, QTensor) else found.scale
        return scale, found.zero_point


def _without_zero(grid: Grid, w: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values and scales on a grid without a zero: a block of zeros has the scale 0, and stays one.

    Its values are made 0 and its scale 1, so that it can be trained away from zero.
    """
    empty = scale == 0
    scale = jnp.where(empty, 1, scale)
    values = fake_codes(grid, w, scale)
    zeros = map_blocks(lambda v, e: jnp.where(e, v, 0), values, empty)
    return values - jax.lax.stop_gradient(zeros), scale


def check_steps(steps: Steps, plans: Mapping[str, ParamPlan]) -> None:
    """Refuses steps that fit no weight, and static schemes that have none.

    Raises:
      ValueError: names the parameter.
    """
    for path, own in steps.items():
        plan = plans.get(path)
        if plan is None or plan.scheme is None or plan.block_shape is None:
            known = ", ".join(plans) or "none"
            raise ValueError(f"steps: {path!r} is not quantized; quantized are: {known}")
        if not own or set(own) - {"weight", "input"}:
            raise ValueError(f"steps[{path!r}] has {sorted(own)}; it takes 'weight' and 'input'")
        if "weight" in own:
            require_learnable(plan)
            shape = tuple(n // b for n, b in zip(plan.shape, plan.block_shape, strict=True))
            if tuple(own["weight"].shape) != shape:
                raise ValueError(
                    f"steps[{path!r}]['weight'] has shape {tuple(own['weight'].shape)}, not {shape}"
                )
        if "input" in own and (plan.act is None or plan.act.mode != "static"):
            raise ValueError(f"steps[{path!r}]['input']: the input of this weight is not static")
    for path, plan in plans.items():
        static = plan.act is not None and plan.act.mode == "static"
        if static and "input" not in steps.get(path, {}):
            raise ValueError(
                f"{path!r}: its activation scheme is static ({plan.act}); calibrate first: "
                "steps = qmodel.init_steps(..., calibration=batches), and give steps=steps"
            )


def require_learnable(plan: ParamPlan) -> None:
    """Refuses schemes whose scales cannot be learned.

    Raises:
      ValueError: the scales are prescribed, quantized themselves, or come with zero points.
    """
    assert plan.scheme is not None
    qtype = get_qtype(plan.scheme.qtype)
    prescribed = qtype.scale_dtype is not None or qtype.scale_qtype is not None
    if prescribed or plan.scheme.double_quant or not plan.scheme.symmetric:
        raise ValueError(
            f"{plan.path!r}: a step size is learned for symmetric schemes with plain scales, "
            f"not for {plan.scheme}"
        )


def usable_step(step: jax.Array, scheme: WeightScheme) -> jax.Array:
    """A trained step as a scale: of the scheme's dtype, and positive."""
    return jnp.maximum(step.astype(scheme.scale_dtype), jnp.finfo(scheme.scale_dtype).tiny)


def _input_scale(plan: ParamPlan, step: Any) -> Any:
    """The static scale of the input, with LSQ's gradient scale: one over the number of features."""
    if step is None:
        return None
    features = max(1, math.prod(axis.contracted for axis in plan.uses[0].axes))
    limit = get_qtype(plan.act.qtype).qmax if plan.act is not None else 1.0
    return scale_gradient(step, 1 / math.sqrt(features * limit))


def _plain(steps: Steps) -> dict[str, dict[str, Any]]:
    return {path: dict(own) for path, own in steps.items()}


def _aval(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)


def _described(steps: Steps) -> list[Input]:
    parts = {"weight": "scale", "input": "input_scale"}
    return [
        Input(path, parts[name]) for path in sorted(steps) for name in sorted(steps[path])
    ]  # in the order of the leaves of a dict


def _flatten(program: Program, tree: Any) -> Callable[..., list[Any]]:
    def flatten(pair: Any, *args: Any, **kwargs: Any) -> list[Any]:
        variables, steps = pair
        leaves, other = jax.tree_util.tree_flatten(_plain(steps))
        if other != tree:
            raise ValueError(f"the steps differ in structure from those traced: {other}")
        return [*program.flatten(variables, *args, **kwargs), *leaves]

    return flatten
