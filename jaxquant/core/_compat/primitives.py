"""Primitives: those of JAX that have no public name, and what our own are made with."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax._src import core as _core
from jax._src import custom_derivatives as _custom_derivatives
from jax._src import dispatch as _dispatch
from jax._src import pjit as _pjit
from jax._src import shard_map as _shard_map
from jax._src.interpreters import ad as _ad
from jax._src.lax import lax as _lax
from jax.extend.core import primitives as jp

# One and the same primitive from jax 0.12 on.
call_primitives = tuple(dict.fromkeys((jp.closed_call_p, jp.call_p)))
shard_map_p = _shard_map.shard_map_p
ragged_dot_general_p = _lax.ragged_dot_general_p
optimization_barrier_p = _lax.optimization_barrier_p
pvary_p = _core.pvary_p
reshard_p = _pjit.reshard_p
split_p = _lax.split_p
stack_p = _lax.stack_p
unstack_p = _lax.unstack_p


def is_tracer(x: Any) -> bool:
    """True for a value that is being traced."""
    return isinstance(x, _core.Tracer)


def is_eager() -> bool:
    """True outside every trace: no jit, grad, vmap or shard_map is being traced."""
    return _core.trace_ctx.is_top_level()


def has_tangent(tangent: Any) -> bool:
    """True unless the tangent is a symbolic zero (or the float0 of an integer)."""
    if isinstance(tangent, (_ad.Zero, _custom_derivatives.SymbolicZero)):
        return False
    return getattr(tangent, "dtype", None) != jax.dtypes.float0


def make_primitive(name: str, *, multiple_results: bool = False) -> Any:
    """A new primitive that runs eagerly by compiling itself, as JAX's own do."""
    primitive = _core.Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    return primitive


def apply_primitive(primitive: Any, *args: Any, **params: Any) -> Any:
    """Runs a primitive eagerly by compiling it alone."""
    return _dispatch.apply_primitive(primitive, *args, **params)


def zero_tangent(value: Any) -> Any:
    """The symbolic zero tangent of a value."""
    return _ad.Zero(_core.typeof(value).to_tangent_aval())


def canonical_precision(precision: Any) -> Any:
    """A precision as ``dot_general_p`` holds it: None, a pair, or a dot algorithm."""
    return _lax.canonicalize_precision(precision)
