"""Editing equations in place: what passes over the quantized program are written with.

A pass that keeps the types of a program does not evaluate and trace it again; it replaces some
equations of some bodies. `edit` applies a function to every body, from the inside out, and returns
the objects it was given where nothing changed, so a second run of an idempotent pass can be seen by
`is`. The rest are the few helpers such a function needs. Called by `share_activation_quant`,
`fuse_siblings`, `fuse_epilogues`, `elide_roundtrips` and `lower_to_kernels`; of quantization it
knows only that `fused_epilogue` has a body.

Everything that is not named in a replacement stays: source lines, name stacks, contexts, effects,
debug info, donation, shardings. The derivative rules of custom_jvp and custom_vjp are functions,
not jaxprs, and are not edited; nor are the bodies of Pallas kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, new_jaxpr_eqn
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives

Edit = Callable[[Any, tuple[Any, ...]], Any]

#: Primitives whose bodies are part of the program.
CONTROL_FLOW = frozenset(
    {
        jp.cond_p,
        jp.custom_jvp_call_p,
        jp.custom_vjp_call_p,
        jp.jit_p,
        jp.remat_p,
        jp.scan_p,
        jp.while_p,
        _compat.shard_map_p,
        *_compat.call_primitives,
        primitives.fused_epilogue_p,
    }
)


def edit(closed: Any, fn: Edit) -> Any:
    """Applies `fn` to a closed jaxpr and to every body inside it, innermost first.

    Args:
      closed: the closed jaxpr.
      fn: `fn(jaxpr, outer)` gets an open jaxpr whose bodies were edited already and the equations
        around it, outermost first, as they were before; it returns the jaxpr itself, or another
        one with the same inputs and the same types of outputs. Of `outer` it may use which
        primitives there are: a body that several equations share under the same primitives is
        edited once, and stays shared.

    Returns:
      The edited closed jaxpr; `closed` itself if `fn` changed nothing.

    Raises:
      ValueError: `fn` changed the type of an input or an output.
    """
    done: dict[Any, Any] = {}

    def shared(value: Any, outer: tuple[Any, ...]) -> Any:
        key = (id(value), tuple(eqn.primitive for eqn in outer))
        if key not in done:
            done[key] = _apply(value, lambda jaxpr: body(jaxpr, outer))
        return done[key]

    def body(jaxpr: Any, outer: tuple[Any, ...]) -> Any:
        eqns = [equation(eqn, outer) for eqn in jaxpr.eqns]
        inner = replace_eqns(jaxpr, eqns)
        edited = fn(inner, outer)
        _check_types(inner, edited, outer)
        return edited

    def equation(eqn: Any, outer: tuple[Any, ...]) -> Any:
        if eqn.primitive not in CONTROL_FLOW:
            return eqn
        return with_bodies(eqn, lambda value: shared(value, (*outer, eqn)))

    return shared(closed, ())


def bodies(eqn: Any) -> Iterator[Any]:
    """The open jaxprs in the parameters of an equation; none for a Pallas kernel."""
    if eqn.primitive not in CONTROL_FLOW:
        return
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if _is_jaxpr(part):
                yield _compat.open_jaxpr(part)[0]


def all_bodies(jaxpr: Any) -> Iterator[Any]:
    """The jaxpr, open, and every body inside it; one that is shared comes once for each use."""
    inner, _ = _compat.open_jaxpr(jaxpr)
    yield inner
    for eqn in inner.eqns:
        for sub in bodies(eqn):
            yield from all_bodies(sub)


def with_bodies(eqn: Any, fn: Callable[[Any], Any]) -> Any:
    """The equation with `fn` applied to each jaxpr, closed or open, in its parameters.

    Returns:
      A new equation; `eqn` itself if every result is the jaxpr that was given.
    """

    def change(value: Any) -> Any:
        if isinstance(value, (tuple, list)) and any(map(_is_jaxpr, value)):
            parts = [change(part) for part in value]
            same = all(new is old for new, old in zip(parts, value, strict=True))
            return value if same else type(value)(parts)
        return fn(value) if _is_jaxpr(value) else value

    params = {name: change(value) for name, value in eqn.params.items()}
    if all(params[name] is value for name, value in eqn.params.items()):
        return eqn
    return eqn.replace(params=params)


def new_var(aval: Any) -> Any:
    """A new variable of the given type."""
    return Var(aval)


def new_eqn(
    invars: Sequence[Any],
    outvars: Sequence[Any],
    primitive: Primitive,
    params: dict[str, Any],
    like: Any,
) -> Any:
    """An equation with the source line, name stack, context and effects of `like`."""
    return new_jaxpr_eqn(
        list(invars), list(outvars), primitive, params, like.effects, like.source_info, like.ctx
    )


def apply(primitive: Primitive, atoms: Sequence[Any], params: dict[str, Any], like: Any) -> Any:
    """An equation of an effect-free primitive with new output variables, typed by its own rule.

    Args:
      primitive: what to apply.
      atoms: its operands, variables or literals.
      params: its parameters.
      like: the equation whose source line, name stack and context the new one gets.
    """
    avals = _compat.abstract_eval(primitive, [a.aval for a in atoms], params, like)
    outvars = [new_var(aval) for aval in avals]
    return new_jaxpr_eqn(list(atoms), outvars, primitive, params, set(), like.source_info, like.ctx)


def replace_eqns(jaxpr: Any, eqns: Sequence[Any]) -> Any:
    """The open jaxpr with other equations; itself if they are the same objects."""
    if len(eqns) == len(jaxpr.eqns) and all(
        new is old for new, old in zip(eqns, jaxpr.eqns, strict=True)
    ):
        return jaxpr
    return jaxpr.replace(eqns=list(eqns))


def drop_unused(jaxpr: Any, candidates: frozenset[Primitive]) -> Any:
    """Without the equations of `candidates` that have no effect and whose results nobody reads."""
    used = {atom for atom in jaxpr.outvars if is_var(atom)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        read = eqn.effects or any(var in used for var in eqn.outvars)
        if eqn.primitive in candidates and not read:
            continue
        used.update(atom for atom in eqn.invars if is_var(atom))
        kept.append(eqn)
    return replace_eqns(jaxpr, kept[::-1])


def is_var(atom: Any) -> bool:
    """Whether an operand is a variable and not a literal."""
    return not isinstance(atom, Literal)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def _apply(value: Any, fn: Callable[[Any], Any]) -> Any:
    """`fn` on the open jaxpr of a closed or an open one."""
    inner, _ = _compat.open_jaxpr(value)
    edited = fn(inner)
    if edited is inner:
        return value
    return edited if value is inner else value.replace(jaxpr=edited)


def _check_types(before: Any, after: Any, outer: tuple[JaxprEqn, ...]) -> None:
    if after is before:
        return
    where = f"the body of {outer[-1].primitive}" if outer else "the program"
    if list(after.invars) != list(before.invars):
        raise ValueError(f"an edit of {where} changed its inputs")
    for index, (old, new) in enumerate(zip(before.outvars, after.outvars, strict=True)):
        if not _same_type(old.aval, new.aval):
            raise ValueError(
                f"an edit of {where} changed output {index} from {old.aval} to {new.aval}"
            )


def _same_type(old: Any, new: Any) -> bool:
    return bool(old == new or old.strip_weak_type() == new.strip_weak_type())
