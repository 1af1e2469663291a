"""A program as one flat graph of values and operations, calls and loops opened.

`channel_flow` asks of a value who made it and who reads it, wherever in the nest of jit, remat,
custom derivatives, scans, loops and branches they are. Calls vanish; a scan's body appears once,
its values standing for all iterations; where values enter or leave a loop there is an operation of
this module's own. Called by `channel_flow` and `rotation_flow`; nothing is executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal as JaxLiteral
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes.interpreter import Site
from jaxquant.passes.program import Program

# Operations that jaxprs do not write down. EQUAL: all its values are the same. EACH: what a scan
# hands to, or collects from, its iterations: the outer value's first axis numbers them. REPEAT: a
# constant of a scan, seen by every iteration. CARRY: initial, incoming, outgoing and final state.
EQUAL, EACH, REPEAT, CARRY = "equal", "each", "repeat", "carry"


@dataclasses.dataclass(eq=False)
class Value:
    """One array of the program.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      loops: lengths of the scans it is inside of, outermost first.
      path: parameter path, for an input of the program that is a parameter.
      literal: the number, for a literal.
      is_input: whether it is an input of the program that is no parameter.
      is_result: whether the program returns it.
      params: paths of the parameters it is made of.
      from_input: whether it is made of inputs that are no parameters too.
      producer: the operation that made it, or None.
      users: the operations that read it.
      explicit: "" for a value of the program. A value that stands behind an explicit operation
        which is yet to be inserted may do as it likes ("free"), or must stay as it is ("fixed").
    """

    shape: tuple[int, ...]
    dtype: Any
    loops: tuple[int, ...] = ()
    path: str | None = None
    literal: Any = None
    is_input: bool = False
    is_result: bool = False
    params: frozenset[str] = frozenset()
    from_input: bool = False
    producer: Node | None = None
    users: list[Node] = dataclasses.field(default_factory=list)
    explicit: Literal["", "free", "fixed"] = ""

    @property
    def is_float(self) -> bool:
        """Whether it holds floating point numbers."""
        return bool(jnp.issubdtype(self.dtype, jnp.floating))

    @property
    def depth(self) -> int:
        """How many scans it is inside of: leading axes of its labels."""
        return len(self.loops)


@dataclasses.dataclass(eq=False)
class Node:
    """One operation.

    Attributes:
      kind: its primitive, or one of this module's own kinds.
      ins: what it reads.
      outs: what it makes.
      params: the equation's parameters.
      site: place of its equation (see `interpreter.Context`).
      names: scope names, outermost first.
      source: the user's source line.
    """

    kind: Primitive | str
    ins: list[Value]
    outs: list[Value]
    params: dict[str, Any]
    site: Site
    names: tuple[str, ...]
    source: str

    @property
    def values(self) -> Iterator[Value]:
        """What it reads and makes."""
        yield from self.ins
        yield from self.outs


@dataclasses.dataclass(frozen=True)
class Graph:
    """All operations of a program in its order, its parameters by path, inputs and results."""

    nodes: tuple[Node, ...]
    params: dict[str, Value]
    inputs: tuple[Value, ...]
    results: tuple[Value, ...]


def build_graph(program: Program) -> Graph:
    """The flat graph of a program."""
    builder = _Builder()
    jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
    args = []
    for path, var in zip(program.paths, jaxpr.invars, strict=True):
        value = Value(var.aval.shape, var.aval.dtype, path=path, is_input=path is None)
        value.params = frozenset() if path is None else frozenset([path])
        value.from_input = path is None
        args.append(value)
    results = builder.run(jaxpr, consts, args, (), (), "")
    for out in results:
        out.is_result = True
    params = {v.path: v for v in args if v.path is not None}
    return Graph(tuple(builder.nodes), params, tuple(args), tuple(results))


class _Builder:
    """Walks jaxprs with a `Value` for each variable."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        args: Sequence[Value],
        site: Site,
        names: tuple[str, ...],
        source: str,
        loops: tuple[int, ...] = (),
    ) -> list[Value]:
        env = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            literal = const if np.ndim(const) == 0 else None
            env[var] = Value(var.aval.shape, var.aval.dtype, loops, literal=literal)

        def read(atom: Any) -> Value:
            if isinstance(atom, JaxLiteral):
                aval: Any = atom.aval
                return Value(aval.shape, aval.dtype, loops, literal=atom.val)
            return env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            place = _Place(
                self, eqn, (*site, index), names + _compat.name_stack_names(eqn),
                _compat.source_line(eqn) or source, loops,
            )  # fmt: skip
            ins = [read(atom) for atom in eqn.invars]
            outs = _OPEN.get(eqn.primitive, _operation)(place, ins)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


