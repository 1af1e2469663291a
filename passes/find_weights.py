"""`find_weights`: which parameter meets which operation, and what happens to each of its axes.

Abstract interpretation of the float jaxpr. Every parameter starts as itself; operations that only
move elements are followed (`axes`), through calls, loops and branches, to the product, lookup or
other operation that uses the values. The axes that get scales follow from that use, never from a
name or a rank. Called by explain and ptq, before `assign_recipe`. Nothing is executed, so a model
of any size costs only the walk over its equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxquant.core import _compat
from jaxquant.core.structure import Unstructured
from jaxquant.passes import axes
from jaxquant.passes import weight_moves as weight_moves  # enters its rules
from jaxquant.passes import weight_products as weight_products  # enters its rules
from jaxquant.passes.follow import MOVES, STRUCTURE, Followed, Step, Values
from jaxquant.passes.forwarding import forwarded_inputs
from jaxquant.passes.interpreter import Site
from jaxquant.passes.op_kinds import describe, mark_attends
from jaxquant.passes.op_use import OpUse, axis_uses
from jaxquant.passes.program import Program


def find_weights(program: Program) -> tuple[OpUse, ...]:
    """All uses of the program's float parameters, and all products of two activations.

    Args:
      program: the float program (see `jaxquant.passes.program.trace`).

    Returns:
      One `OpUse` for each parameter and operation, in the order of the program; an operation in
      the body of a scan is listed once. A parameter that is never used, or only handed back
      unchanged, is not listed, nor is one that is not floating point.
    """
    walker = _Walker(program)
    jaxpr, _ = _compat.open_jaxpr(program.jaxpr)
    args: Values = [
        Followed(var.aval.shape, (axes.whole(i, var.aval.shape),)) if _follows(path, var) else None
        for i, (path, var) in enumerate(zip(program.paths, jaxpr.invars, strict=True))
    ]
    outs = walker.run(jaxpr, args, (), ())
    for out, source in zip(outs, forwarded_inputs(jaxpr), strict=True):
        if out is not None and source is None:
            walker.end(out, "is returned by the function")
    return mark_attends(walker.uses)


def _follows(path: str | None, var: Any) -> bool:
    return path is not None and jnp.issubdtype(var.aval.dtype, jnp.floating)


class _Walker:
    """Walks jaxprs with a `Followed` in the place of what comes from parameters, else None."""

    def __init__(self, program: Program) -> None:
        self.uses: list[OpUse] = []
        self._paths = program.paths
        self._avals = [v.aval for v in program.jaxpr.jaxpr.invars]
        self._lookups: dict[tuple[Site, int], OpUse] = {}
        self._ended: set[tuple[Site, int, str]] = set()

    def run(
        self,
        jaxpr: Any,
        args: Sequence[Followed | None],
        site: Site,
        names: tuple[str, ...],
        backward: bool = False,
    ) -> Values:
        env = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Followed | None:
            return None if isinstance(atom, Literal) else env.get(atom)

        for index, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom) for atom in eqn.invars]
            rule = STRUCTURE.get(eqn.primitive)
            if rule is None and not any(ins):
                continue
            mark = _compat.backward_mark(eqn)
            step = Step(
                self, eqn, (*site, index), names + _compat.name_stack_names(eqn),
                backward if mark is None else mark,
            )  # fmt: skip
            try:
                rule = rule or MOVES.get(eqn.primitive)
                if rule is None:
                    raise Unstructured(f"is used by {eqn.primitive}")
                outs = rule(step, ins)
            except Unstructured as why:
                step.end(ins, str(why))
                continue
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def end(self, value: Followed, detail: str, step: Step | None = None) -> None:
        """Lists another use, or the lookup that the value is a result of."""
        site = step.site if step else ()
        for origin in value.origins:
            if origin.gathered is not None:
                lookup = self._lookups.pop((origin.gathered, origin.param), None)
                self.uses.extend([lookup] if lookup else [])
            elif (site, origin.param, detail) not in self._ended:
                self._ended.add((site, origin.param, detail))
                path, aval = self._paths[origin.param], self._avals[origin.param]
                module, cls, kind = describe("other", step.names if step else (), path)
                self.uses.append(
                    OpUse(
                        site, "other", kind, module, cls, path,
                        weight=jax.ShapeDtypeStruct(value.shape, aval.dtype),
                        source=_compat.source_line(step.eqn) if step else "", detail=detail,
                    )
                )  # fmt: skip

    def remember_lookup(self, step: Step, value: Followed, roles: Sequence[axes.Role]) -> None:
        for origin, use in zip(value.origins, self._uses(step, "gather", value, roles, 0)):
            self._lookups[step.site, origin.param] = use

    def product(
        self,
        step: Step,
        primitive: str,
        value: Followed | None,
        roles: Sequence[axes.Role],
        side: int,
    ) -> None:
        if value is None:
            module, cls, kind = describe(primitive, step.names, None, step.eqn)
            common = self._common(step, primitive, side)
            self.uses.append(OpUse(kind=kind, module=module, cls=cls, param=None, **common))
        else:
            self.uses.extend(self._uses(step, primitive, value, roles, side))

    def _uses(
        self, step: Step, primitive: str, value: Followed, roles: Sequence[axes.Role], side: int
    ) -> list[OpUse]:
        """One use for each parameter that is part of the operand."""
        common = self._common(step, primitive, side)
        paths = [self._paths[o.param] for o in value.origins]
        found = []
        for origin, path in zip(value.origins, paths):
            module, cls, kind = describe(primitive, step.names, path, step.eqn)
            joined = tuple(dict.fromkeys(p for p in paths if p is not None and p != path))
            uses = axis_uses(origin, self._avals[origin.param].shape, roles.__getitem__)
            found.append(
                OpUse(
                    kind=kind, module=module, cls=cls, param=path, joined=joined, axes=uses,
                    gathered=origin.gathered is not None,
                    weight=_plain(step.eqn.invars[side].aval), **common,
                )
            )  # fmt: skip
        return found

    def _common(self, step: Step, primitive: str, side: int) -> dict[str, Any]:
        params = step.params
        numbers = params.get("dimension_numbers", params.get("ragged_dot_dimension_numbers"))
        return {
            "site": step.site,
            "primitive": primitive,
            "weight_side": "lhs" if side == 0 else "rhs",
            "x": _plain(step.eqn.invars[1 - side].aval),
            "out": _plain(step.eqn.outvars[0].aval),
            "dimension_numbers": numbers,
            "source": _compat.source_line(step.eqn),
            "backward": step.backward,
        }


def _plain(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
