"""What a program moves and computes, counted from its jaxpr: the roofline's two numbers.

Called by `jaxquant.compile` for the figures before and after, and by benchmarks. The count is a
model of what a good compiler does, the same for both programs: products, lookups, sorts, scatters
and updates read their operands and write their results once; everything elementwise is taken to
be fused into its neighbours and to cost nothing. XLA's own account of a compiled program is
`Compiled.lower().compile().cost_analysis()`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import Literal
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives
from jaxquant.core.qtensor import storage_bytes
from jaxquant.core.structure.pick import pick_rows_p
from jaxquant.passes.count import PRODUCTS, count
from jaxquant.passes.edit_jaxpr import bodies
from jaxquant.passes.interpreter import ELEMENT_MOVES

_LOOKUPS = frozenset({jp.gather_p, jp.dynamic_slice_p, pick_rows_p})
# What a compiler fuses into the reader of a parameter, so that the parameter's bytes are read.
_FOLLOWED = frozenset(ELEMENT_MOVES) - _LOOKUPS
_UPDATES = frozenset({jp.dynamic_update_slice_p, jp.scatter_p, jp.scatter_add_p})
_MOVES = frozenset({jp.sort_p, primitives.dequantize_p, primitives.quantize_activation_p})


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run of a program moves and computes.

    Attributes:
      weight_bytes: bytes read that come from parameters, codes and scales at their real width.
      activation_bytes: all other bytes read and written by operations that are not fused.
      operations: multiplications and additions of products.
      launches: how many products are run; those of one input in one equation are one.
      quantizations: how many times an activation is quantized.
      unknown_loops: while loops in it, whose number of turns is not known: counted once.
    """

    weight_bytes: int = 0
    activation_bytes: int = 0
    operations: int = 0
    launches: int = 0
    quantizations: int = 0
    unknown_loops: int = 0

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.activation_bytes

    def __add__(self, other: Traffic) -> Traffic:
        fields = dataclasses.fields(self)
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields))

    def times(self, count: int) -> Traffic:
        """That of ``count`` runs; loops of unknown length stay as many as they are."""
        fields = {f.name: count * getattr(self, f.name) for f in dataclasses.fields(self)}
        return Traffic(**{**fields, "unknown_loops": self.unknown_loops})


@dataclasses.dataclass(frozen=True)
class Cost:
    """The float program's `Traffic`, and the quantized one's."""

    before: Traffic
    after: Traffic

    @property
    def bytes_ratio(self) -> float:
        """Bytes after by bytes before: the time of a step that is bound by memory."""
        return self.after.bytes / self.before.bytes if self.before.bytes else math.nan


def traffic(jaxpr: Any, weights: Sequence[bool]) -> Traffic:
    """Counts a closed jaxpr.

    Args:
      jaxpr: the closed jaxpr.
      weights: for each of its inputs whether it is (part of) a parameter.
    """
    inner, _ = _compat.open_jaxpr(jaxpr)
    found = count(inner)
    return dataclasses.replace(
        _body(inner, weights), launches=found.launches, quantizations=found.quantizations
    )


def _body(jaxpr: Any, weights: Sequence[bool]) -> Traffic:
    """Counts an open jaxpr; what is only moved or cast from a parameter still is a parameter."""
    known = {var for var, is_weight in zip(jaxpr.invars, weights, strict=True) if is_weight}
    total = Traffic()
    for eqn in jaxpr.eqns:
        flags = [not isinstance(v, Literal) and v in known for v in eqn.invars]
        inner = list(bodies(eqn))
        if inner:
            total += _control(eqn, inner, flags)
        else:
            total += _equation(eqn, flags)
            if eqn.primitive in _FOLLOWED and any(flags):
                known.update(eqn.outvars)
    return total


def _control(eqn: Any, inner: Sequence[Any], flags: list[bool]) -> Traffic:
    if eqn.primitive is jp.scan_p:
        return _body(inner[0], flags).times(eqn.params["length"])
    if eqn.primitive is jp.while_p:
        first = eqn.params["cond_nconsts"]
        second = first + eqn.params["body_nconsts"]
        test = _body(inner[0], flags[:first] + flags[second:])
        return test + _body(inner[1], flags[first:]) + Traffic(unknown_loops=1)
    if eqn.primitive is jp.cond_p:
        return max((_body(b, flags[1:]) for b in inner), key=lambda t: t.bytes)
    return _body(inner[0], flags)


def _equation(eqn: Any, flags: list[bool]) -> Traffic:
    out = sum(storage_bytes(v.aval) for v in eqn.outvars)
    if eqn.primitive in PRODUCTS or eqn.primitive in _MOVES:
        read = _read(eqn, flags)
        work = _operations(eqn) if eqn.primitive in PRODUCTS else 0
        return Traffic(read[True], read[False] + out, work)
    if eqn.primitive in _LOOKUPS:  # reads what it picks
        return Traffic(out * flags[0], out * (2 - flags[0]))
    if eqn.primitive in _UPDATES:  # in place: writes the update only
        update = eqn.invars[1 if eqn.primitive is jp.dynamic_update_slice_p else 2]
        return Traffic(activation_bytes=2 * storage_bytes(update.aval))
    return Traffic()


def _read(eqn: Any, flags: list[bool]) -> Mapping[bool, int]:
    """Bytes read, of parameters (True) and of all else.

    A product that is given its input's codes keeps the floats for the derivative only.
    """
    unread = eqn.params.get("x_quantized", False)
    read = {True: 0, False: 0}
    for i, (atom, is_weight) in enumerate(zip(eqn.invars, flags, strict=True)):
        read[is_weight] += 0 if unread and i == 0 else storage_bytes(atom.aval)
    return read


def _operations(eqn: Any) -> int:
    """Two for each multiplication."""
    out = sum(math.prod(v.aval.shape) for v in eqn.outvars)
    params = eqn.params
    if "ragged_dot_dimension_numbers" in params:
        contract = params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0]
    elif "window_strides" not in params:
        side = 1 if params.get("weight_side") == "lhs" else 0
        contract = params["dimension_numbers"][0][side]
    else:  # a convolution: the kernel's elements for each output, output features counted once
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        return 2 * out * math.prod(kernel) // max(kernel[numbers.rhs_spec[0]], 1)
    return 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
