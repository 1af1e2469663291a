"""`fuse_epilogues`: what follows a product elementwise goes into one equation with it.

silu(gate) times up; a bias and a residual that are added. On TPU a kernel does these on the sums
while they are on the chip, so that the product itself is not written out and read again. The
equation is a `fused_epilogue`, whose body has the very equations that it stands for: where no
kernel takes them together, under a gradient, and on every other platform, they are what runs.

Taken is what `jaxquant.core.primitives.epilogues.find` knows, if nothing else reads what lies
between; the last equation's place is where all of it is computed, so that operands that come late
(a residual, a bias that is cast) are there.

Values are bit-equal where no kernel takes it. Gradients are, too, unless the product's input has
readers between the product and the last equation: the same terms are then added in another order.

Not fused: what a product of three and more siblings is followed by (their results are needed at
different places); other activations than silu; what lies behind a reshape or transpose of the
product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

from jax.extend.core import ClosedJaxpr, Literal

from jaxquant.core import _compat, primitives
from jaxquant.core.names import shown_name
from jaxquant.core.primitives.epilogues import Epilogue, find
from jaxquant.passes.edit_jaxpr import edit, new_eqn, new_var, replace_eqns
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Program


@dataclasses.dataclass(frozen=True)
class FuseEpilogues(Pass):
    """One `fused_epilogue` for a product and what follows it; see the module's docstring."""

    name: ClassVar[str] = "fuse_epilogues"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`."""
        notes: list[str] = []
        made: dict[Hashable, Any] = {}

        def fuse(jaxpr: Any, outer: tuple[Any, ...]) -> Any:
            if outer and outer[-1].primitive is primitives.fused_epilogue_p:
                return jaxpr
            return _fuse(jaxpr, made, notes)

        closed = edit(program.jaxpr, fuse)
        if closed is program.jaxpr:
            return PassResult(program)
        return PassResult(program.with_jaxpr(closed), tuple(notes))


def _fuse(jaxpr: Any, made: dict[Hashable, Any], notes: list[str]) -> Any:
    found = find(jaxpr)
    if not found:
        return jaxpr
    ends = {epilogue.members[-1]: epilogue for epilogue in found}
    inside = {index for epilogue in found for index in epilogue.members}
    out = []
    for index, eqn in enumerate(jaxpr.eqns):
        if index in ends:
            out.append(_fused(jaxpr, ends[index], made))
            notes.append(f"{ends[index]} in one equation with its product: {_name(out[-1])}")
        elif index not in inside:
            out.append(eqn)
    return replace_eqns(jaxpr, out)


def _fused(jaxpr: Any, epilogue: Epilogue, made: dict[Hashable, Any]) -> Any:
    eqns = [jaxpr.eqns[i] for i in epilogue.members]
    own = {var for eqn in eqns for var in eqn.outvars}
    read = [atom for eqn in eqns for atom in eqn.invars if not isinstance(atom, Literal)]
    operands = [var for var in dict.fromkeys(read) if var not in own]
    key = _key(eqns, operands)
    if key not in made:  # layers repeat a few; what is equal is lowered once
        made[key] = _body(jaxpr, eqns, operands)
    params = {"jaxpr": made[key]}
    product = jaxpr.eqns[epilogue.product]
    return new_eqn(operands, eqns[-1].outvars, primitives.fused_epilogue_p, params, like=product)


def _body(jaxpr: Any, eqns: Sequence[Any], operands: Sequence[Any]) -> ClosedJaxpr:
    """The equations with variables of their own, and no names: those of the place will do."""
    own = {var: new_var(var.aval) for var in operands}
    inner = []
    for eqn in eqns:
        invars = [atom if isinstance(atom, Literal) else own[atom] for atom in eqn.invars]
        own.update({var: new_var(var.aval) for var in eqn.outvars})
        outvars = [own[var] for var in eqn.outvars]
        inner.append(_compat.without_names(eqn).replace(invars=invars, outvars=outvars))
    body = jaxpr.replace(
        constvars=[],
        invars=[own[var] for var in operands],
        outvars=[own[var] for var in eqns[-1].outvars],
        eqns=inner,
        effects=frozenset(),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return ClosedJaxpr(body, ())


def _key(eqns: Sequence[Any], operands: Sequence[Any]) -> Hashable:
    """What two bodies are equal by; their own identity where a parameter cannot be hashed."""
    numbers = {var: i for i, var in enumerate(operands)}
    parts: list[Any] = [tuple(var.aval for var in operands)]
    for eqn in eqns:
        ins = tuple(
            (atom.aval, str(atom.val)) if isinstance(atom, Literal) else numbers[atom]
            for atom in eqn.invars
        )
        numbers.update({var: len(numbers) + i for i, var in enumerate(eqn.outvars)})
        outs = tuple(var.aval for var in eqn.outvars)
        parts.append((eqn.primitive, ins, outs, tuple(eqn.params.items()), eqn.ctx))
    key = tuple(parts)
    try:
        hash(key)
    except TypeError:
        return tuple(map(id, eqns))
    return key


def _name(eqn: Any) -> str:
    return shown_name(_compat.name_stack_names(eqn)) or _compat.source_line(eqn)
