"""What follows a quantized product elementwise, if a kernel can do it before it writes the result.

`find` is called by `jaxquant.passes.fuse_epilogues` on a body, to see which equations belong
together, and by the lowering of `fused_epilogue` (`fused.py`), to see what the pass put into one.
It goes by what equations compute, not by names: silu may be `jax.nn.silu`, `x * jax.nn.sigmoid(x)`
or `x / (1 + jnp.exp(-x))`. Conversions between bfloat16 and float32 may lie anywhere between; a
kernel keeps float32 until its last cast, so it rounds less often than the equations do. float16 is
left alone: what overflows there must overflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.core.primitives.dot import quantized_dot_general_p, split_operands
from jaxquant.core.primitives.dots import quantized_dots_p
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.dot_axes import DotAxes

PRODUCTS = (quantized_dot_general_p, quantized_dots_p)
_CALLS = (jp.jit_p, jp.custom_jvp_call_p, *_compat.call_primitives)
_ELEMENTWISE = frozenset(
    {
        jp.add_p,
        jp.convert_element_type_p,
        jp.div_p,
        jp.exp_p,
        jp.logistic_p,
        jp.mul_p,
        jp.neg_p,
        *_CALLS,
    }
)
_FLOATS = (np.dtype(jnp.bfloat16), np.dtype(jnp.float32))
# Equations that are looked at behind one product, and in the body of one call.
_MOST_EQUATIONS = 16


@dataclasses.dataclass(frozen=True)
class Finish:
    """What is done to one product's result.

    Attributes:
      bias: is added first: a variable, the same for all rows; None for none.
      bias_axes: axes of the result that the bias's own axes are.
      residual: is added last: a variable of the result's shape; None for none.
    """

    bias: Any = None
    bias_axes: tuple[int, ...] = ()
    residual: Any = None


# Whether it is gated, which product is the gate, and a finish for each product.
_Told = tuple[bool, int, tuple[Finish, ...]]


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """A product, or two of one input, and what follows.

    Attributes:
      product: number of the product's equation.
      members: numbers of all equations in order; the last one gives the result.
      gated: the result is silu of the product `gate` times the other.
      gate: number of the gate among the products.
      finishes: for each product.
    """

    product: int
    members: tuple[int, ...]
    gated: bool
    gate: int
    finishes: tuple[Finish, ...]

    def __str__(self) -> str:
        """In words, for the plan."""
        biases = any(f.bias is not None for f in self.finishes)
        if self.gated:
            return "silu(gate) times up" + ", with biases" * biases
        residual = any(f.residual is not None for f in self.finishes)
        return " and ".join(["bias"] * biases + ["residual"] * residual)


def product_of(
    eqn: Any, operands: Sequence[Any]
) -> tuple[Any, list[Any], list[QTensor], list[DotAxes]]:
    """x, its codes and scale if there are any, the weights, and the axes for each.

    Args:
      eqn: an equation of `PRODUCTS`.
      operands: its operands: types or arrays.
    """
    params = eqn.params
    x, quantized, leaves = split_operands(operands, params["x_quantized"])
    stored = jax.tree_util.tree_unflatten(params["tree"], leaves)
    weights = list(stored) if eqn.primitive is quantized_dots_p else [stored]
    dims, side = params["dimension_numbers"], params["weight_side"]
    return x, quantized, weights, [DotAxes.make(dims, x.ndim, w.ndim, side) for w in weights]


def find(jaxpr: Any) -> list[Epilogue]:
    """The epilogues in an open jaxpr; none shares an equation with another.

    What lies between a product and the result has no other reader and is no output.
    """
    places = [i for i, eqn in enumerate(jaxpr.eqns) if eqn.primitive in PRODUCTS]
    if not places:
        return []
    body = _Body(jaxpr)
    found: list[Epilogue] = []
    for place in reversed(places):  # where two products are added, the second takes the first
        epilogue = body.epilogue(place)
        if epilogue is not None:
            body.taken.update(epilogue.members)
            found.append(epilogue)
    return found[::-1]


# A value by how it was computed: ("product", number), ("leaf", variable), ("number", float), or the
# name of an operation with its operands.
_Term = tuple[Any, ...]
_ONE: _Term = ("number", 1.0)


class _Body:
    """A jaxpr with the readers of its variables."""

    def __init__(self, jaxpr: Any) -> None:
        self.eqns = jaxpr.eqns
        self.taken: set[int] = set()
        self.source: dict[Any, int] = {}
        self.readers: dict[Any, set[int]] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            self.source.update(dict.fromkeys(eqn.outvars, i))
            for atom in eqn.invars:
                if not isinstance(atom, Literal):
                    self.readers.setdefault(atom, set()).add(i)
        for atom in jaxpr.outvars:
            if not isinstance(atom, Literal):
                self.readers.setdefault(atom, set()).add(len(jaxpr.eqns))

    def epilogue(self, place: int) -> Epilogue | None:
        """The longest one behind a product."""
        product = self.eqns[place]
        like = product.outvars[0].aval
        if len(product.outvars) > 2 or like.dtype not in _FLOATS:
            return None
        behind = self._behind(place)
        terms: dict[Any, _Term] = {v: ("product", i) for i, v in enumerate(product.outvars)}
        for index in behind:
            terms[self.eqns[index].outvars[0]] = _operation(self.eqns[index], terms)
        ends = [i for i in behind if _is_like(self.eqns[i].outvars[0].aval, like)]
        if not ends:
            return None
        *_, axes = product_of(product, [atom.aval for atom in product.invars])
        for last in reversed(ends):
            term = terms[self.eqns[last].outvars[0]]
            told = self._gated(term, axes) if len(axes) == 2 else self._single(term, axes[0], like)
            members = told and self._members(last, place, behind, told)
            if told and members:
                return Epilogue(place, members, *told)
        return None

    def _behind(self, place: int) -> list[int]:
        """Equations of elementwise operations that depend on a product, in order."""
        found: list[int] = []
        ahead = {i for var in self.eqns[place].outvars for i in self.readers.get(var, ())}
        while ahead and len(found) < _MOST_EQUATIONS:
            index = min(ahead)
            ahead.discard(index)
            if index >= len(self.eqns) or index in self.taken:
                continue
            eqn = self.eqns[index]
            if eqn.primitive in _ELEMENTWISE and len(eqn.outvars) == 1 and not eqn.effects:
                found.append(index)
                ahead.update(self.readers.get(eqn.outvars[0], ()))
        return found

    def _members(
        self, last: int, place: int, behind: Sequence[int], told: _Told
    ) -> tuple[int, ...] | None:
        """The equations that make the result; None where another one reads what they make."""
        rows = {finish.bias for finish in told[2]} - {None}
        taken_in = {place, *behind}
        wanted, members = [last], {last}
        while wanted:
            for atom in self.eqns[wanted.pop()].invars:
                source = -1 if isinstance(atom, Literal) else self.source.get(atom, -1)
                if source in members or source < 0:
                    continue
                if source in taken_in or self._spread(atom) in rows:
                    members.add(source)
                    wanted += [source] if source in behind else []
        inner = [v for i in members - {last} for v in self.eqns[i].outvars]
        if any(self.readers.get(var, set()) - members for var in inner):
            return None
        return tuple(sorted(members))

    def _gated(self, term: _Term, axes: Sequence[DotAxes]) -> _Told | None:
        """One product's silu times the other of the same equation, each perhaps with a bias."""
        for opened, other in _both_ways(term, "mul"):
            if opened[0] != "silu":
                continue
            gate, up = self._with_bias(opened[1], axes), self._with_bias(other, axes)
            if gate and up and gate[0] != up[0]:
                finishes = dict([gate, up])
                return True, gate[0], (finishes[0], finishes[1])
        return None

    def _single(self, term: _Term, axes: DotAxes, like: Any) -> _Told | None:
        """One product with a bias, a residual, or both."""
        known = self._with_bias(term, [axes])
        if known and known[1].bias is not None:
            return False, 0, (known[1],)
        for one, other in _both_ways(term, "add"):
            known = self._with_bias(one, [axes])
            fits = other[0] == "leaf" and _is_like(other[1].aval, like)
            if known and fits and not self._is_spread(other[1]):
                return False, 0, (dataclasses.replace(known[1], residual=other[1]),)
        return None

    def _with_bias(self, term: _Term, axes: Sequence[DotAxes]) -> tuple[int, Finish] | None:
        """Which product it is, and the bias that was added to it."""
        if term[0] == "product":
            return term[1], Finish()
        for one, other in _both_ways(term, "add"):
            if one[0] == "product" and other[0] == "leaf":
                row = self._row(other[1], axes[one[1]])
                if row is not None:
                    return one[1], row
        return None

    def _row(self, leaf: Any, axes: DotAxes) -> Finish | None:
        """A bias: an array that is the same for all rows, before it is spread over them."""
        bias, places = leaf, tuple(range(leaf.aval.ndim))
        spread = self._spread(leaf)
        if spread is not None:
            bias = spread
            places = tuple(self.eqns[self.source[leaf]].params["broadcast_dimensions"])
        columns = {axes.weight_out_axis(a) for a in axes.w_free}
        sizes = zip(bias.aval.shape, places, strict=True)
        if bias.aval.dtype in _FLOATS and all(n == 1 or at in columns for n, at in sizes):
            return Finish(bias, places)
        return None

    def _spread(self, var: Any) -> Any:
        """What a variable is a broadcast of, if only one equation reads that; else None."""
        if not self._is_spread(var) or len(self.readers[var]) != 1:
            return None
        operand, *sizes = self.eqns[self.source[var]].invars
        return None if sizes or isinstance(operand, Literal) else operand

    def _is_spread(self, var: Any) -> bool:
        source = self.source.get(var, -1)
        return source >= 0 and self.eqns[source].primitive is jp.broadcast_in_dim_p


