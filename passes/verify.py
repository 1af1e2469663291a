"""The verifier: is a program well-formed, and did a pass keep what must survive it?

Called by the `PassManager` after each pass. A full check is `jax.extend.core.check_jaxpr`, which
costs a sixth of a trace; the usual one looks at scoping, at the types of equations that were put
together by hand, and at what no pass may drop: effects, sharding constraints, checkpoint names,
donated buffers, outputs.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, JaxprTypeError, Literal, Var, check_jaxpr
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes.edit_jaxpr import CONTROL_FLOW, all_bodies
from jaxquant.passes.program import Program


class VerificationError(ValueError):
    """A program is ill-formed, or a pass lost something of it."""


class Verifier:
    """Checks programs one after the other; remembers which equations were found well typed.

    Args:
      full: check all types of every program, not only those of equations that are new.
    """

    def __init__(self, *, full: bool) -> None:
        self._full = full

    @staticmethod
    def equations(jaxpr: Any) -> int:
        """Number of equations, those of inner jaxprs included."""
        return sum(len(body.eqns) for body in all_bodies(jaxpr))

    def check(self, program: Program) -> None:
        """Checks the program's own invariants, the scoping of variables, and types if ``full``.

        Raises:
          VerificationError: with the equation and the user's source line where there is one.
        """
        jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
        if len(program.inputs) != len(jaxpr.invars):
            raise VerificationError(
                f"the program describes {len(program.inputs)} inputs, its jaxpr has "
                f"{len(jaxpr.invars)}"
            )
        if len(consts) != len(jaxpr.constvars):
            raise VerificationError(
                f"{len(consts)} constants for {len(jaxpr.constvars)} constant variables"
            )
        _check_scopes(jaxpr)
        if self._full:
            _check_types(jaxpr, jaxpr.eqns)

    def check_change(
        self,
        before: Program,
        after: Program,
        *,
        outputs: bool,
        retraced: bool,
    ) -> None:
        """Checks that nothing was lost between two programs.

        Args:
          before: the program a pass was given.
          after: what it returned.
          outputs: whether the outputs must have kept their types.
          retraced: whether new equations were made by tracing, and so need no check of types.
            Weights may then have become several arrays: a constraint on a weight is one on each
            of its parts, with other specs, and the parts are not donated.

        Raises:
          VerificationError: with the equation and the user's source line where there is one.
        """
        old, _ = _compat.open_jaxpr(before.jaxpr)
        new, _ = _compat.open_jaxpr(after.jaxpr)
        if not retraced and not self._full:
            known = {id(eqn) for eqn in old.eqns}
            _check_types(new, _different([eqn for eqn in new.eqns if id(eqn) not in known]))
        if outputs:
            _check_outputs(old, new)
        kept, found = (survivors(j, retraced=retraced) for j in (old, new))
        lost = kept - found
        if lost:
            items = ", ".join(f"{n} x {what}" for what, n in sorted(lost.items(), key=str))
            raise VerificationError(f"lost: {items}")


def survivors(jaxpr: Any, *, retraced: bool = False) -> collections.Counter[str]:
    """What no pass may drop, counted: effects, constraints, checkpoint names, donations.

    Args:
      jaxpr: the jaxpr.
      retraced: see `Verifier.check_change`.
    """
    found: collections.Counter[str] = collections.Counter()
    for eqn in (eqn for body in all_bodies(jaxpr) for eqn in body.eqns):
        if eqn.primitive is jp.name_p:
            found[f"checkpoint_name {eqn.params['name']!r}"] += 1
        elif eqn.primitive is jp.sharding_constraint_p:
            spec = "" if retraced else f" {eqn.params['sharding']}"
            found[f"sharding constraint{spec}"] += 1
        elif eqn.primitive is jp.jit_p and not retraced:
            found["donated buffer"] += sum(eqn.params["donated_invars"])
        if eqn.effects and eqn.primitive not in CONTROL_FLOW:
            found[f"effect of {eqn.primitive}"] += 1
    return +found


def _check_scopes(jaxpr: Any) -> None:
    bound = {*jaxpr.constvars, *jaxpr.invars}
    for eqn in jaxpr.eqns:
        for var in eqn.invars:
            if not isinstance(var, Literal) and var not in bound:
                raise VerificationError(f"a variable is read before it is bound{_at(eqn)}")
        for var in eqn.outvars:
            if var in bound:
                raise VerificationError(f"a variable is bound twice{_at(eqn)}")
            bound.add(var)
    if any(isinstance(v, Var) and v not in bound for v in jaxpr.outvars):
        raise VerificationError("an output is never bound")


def _different(eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """One of each kind: the layers of a model repeat a few equations on the same types."""
    found: dict[Any, JaxprEqn] = {}
    for eqn in eqns:
        types = (tuple(v.aval for v in eqn.invars), tuple(v.aval for v in eqn.outvars))
        key: Any = (eqn.primitive, *types, tuple(eqn.params.items()))
        try:
            found.setdefault(key, eqn)
        except TypeError:  # a parameter that cannot be hashed
            found[id(eqn)] = eqn
    return list(found.values())


def _check_types(jaxpr: Any, eqns: Sequence[JaxprEqn]) -> None:
    """Checks equations of a jaxpr together; where something is wrong, finds the one it is in.

    jax 0.10 cannot check a custom derivative with an effect inside, which it can run: such an
    equation passes, the others are checked one by one.
    """
    error = _type_error(jaxpr, eqns)
    if error is None:
        return
    for eqn in eqns:
        own = _type_error(jaxpr, [eqn])
        if own is not None and not isinstance(own, NotImplementedError):
            first = next((line for line in str(own).splitlines() if line.strip()), repr(own))
            raise VerificationError(f"ill-typed: {first.strip()}{_at(eqn)}") from own
    if not isinstance(error, NotImplementedError):
        raise VerificationError(f"ill-typed: {error}") from error


def _type_error(jaxpr: Any, eqns: Sequence[JaxprEqn]) -> Exception | None:
    try:
        check_jaxpr(_compat.jaxpr_of_equations(jaxpr, eqns))
    except (
        JaxprTypeError,
        TypeError,
        ValueError,
        AssertionError,
        NotImplementedError,
    ) as error:
        return error
    return None


def _check_outputs(old: Any, new: Any) -> None:
    before, after = ([_type(v.aval) for v in j.outvars] for j in (old, new))
    if before != after:
        changed = [
            f"output {i}: {b} became {a}"
            for i, (b, a) in enumerate(zip(before, after))
            if b != a
        ]
        if len(before) != len(after):
            changed.append(f"{len(before)} outputs became {len(after)}")
        raise VerificationError("; ".join(changed))


def _type(aval: Any) -> str:
    return aval.str_short() if hasattr(aval, "str_short") else str(aval)


def _at(eqn: JaxprEqn) -> str:
    shown = str(eqn).split("\n", 1)[0][:200]
    source = _compat.source_line(eqn)
    return f", in the equation\n  {shown}" + (f"\nfrom {source}" if source else "")
