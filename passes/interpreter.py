"""The loop that evaluates a jaxpr while some of its values are weights and not plain arrays.

`Interpreter` walks a jaxpr the user's function was traced to. Arrays flow through unchanged
equations; a `Weight` (a `QTensor`, or a float array whose way is followed) goes to a rule that
its primitive has in a registry. Equations with sub-jaxprs are rebuilt by the rules of
`control_flow`, so remat stays remat and a scan stays a scan. Used by `rewrite` (quantized
execution) and `observers` (calibration). The loop knows no primitive by name and must not grow:
a new primitive is a rule.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.extend.core import Literal, Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.core.structure import Unstructured
from jaxquant.passes.registry import register as register

Site = tuple[int, ...]

#: Operations of one value that move, cast or mark its elements and compute nothing.
ELEMENT_MOVES = (
    jp.convert_element_type_p, jp.transpose_p, jp.reshape_p, jp.broadcast_in_dim_p, jp.squeeze_p,
    jp.slice_p, jp.dynamic_slice_p, jp.rev_p, jp.sharding_constraint_p, jp.copy_p, jp.name_p,
    jp.stop_gradient_p, _compat.reshard_p, _compat.pvary_p,
)  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value"],
    meta_fields=["path", "levels", "gathered"],
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A value that comes from a parameter through structural operations only.

    Attributes:
      value: the `QTensor`, or the float array, in its present shape.
      path: the parameter it comes from.
      levels: sites of the scans that slice it, outermost first.
      gathered: whether rows were picked by an array of indices (an embedding lookup).
    """

    value: Any
    path: str
    levels: tuple[Site, ...] = ()
    gathered: bool = False

    def replace(self, **changes: Any) -> Weight:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def is_weight(x: Any) -> bool:
    """Whether a value of the environment is a `Weight`."""
    return isinstance(x, Weight)


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What a rule may know of its equation. Frozen: rules evolve without new signatures.

    Attributes:
      interpreter: the running interpreter.
      eqn: the equation.
      index: its number in its jaxpr.
      outer: context of the equation around it, if any.
      sub: number of the sub-jaxpr of ``outer`` that it is in.
    """

    interpreter: Interpreter
    eqn: Any
    index: int
    outer: Context | None = None
    sub: int = 0

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the equation."""
        return self.eqn.params

    @property
    def site(self) -> Site:
        """Its place: equation index, then sub-jaxpr number and equation index at each nesting."""
        return (self.index,) if self.outer is None else (*self.outer.site, self.sub, self.index)

    @property
    def names(self) -> tuple[str, ...]:
        """Its scope names, outermost first, those of enclosing calls included."""
        own = _compat.name_stack_names(self.eqn)
        return own if self.outer is None else self.outer.names + own

    @property
    def backward(self) -> bool:
        """Whether it is part of a gradient that the function takes itself."""
        mark = _compat.backward_mark(self.eqn)
        if mark is None:
            return self.outer is not None and self.outer.backward
        return mark

    @property
    def source(self) -> str:
        """The user's source line: the equation's own, or that of the call around it."""
        own = _compat.source_line(self.eqn)
        return own if own or self.outer is None else self.outer.source

    def run(self, sub: int, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluates sub-jaxpr number ``sub`` of this equation with the same interpreter."""
        inner, consts = _compat.open_jaxpr(jaxpr)
        return self.interpreter.run(inner, consts, args, outer=self, sub=sub)

    def float(self, value: Any, reason: str) -> Any:
        """The array that a weight stands for; reported, or an error where that is strict."""
        return self.interpreter.to_float(self, value, reason) if is_weight(value) else value


class Rule(Protocol):
    """Evaluates one equation at least one of whose inputs is a `Weight`.

    Returns the list of outputs. Raises `Unstructured` with a reason where it cannot; then the
    weights are turned to arrays, which is reported, and the equation is applied as it stands.
    """

    def __call__(self, ctx: Context, ins: list[Any], /) -> list[Any]:
        """Outputs of the equation of ``ctx`` for these inputs."""
        ...


class Interpreter:
    """Evaluates jaxprs by rules. Subclasses say what a weight becomes where no rule applies."""

    #: Rules for equations that have a weight among their inputs.
    rules: Mapping[Primitive, Rule]
    #: Rules for equations with sub-jaxprs.
    control_rules: Mapping[Primitive, Rule]

    #: Whether `visit` wants to see the equations that have no weight among their inputs.
    visits = False

    def visit(self, ctx: Context, ins: list[Any]) -> list[Any] | None:
        """The outputs of an equation without weights, or None to apply it unchanged."""
        return None

    def to_float(self, ctx: Context, weight: Weight, reason: str) -> Any:
        """The plain array a weight stands for."""
        raise NotImplementedError

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        args: Sequence[Any],
        *,
        outer: Context | None = None,
        sub: int = 0,
    ) -> list[Any]:
        """Evaluates an open jaxpr; inputs and outputs are arrays or `Weight`s.

        Args:
          jaxpr: the open jaxpr.
          consts: values of its constants.
          args: values of its inputs.
          outer: context of the equation whose sub-jaxpr it is; None at the top.
          sub: number of the sub-jaxpr in that equation.
        """
        env: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for index, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom) for atom in eqn.invars]
            with _compat.equation_context(eqn):
                if self.visits or any(map(is_weight, ins)):
                    outs = self._evaluate(Context(self, eqn, index, outer, sub), ins)
                else:
                    outs = _compat.bind(eqn, ins)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _evaluate(self, ctx: Context, ins: list[Any]) -> list[Any]:
        primitive = ctx.eqn.primitive
        control = self.control_rules.get(primitive)
        if control is not None:
            return control(ctx, ins)
        if not any(map(is_weight, ins)):
            outs = self.visit(ctx, ins)
            return _compat.bind(ctx.eqn, ins) if outs is None else outs
        rule = self.rules.get(primitive)
        try:
            if rule is None:
                raise Unstructured(f"{primitive} has no quantized form")
            return rule(ctx, ins)
        except Unstructured as why:
            return _compat.bind(ctx.eqn, [ctx.float(x, str(why)) for x in ins])
