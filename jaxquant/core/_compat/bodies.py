"""Equations with bodies: what their parameters say of operands, and the users' derivative rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import core as _core
from jax._src.interpreters import ad as _ad
from jax._src.interpreters import partial_eval as _pe
from jax._src.sharding_impls import UNSPECIFIED as _UNSPECIFIED
from jax.extend.core import primitives as jp

from jaxquant.core._compat.equations import open_jaxpr


def scan_arity(eqn: Any) -> tuple[int, int]:
    """``(num_consts, num_carry)`` of a scan equation; jax 0.12 keeps them in ``ft_in``."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_with_more_consts(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of a scan with ``count`` more constants, behind those it has."""
    if "num_consts" in params:
        return {**params, "num_consts": params["num_consts"] + count}
    from jax._src import flattree

    consts, carry, xs = params["ft_in"].unpack()
    return {**params, "ft_in": flattree.pack((flattree.nones(len(consts) + count), carry, xs))}


def jit_with_more_operands(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of a jitted call with ``count`` more operands, of which nothing is said."""
    more = {
        "in_shardings": (_UNSPECIFIED,) * count,
        "in_layouts": (None,) * count,
        "donated_invars": (False,) * count,
    }
    return {**params, **{name: (*params[name], *values) for name, values in more.items()}}


def custom_with_more_consts(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Parameters of a custom_jvp or custom_vjp call with ``count`` more constants in front.

    They are as those that JAX hoists out of the function: the user's rules do not get them.
    """
    more = {**params, "num_consts": params["num_consts"] + count}
    if "out_trees" in params:
        # It also numbers the operands that the forward rule hands on as residuals.
        def out_trees() -> tuple[Any, Any, list[int | None]]:
            out, residuals, handed_on = params["out_trees"]()
            return out, residuals, [None if i is None else i + count for i in handed_on]

        more["out_trees"] = out_trees
    return more


def type_in_shard_map(eqn: Any, spec: Any, aval: Any) -> Any:
    """The type that an operand of a shard_map equation has in its body."""
    p = eqn.params
    return _core.shard_aval(p["mesh"], p["newly_manual_axes"], p["check_vma"], spec, aval)


def bind_remat(fn: Callable[..., Any], args: Any, *, params: dict[str, Any]) -> Any:
    """``jax.checkpoint`` of ``fn(*args)`` that also keeps ``differentiated`` and ``prevent_cse``.

    Args:
      fn: function of ``args``, pytrees in and out.
      args: its arguments.
      params: the parameters of the remat equation that this one stands for.
    """
    leaves, tree = jax.tree_util.tree_flatten(args)
    closed, out_shape = jax.make_jaxpr(
        lambda *flat: fn(*jax.tree_util.tree_unflatten(tree, flat)), return_shape=True
    )(*leaves)
    inner, consts = open_jaxpr(closed)
    inner = _pe.convert_constvars_jaxpr(inner)
    flat_out = jp.remat_p.bind(*consts, *leaves, **{**params, "jaxpr": inner})
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out_shape), flat_out)


def custom_rule(eqn: Any) -> tuple[Any, ...]:
    """The user's functions of a custom_jvp (fun, jvp) or custom_vjp (fun, fwd, bwd) equation.

    Each has ``call_wrapped``, over flat arrays.
    """
    return tuple(eqn.primitive.get_bind_params(eqn.params)["subfuns"])


def run_fwd(eqn: Any, fwd: Any, primals: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Runs a custom_vjp's forward rule; every primal counts as differentiated.

    The constants that JAX hoisted out of the function cannot be differentiated.

    Returns:
      ``(outputs, residuals)``, flat.
    """
    num_consts = eqn.params["num_consts"]
    pairs = [x for i, p in enumerate(primals) for x in (p, i >= num_consts)]
    out = list(fwd.call_wrapped(*pairs))
    _, res_tree, forwarded = eqn.params["out_trees"]()
    num_res = res_tree.num_leaves - sum(f is not None for f in forwarded)
    new = iter(out[:num_res])
    residuals = [next(new) if f is None else primals[f] for f in forwarded]
    return out[num_res:], residuals


def call_bwd(bwd: Any, residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """Runs a custom_vjp's backward rule; None where the cotangent is a symbolic zero."""
    out = bwd.call_wrapped(*residuals, *cotangents)
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], list):
        out = out[0]  # jax 0.12 returns (cotangents, logs)
    return [None if isinstance(ct, _ad.Zero) else ct for ct in out]