def _is_like(aval: Any, product: Any) -> bool:
    return bool(aval.shape == product.shape and aval.dtype in _FLOATS)


def _both_ways(term: _Term, operation: str) -> Iterator[tuple[_Term, _Term]]:
    """The operands of an operation that does not care for their order, either first."""
    if term[0] == operation:
        yield term[1], term[2]
        yield term[2], term[1]


def _term(atom: Any, terms: Mapping[Any, _Term]) -> _Term:
    if isinstance(atom, Literal):
        return ("number", float(atom.val)) if np.ndim(atom.val) == 0 else ("unknown",)
    return terms.get(atom, ("leaf", atom))


def _operation(eqn: Any, terms: Mapping[Any, _Term]) -> _Term:
    """How the result of an elementwise equation is computed."""
    primitive = eqn.primitive
    ins = [_term(atom, terms) for atom in eqn.invars]
    if primitive in _CALLS:
        return _call(eqn, ins)
    if eqn.outvars[0].aval.dtype not in _FLOATS:
        return ("unknown",)
    if primitive is jp.convert_element_type_p:
        return ins[0]
    if primitive is jp.logistic_p:
        return ("logistic", ins[0])
    if primitive is jp.neg_p:
        return ("minus", ins[0])
    if primitive is jp.exp_p:
        return ("exp", ins[0])
    if primitive is jp.div_p:
        return _quotient(*ins)
    if primitive is jp.mul_p:
        for one, other in (ins, ins[::-1]):
            if other == ("logistic", one):
                return ("silu", one)
        return ("mul", *ins)
    return ("add", *ins)


def _quotient(above: _Term, below: _Term) -> _Term:
    """`1 / (1 + exp(-x))` and `x / (1 + exp(-x))` by their names."""
    for one, other in _both_ways(below, "add"):
        if one == _ONE and other[0] == "exp" and other[1][0] == "minus":
            x = other[1][1]
            if above == x:
                return ("silu", x)
            if above == _ONE:
                return ("logistic", x)
    return ("unknown",)


def _call(eqn: Any, ins: Sequence[_Term]) -> _Term:
    """The result of a call whose body is elementwise."""
    placed = [*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ())]
    body = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    jaxpr, consts = _compat.open_jaxpr(body)
    if (
        len(consts)
        or len(jaxpr.eqns) > _MOST_EQUATIONS
        or not all(map(_compat.is_unspecified, placed))
    ):
        return ("unknown",)
    terms: dict[Any, _Term] = dict(zip(jaxpr.invars, ins, strict=True))
    for inner in jaxpr.eqns:
        if inner.primitive not in _ELEMENTWISE or len(inner.outvars) != 1:
            return ("unknown",)
        terms[inner.outvars[0]] = _operation(inner, terms)
    return _term(jaxpr.outvars[0], terms)
