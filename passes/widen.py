"""A float program in wider floats: the same operations, rounded less.

Two programs that are equal in exact arithmetic are told from two that are not by running both in
float32 at full precision, whatever they compute in themselves. Called by the numeric check of
transforms (`jaxquant.algorithms.transforms.unchanged`); nothing that is quantized or served goes
through here.

Calls are inlined, loops and branches rebuilt with wider state. What cannot be widened (a kernel, a
callback, a `shard_map`, an operation on bits) runs on its own dtypes, and its results are widened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes.control_flow import choose
from jaxquant.passes.edit_jaxpr import CONTROL_FLOW
from jaxquant.passes.program import Program

_Widen = Callable[[Any, list[Any]], list[Any]]
_DTYPES = ("new_dtype", "preferred_element_type", "dtype")


def wide_dtype(dtype: Any) -> Any:
    """Float32 for a shorter float; any other dtype as it is."""
    short = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype("float32") if short else dtype


def wide_array(x: Any) -> Any:
    """An array of a short float in float32; any other value as it is."""
    wide = wide_dtype(jnp.result_type(x))
    return x if wide == jnp.result_type(x) else jnp.asarray(x).astype(wide)


def widened(program: Program) -> Any:
    """The closed jaxpr of a float program, with floats of at least 32 bits all through.

    Products are of the highest precision.
    """
    jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
    inputs = [v.aval.update(dtype=wide_dtype(v.aval.dtype)) for v in jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _run(jaxpr, consts, args))(*inputs)


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return wide_array(atom.val) if isinstance(atom, Literal) else env[atom]

    env.update(zip(jaxpr.constvars, map(wide_array, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive, _plain)
        with _compat.equation_context(eqn):
            outs = rule(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, map(wide_array, outs), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _plain(eqn: Any, ins: list[Any]) -> list[Any]:
    """An operation of JAX's own without a body."""
    if eqn.primitive not in _WIDENS or any(hasattr(p, "eqns") for p in eqn.params.values()):
        return _narrow(eqn, ins)
    params = dict(eqn.params)
    for name in _DTYPES:
        if params.get(name) is not None:
            params[name] = wide_dtype(params[name])
    if "precision" in params:
        highest = jax.lax.Precision.HIGHEST
        params["precision"] = _compat.canonical_precision(highest)
    return _compat.bind(eqn.replace(params=params), ins)


def _narrow(eqn: Any, ins: list[Any]) -> list[Any]:
    """An operation on its own dtypes."""
    own = [
        x if (dtype := atom.aval.dtype) == jnp.result_type(x) else x.astype(dtype)
        for x, atom in zip(ins, eqn.invars, strict=True)
    ]
    return _compat.bind(eqn, own)


def _rounding(eqn: Any, ins: list[Any]) -> list[Any]:
    return ins


def _call(eqn: Any, ins: list[Any]) -> list[Any]:
    name = next(n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in eqn.params)
    return _run(*_compat.open_jaxpr(eqn.params[name]), ins)


def _scan(eqn: Any, ins: list[Any]) -> list[Any]:
    params = eqn.params
    body, body_consts = _compat.open_jaxpr(params["jaxpr"])
    num_consts, num_carry = _compat.scan_arity(eqn)
    consts, carry = ins[:num_consts], ins[num_consts : num_consts + num_carry]

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = _run(body, body_consts, [*consts, *state, *x])
        return outs[:num_carry], outs[num_carry:]

    state, ys = jax.lax.scan(
        step, carry, ins[num_consts + num_carry :], params["length"], params["reverse"]
    )
    return [*state, *ys]


def _while(eqn: Any, ins: list[Any]) -> list[Any]:
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond, cond_own = _compat.open_jaxpr(params["cond_jaxpr"])
    if cond.outvars[0].aval.shape:
        return _narrow(eqn, ins)  # one condition an example: `control_flow.finished_stay`
    body, body_own = _compat.open_jaxpr(params["body_jaxpr"])
    cond_consts, body_consts = ins[:num_cond], ins[num_cond : num_cond + num_body]
    state = jax.lax.while_loop(
        lambda state: _run(cond, cond_own, [*cond_consts, *state])[0],
        lambda state: _run(body, body_own, [*body_consts, *state]),
        ins[num_cond + num_body :],
    )
    return list(state)


def _cond(eqn: Any, ins: list[Any]) -> list[Any]:
    index, *operands = ins

    def branch(closed: Any) -> Callable[..., list[Any]]:
        jaxpr, consts = _compat.open_jaxpr(closed)
        return lambda *args: _run(jaxpr, consts, args)

    branches = [branch(closed) for closed in eqn.params["branches"]]
    return list(choose(eqn, index, branches, operands))


_RULES: dict[Primitive, _Widen] = {
    jp.scan_p: _scan,
    jp.while_p: _while,
    jp.cond_p: _cond,
    jp.reduce_precision_p: _rounding,
    **dict.fromkeys(CONTROL_FLOW - {jp.scan_p, jp.while_p, jp.cond_p, _compat.shard_map_p}, _call),
}
_OWN = frozenset(p for p in vars(jp).values() if isinstance(p, Primitive))
_WIDENS = (_OWN | {_compat.ragged_dot_general_p, _compat.split_p, _compat.stack_p}) - {
    jp.bitcast_convert_type_p,
}
