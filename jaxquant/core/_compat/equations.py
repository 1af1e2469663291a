"""Jaxprs and their equations: taken apart, typed, bound again, and where the user made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax._src import config as _config
from jax._src import core as _core
from jax._src import mesh as _mesh
from jax._src import source_info_util as _source_info
from jax._src.state.types import AbstractRef as _AbstractRef


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """``(jaxpr, consts)`` of a closed jaxpr, or of an open one that has no constants."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def jaxpr_of_equations(jaxpr: Any, eqns: Sequence[Any]) -> Any:
    """An open jaxpr of some equations of ``jaxpr``: for checking them alone.

    It puts out what the equations do, except references, which no jaxpr may return.
    """
    made = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, _core.DropVar)]
    outputs = [v for v in made if not isinstance(v.aval, _AbstractRef)]
    read = dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, _core.Var))
    own = set(made)
    inputs = [v for v in read if v not in own]
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    info = jaxpr.debug_info.with_unknown_names()
    return _core.Jaxpr((), inputs, outputs, list(eqns), effects, info)


def abstract_eval(primitive: Any, avals: Sequence[Any], params: Any, eqn: Any) -> list[Any]:
    """Types of the outputs of ``primitive`` for an equation to be put beside ``eqn``.

    Inside shard_map the types say over which axes values vary, but rules of JAX's own keep that
    only if they are told to, and look up the names of axes that tracing would have bound.
    """
    varying = any(aval.mat.varying for aval in avals)
    with eqn.ctx.manager, _config._check_vma(varying):
        mesh = _mesh.get_abstract_mesh()
        with _core.extend_axis_env_nd([(name, mesh.shape[name]) for name in mesh.manual_axes]):
            out, _ = primitive.abstract_eval(*avals, **params)
    return list(out) if primitive.multiple_results else [out]


def name_stack_names(eqn: Any) -> tuple[str, ...]:
    """Scope names of an equation, outermost first, without the marks of jvp, vmap, transpose."""
    stack = eqn.source_info.name_stack.stack
    return tuple(s.name for s in stack if isinstance(s, _source_info.Scope))


def without_names(eqn: Any) -> Any:
    """The equation with its source line and without its name stack."""
    return eqn.replace(source_info=eqn.source_info.replace(name_stack=_source_info.NameStack()))


def backward_mark(eqn: Any) -> bool | None:
    """Whether an equation is part of a gradient's backward pass; None where it has no mark.

    Reverse mode marks its equations, or the call around them. What remat computes once more
    inside of the backward pass is the forward function.
    """
    for entry in reversed(eqn.source_info.name_stack.stack):
        if entry.name == "rematted_computation":
            return False
        if entry.name == "transpose" and isinstance(entry, _source_info.Transform):
            return True
    return None


def source_line(eqn: Any) -> str:
    """``file:line (function)`` of the user's line that made the equation."""
    return str(_source_info.summarize(eqn.source_info))


class equation_context:  # noqa: N801 (used as a function; a class costs half a generator)
    """Rebinding inside keeps the equation's traceback, name stack, mesh and metadata."""

    __slots__ = ("_user", "_settings")

    def __init__(self, eqn: Any) -> None:
        info, outer = eqn.source_info, _source_info.current_name_stack()
        names = outer + info.name_stack if outer.stack else info.name_stack
        self._user = _source_info.user_context(info.traceback, name_stack=names)
        self._settings = eqn.ctx.manager

    def __enter__(self) -> None:
        self._user.__enter__()
        self._settings.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._settings.__exit__(*error)
        self._user.__exit__(*error)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Applies the equation's own primitive and parameters to ``args``; always a list."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