@dataclasses.dataclass(frozen=True)
class _Place:
    """An equation, where it is, and how to enter its sub-jaxprs and make operations there."""

    builder: _Builder
    eqn: Any
    site: Site
    names: tuple[str, ...]
    source: str
    loops: tuple[int, ...]

    def enter(
        self, sub: int, jaxpr: Any, args: Sequence[Value], loops: tuple[int, ...] | None = None
    ) -> list[Value]:
        inner, consts = _compat.open_jaxpr(jaxpr)
        loops = self.loops if loops is None else loops
        site = (*self.site, sub)
        return self.builder.run(inner, consts, args, site, self.names, self.source, loops)

    def new(self, aval: Any, sources: Sequence[Value], loops: tuple[int, ...]) -> Value:
        return Value(
            aval.shape,
            aval.dtype,
            loops,
            params=frozenset().union(*(v.params for v in sources)),
            from_input=any(v.from_input for v in sources),
        )

    def node(self, kind: Primitive | str, ins: Sequence[Value], outs: Sequence[Value]) -> None:
        node = Node(
            kind, list(ins), list(outs), self.eqn.params, self.site, self.names, self.source
        )
        self.builder.nodes.append(node)
        for value in dict.fromkeys(node.ins):
            value.users.append(node)
        for value in node.outs:
            value.producer = node

    def link(
        self, kind: str, sources: Sequence[Value], aval: Any, loops: tuple[int, ...]
    ) -> Value:
        """A new value that one of this module's own operations makes."""
        out = self.new(aval, sources, loops)
        self.node(kind, sources, [out])
        return out


def _operation(place: _Place, ins: list[Value]) -> list[Value]:
    outs = [place.new(v.aval, ins, place.loops) for v in place.eqn.outvars]
    place.node(place.eqn.primitive, ins, outs)
    return outs


def _call(place: _Place, ins: list[Value]) -> list[Value]:
    params = place.eqn.params
    return place.enter(0, params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"], ins)


def _scan(place: _Place, ins: list[Value]) -> list[Value]:
    body, _ = _compat.open_jaxpr(place.eqn.params["jaxpr"])
    num_consts, num_carry = _compat.scan_arity(place.eqn)
    loops = (*place.loops, place.eqn.params["length"])
    inner = [v.aval for v in body.invars]
    args = []
    for i, (value, aval) in enumerate(zip(ins, inner, strict=True)):
        if i < num_consts:
            args.append(place.link(REPEAT, [value], aval, loops))
        elif i < num_consts + num_carry:
            args.append(place.new(aval, ins, loops))
        else:
            args.append(place.link(EACH, [value], aval, loops))
    results = place.enter(0, place.eqn.params["jaxpr"], args, loops)
    outs = []
    for i, (result, var) in enumerate(zip(results, place.eqn.outvars, strict=True)):
        if i < num_carry:
            start, incoming = ins[num_consts + i], args[num_consts + i]
            final = place.new(var.aval, ins, place.loops)
            place.node(CARRY, [start, result], [incoming, final])
            outs.append(final)
        else:
            outs.append(place.link(EACH, [result], var.aval, place.loops))
    return outs


def _while(place: _Place, ins: list[Value]) -> list[Value]:
    params = place.eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    start = ins[num_cond + num_body :]
    state = [place.new(v.aval, ins, place.loops) for v in place.eqn.outvars]
    place.enter(0, params["cond_jaxpr"], [*ins[:num_cond], *state])
    results = place.enter(
        1, params["body_jaxpr"], [*ins[num_cond : num_cond + num_body], *state]
    )
    for first, value, result in zip(start, state, results, strict=True):
        place.node(EQUAL, [first, result], [value])
    return state


def _cond(place: _Place, ins: list[Value]) -> list[Value]:
    operands = ins[1:]
    results = [
        place.enter(i, branch, operands) for i, branch in enumerate(place.eqn.params["branches"])
    ]
    return [
        _joined(place, list(values), var.aval)
        for *values, var in zip(*results, place.eqn.outvars, strict=True)
    ]


def _joined(place: _Place, values: list[Value], aval: Any) -> Value:
    return place.link(EQUAL, values, aval, place.loops)


_OPEN: dict[Primitive, Callable[[_Place, list[Value]], list[Value]]] = {
    jp.scan_p: _scan,
    jp.while_p: _while,
    jp.cond_p: _cond,
    **dict.fromkeys(
        (
            jp.jit_p, jp.remat_p, jp.custom_jvp_call_p, jp.custom_vjp_call_p,
            *_compat.call_primitives,
        ),
        _call,
    ),
}  # fmt: skip
