"""`share_activation_quant`: an activation is quantized once for all the products that read it.

After `insert_scales` every quantized product quantizes its own input. This pass takes that out:
one `quantize_activation` for each value and scheme in a body, whose codes and scale become operands
of the products (query, key and value; gate and up). The products keep the float input for their
derivative, which is the same as before (straight through); forward, XLA drops it. Results are
bit-equal to those before.

A value is the same one in another shape: behind a transpose, a reshape, a broadcast or a widening
that the quantization commutes with (`activation_moves`) it is quantized where the ways of its
users part, and the codes are moved in its place. A conversion or a move that each layer makes for
itself counts as one.

Inputs of a single product become explicit as well: one form for the passes behind (`fuse_siblings`,
`elide_roundtrips`, `lower_to_kernels`), for one equation more. What stays implicit, and why:

* a static scale that is not one number for the input (experts with scales of their own);
* products of two activations (attention): their scales are their own;
* static scales that are not one array. `ptq` says in the tree which ones are equal because they are
  of one input (`QTensor.input_group`), and `insert_scales` makes these one;
* what a body quantizes of a value of its own, that it carries or takes in slices. What it quantizes
  of an operand is quantized by its caller, once for all bodies and iterations (`body_operands` says
  for which bodies). Of a cond it is, if all its branches quantize it or somebody else does.

Runs on a quantized program, after `insert_scales`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives
from jaxquant.core.names import shown_name
from jaxquant.core.primitives.activation import scale_dtype
from jaxquant.core.primitives.weights import bind_leaves, unflatten
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.passes.activation_moves import (
    WHOLE,
    before,
    canonical,
    replay,
    representatives,
    varying_like,
)
from jaxquant.passes.body_operands import Wish, granted, merge_operands, scale_root, wishes
from jaxquant.passes.body_pass import BodyPass
from jaxquant.passes.edit_jaxpr import apply, is_var, new_eqn, replace_eqns
from jaxquant.passes.pass_manager import PassResult
from jaxquant.passes.program import Program

#: Products that quantize their input, unless they are given its codes.
QUANTIZING = frozenset(
    {
        primitives.quantized_conv_general_dilated_p,
        primitives.quantized_dot_general_p,
        primitives.quantized_ragged_dot_p,
    }
)


@dataclasses.dataclass(frozen=True)
class ShareActivationQuant(BodyPass):
    """One `quantize_activation` for each value and scheme; see the module's docstring."""

    name: ClassVar[str] = "share_activation_quant"

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`."""
        merged = merge_operands(program.jaxpr)
        if merged is not program.jaxpr:
            program = program.with_jaxpr(merged)
        return super().run(program)

    def edited(self, jaxpr: Any, notes: list[str]) -> Any:
        """See `BodyPass`."""
        return _share(jaxpr, notes)


class Node(NamedTuple):
    """A variable and how it is quantized."""

    var: Any
    act: ActQuant


class Request(NamedTuple):
    """What a product, or a body, wants of its input.

    Attributes:
      chain: from the input back to the value it is a form of, each with its scheme.
      dtype: dtype of the arithmetic.
      static_scale: variable of the given scale, or None.
    """

    chain: tuple[Node, ...]
    dtype: np.dtype
    static_scale: Any

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for requests that one quantization can serve."""
        return (*self.chain[-1], self.dtype, self.static_scale)


class User(NamedTuple):
    """Who makes a request.

    Attributes:
      eqn: number of the equation.
      wish: what of its bodies' wishes it is; None for a product.
      request: the request.
    """

    eqn: int
    wish: Wish | None
    request: Request


def _share(jaxpr: Any, notes: list[str]) -> Any:
    groups = _groups(jaxpr)
    if not groups:
        return jaxpr
    producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    places = {
        key: _where_ways_part([user.request.chain for user in users])
        for key, users in groups.items()
    }
    served: dict[int, list[User]] = {}
    for users in groups.values():
        for user in users:
            served.setdefault(user.eqn, []).append(user)
    eqns: list[Any] = []
    done: dict[Any, tuple[Any, Any]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        given = {
            user.wish: _codes(user.request, places[user.request.key], producers, done, eqns, eqn)
            for user in served.get(i, ())
        }
        if None in given:
            eqn = _given(eqn, *given[None])
        elif given:
            eqn = granted(eqn, given)  # type: ignore[arg-type]
        eqns.append(eqn)
    for key, users in groups.items():
        notes += _note(places[key], jaxpr, users)
    return replace_eqns(jaxpr, eqns)


def _groups(jaxpr: Any) -> dict[Any, list[User]]:
    """Who can be served by one quantization, in order.

    What only some branches of a cond quantize is left to them, unless it is quantized anyhow.
    """
    producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    first = representatives(jaxpr)
    groups: dict[Any, list[User]] = {}
    certain: set[Any] = set()
    for i, eqn in enumerate(jaxpr.eqns):
        found: list[tuple[Wish | None, Request | None, bool]] = [
            (None, _request(eqn, producers, first), True)
        ]
        for wish, always in wishes(eqn).items():
            found.append((wish, _request_of_body(eqn, wish, producers, first), always))
        for whose, request, always in found:
            if request is None:
                continue
            groups.setdefault(request.key, []).append(User(i, whose, request))
            if always:
                certain.add(request.key)
    return {key: users for key, users in groups.items() if key in certain}


def _request(eqn: Any, producers: dict[Any, Any], first: dict[Any, Any]) -> Request | None:
    if eqn.primitive not in QUANTIZING:
        return None
    x, act = eqn.invars[0], eqn.params["act"]
    if act is None or eqn.params["x_quantized"] or not is_var(x) or not x.aval.shape:
        return None
    w, _ = _operands(eqn)
    static_scale = w.input_scale if act.static else None
    if static_scale is not None:
        if static_scale.aval.size != 1:
            return None
        static_scale = scale_root(first.get(static_scale, static_scale), producers)
    act = canonical(act, x.aval.shape)
    return _behind(x, act, scale_dtype(x.aval, w.dtype), static_scale, producers, first)


def _request_of_body(
    eqn: Any, wish: Wish, producers: dict[Any, Any], first: dict[Any, Any]
) -> Request | None:
    x = eqn.invars[wish.position]
    static_scale = None if wish.scale is None else eqn.invars[wish.scale]
    if not is_var(x) or (static_scale is not None and not is_var(static_scale)):
        return None
    if static_scale is not None:
        static_scale = scale_root(first.get(static_scale, static_scale), producers)
    return _behind(x, wish.act, wish.dtype, static_scale, producers, first)


def _behind(
    x: Any,
    act: ActQuant,
    dtype: np.dtype,
    static_scale: Any,
    producers: dict[Any, Any],
    first: dict[Any, Any],
) -> Request:
    """The request for a variable, followed back to the value that it is a form of."""
    chain = [Node(first.get(x, x), act)]
    while (producer := producers.get(chain[-1].var)) is not None:
        earlier = before(producer, chain[-1].act, WHOLE, static_scale)
        source = producer.invars[0]
        if earlier is None or not is_var(source) or not source.aval.shape:
            break
        chain.append(Node(first.get(source, source), earlier))
    return Request(tuple(chain), dtype, static_scale)


def _where_ways_part(chains: Sequence[tuple[Node, ...]]) -> Node:
    """The node nearest to the products that is on the way of all of them."""
    common = None
    for nodes in zip(*(reversed(chain) for chain in chains), strict=False):
        if len(set(nodes)) > 1:
            break
        common = nodes[0]
    assert common is not None  # the chains of a group end in the same node
    return common


def _codes(
    request: Request,
    place: Node,
    producers: dict[Any, Any],
    done: dict[Any, tuple[Any, Any]],
    eqns: list[Any],
    user: Any,
) -> tuple[Any, Any]:
    """Variables of the codes and the scale of a product's input; adds equations for them."""
    chain = request.chain[: request.chain.index(place) + 1]
    for i, node in reversed(list(enumerate(chain))):
        if (node, request.key) in done:
            continue
        if node == place:
            new = _quantize(node, request, user)
            codes, scale = new[-1].outvars
        else:
            codes, scale = done[chain[i + 1], request.key]
            new, codes, scale = replay(producers[node.var], codes, scale, node.act)
        eqns += new
        done[node, request.key] = codes, scale
    return done[chain[0], request.key]


def _quantize(node: Node, request: Request, user: Any) -> list[Any]:
    operands, eqns = [node.var], []
    if request.static_scale is not None:
        ones = (1,) * len(node.var.aval.shape)
        params = {"new_sizes": ones, "dimensions": None, "sharding": None}
        eqns.append(apply(jp.reshape_p, [request.static_scale], params, like=user))
        new, scale = varying_like(eqns[0].outvars[0], node.var, user)
        eqns += new
        operands.append(scale)
    scheme: dict[str, Any] = {"act": node.act, "dtype": request.dtype}
    return [*eqns, apply(primitives.quantize_activation_p, operands, scheme, like=user)]


def _given(eqn: Any, codes: Any, scale: Any) -> Any:
    """The product with codes and scale as operands."""
    w, extras = _operands(eqn)
    w = bind_leaves(w)
    leaves, tree = jax.tree_util.tree_flatten(w if extras is None else (w, *extras))
    params = {**eqn.params, "tree": tree, "x_quantized": True}
    invars = [eqn.invars[0], codes, scale, *leaves]
    return new_eqn(invars, eqn.outvars, eqn.primitive, params, like=eqn)


def _operands(eqn: Any) -> tuple[QTensor, tuple[Any, ...] | None]:
    """The weight of a product that quantizes for itself, and what the product takes besides.

    The dot takes a weight only; the others have a tuple of operands.
    """
    operands = unflatten(eqn.params["tree"], eqn.invars[1:])
    return (operands[0], operands[1:]) if isinstance(operands, tuple) else (operands, None)


def _note(place: Node, jaxpr: Any, users: Sequence[User]) -> list[str]:
    if len(users) == 1 and users[0].wish is None:
        return []
    names = ", ".join(_name(jaxpr.eqns[user.eqn]) for user in users)
    aval, bodies = place.var.aval.str_short(), any(user.wish is not None for user in users)
    if len(users) == 1:
        return [f"{aval} is quantized before the body that reads it: {names}"]
    what = "products and bodies" if bodies else "products"
    return [f"{aval} is quantized once for {len(users)} {what}: {names}"]


def _name(eqn: Any) -> str:
    return shown_name(_compat.name_stack_names(eqn)) or _compat.source_line(eqn)
