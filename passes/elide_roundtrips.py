"""`elide_roundtrips`: what is in codes already is not turned to floats and quantized again.

Three patterns, in any body of a quantized program, after `share_activation_quant`:

1. **A part of what is quantized.** A value is quantized, and so is a slice of it, or the value once
   more in another shape: the codes are sliced or moved instead. Only along axes with scales of
   their own, where a range is not another one (`activation_moves`). *Bit-equal.*
2. **A dequantized weight that only meets a product** (`elide_dequantize`): the product takes the
   codes, also where the weight was chosen by a `cond`. *Equal to the rounding of float sums*:
   scales multiply sums instead of terms, so that a result of K terms in float32 differs by at most
   (K + 2) 2**-23 times the sum of the terms' magnitudes.
3. **An activation that is codes times scale**: rows of a quantized embedding, or a `QTensor` given
   as an argument, dequantized and quantized again with a scale of the same extent. Its codes go to
   the product as they are. The product is then that of the very values, to rounding; before, they
   were rounded once more, to multiples of their largest magnitude over 127, which moved a sum by
   at most half of that times the sum of the weights' magnitudes. *The same codes, and scales
   within 4 ulp, where the largest code of each scale is 127*, as absmax quantization makes them.

Not elided, because values would change by more than that:

* a slice along axes that share a scale, of dynamically quantized values: its own range is smaller;
* quantization with a given (static) scale of what has another scale: the grid differs;
* values behind a narrowing (bfloat16 of int8 codes times a scale loses bits of both);
* zero points, tables (nf4, fp4), packed codes, and scales of blocks within a row: an integer
  product has no place for them on the activation's side;
* 8-bit floats: their grid is not uniform, so rescaling moves every code;
* anything through arithmetic: a norm, an activation function or a residual makes new values.

The float input stays an operand for the derivative, which does not change.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives
from jaxquant.core.primitives.weights import unflatten
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.passes import elide_dequantize
from jaxquant.passes.activation_moves import (
    PARTS,
    WHOLE,
    before,
    canonical,
    replay,
    representatives,
    scale_shape,
)
from jaxquant.passes.body_pass import BodyPass
from jaxquant.passes.edit_jaxpr import apply, is_var

# int32 holds this many products of -128 (which absmax quantization never makes, but a QTensor may
# hold) and an 8-bit code less its zero point.
_MOST_TERMS = (2**31 - 1) // (128 * 255)


@dataclasses.dataclass(frozen=True)
class ElideRoundtrips(BodyPass):
    """Codes that are at hand are used as they are; see the module's docstring."""

    name: ClassVar[str] = "elide_roundtrips"

    def edited(self, jaxpr: Any, notes: list[str]) -> Any:
        """See `BodyPass`."""
        jaxpr = elide_dequantize.codes_out_of_branches(jaxpr, notes)
        jaxpr = elide_dequantize.products_on_codes(jaxpr, notes)
        return _Body(jaxpr, notes).elided()


class Node(NamedTuple):
    """A value and how it is quantized.

    Attributes:
      var: the variable.
      act: the scheme (canonical).
      dtype: dtype of the arithmetic.
      static_scale: variable of the given scale, or None.
    """

    var: Any
    act: ActQuant
    dtype: np.dtype
    static_scale: Any


class _Body:
    """Patterns 1 and 3 in one body: each quantization that can be had from codes is replaced."""

    def __init__(self, jaxpr: Any, notes: list[str]) -> None:
        self._jaxpr, self._notes = jaxpr, notes
        self._eqns = jaxpr.eqns
        self._place = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        self._first = representatives(jaxpr)
        self._quantized = {
            self._node(eqn): i
            for i, eqn in reversed(list(enumerate(jaxpr.eqns)))
            if eqn.primitive is primitives.quantize_activation_p
        }
        self._out: list[Any] = []
        self._emitted: set[int] = set()
        self._renamed: dict[Any, Any] = {}

    def elided(self) -> Any:
        """The body without round trips; itself if it has none."""
        if not self._quantized:
            return self._jaxpr
        for index in range(len(self._eqns)):
            self._emit(index)
        if not self._renamed:
            return self._jaxpr
        outvars = [self._rename(atom) for atom in self._jaxpr.outvars]
        if outvars == list(self._jaxpr.outvars):
            return self._jaxpr.replace(eqns=self._out)
        return self._jaxpr.replace(eqns=self._out, outvars=outvars)

    def _emit(self, index: int) -> None:
        if index in self._emitted:
            return
        self._emitted.add(index)
        eqn = self._eqns[index]
        if eqn.primitive is primitives.quantize_activation_p:
            found = self._from_codes(index)
            if found is not None:
                self._renamed.update(zip(eqn.outvars, found, strict=True))
                return
        invars = [self._rename(atom) for atom in eqn.invars]
        same = all(new is old for new, old in zip(invars, eqn.invars, strict=True))
        self._out.append(eqn if same else eqn.replace(invars=invars))

    def _rename(self, atom: Any) -> Any:
        return self._renamed.get(atom, atom) if is_var(atom) else atom

    def _node(self, eqn: Any) -> Node:
        x, *static_scale = eqn.invars
        act = canonical(eqn.params["act"], x.aval.shape)
        given = static_scale[0] if static_scale else None
        return Node(self._first.get(x, x), act, eqn.params["dtype"], given)

    def _from_codes(self, index: int) -> tuple[Any, Any] | None:
        """Codes and scale of what an equation quantizes, if codes of its source are at hand."""
        eqn = self._eqns[index]
        chain: list[Node] = [self._node(eqn)]
        moves: list[Any] = []
        while True:
            node = chain[-1]
            source = self._quantized.get(node)
            if source is not None and source != index and self._available(source, index):
                self._emit(source)
                codes, scale = (self._rename(var) for var in self._eqns[source].outvars)
                what = "is taken from codes that were made of a larger value"
                break
            producer = self._producer(node.var)
            held = None if producer is None else _held(producer, node)
            if held is not None:
                codes, scale = self._codes_of(producer, held, node)
                what = "is what codes and scales stand for: they are used as they are"
                break
            act = None if producer is None else before(producer, node.act, WHOLE | PARTS)
            if act is None or not is_var(producer.invars[0]):
                return None
            var = producer.invars[0]
            moves.append((producer, node.act))
            chain.append(node._replace(var=self._first.get(var, var), act=act))
        for producer, act in reversed(moves):
            new, codes, scale = replay(producer, codes, scale, act)
            self._out += new
        where = "/".join(_compat.name_stack_names(eqn)) or _compat.source_line(eqn)
        self._notes.append(f"{eqn.invars[0].aval.str_short()} {what}: {where}")
        return codes, scale

    def _producer(self, var: Any) -> Any:
        index = self._place.get(var)
        return None if index is None else self._eqns[index]

    def _available(self, source: int, index: int) -> bool:
        """Whether a quantization could be done before the equation `index`."""
        places = (self._place.get(var, -1) for var in self._eqns[source].invars)
        return all(place < index for place in places)

    def _codes_of(self, producer: Any, w: QTensor, node: Node) -> tuple[Any, Any]:
        """int8 codes, and scales as the scheme lays them out, of a dequantized value."""
        codes, scale = w.codes, w.scale
        if codes.aval.dtype != np.int8:
            codes = self._convert(codes, np.dtype("int8"), producer)
        if scale.aval.dtype != node.dtype:
            scale = self._convert(scale, node.dtype, producer)
        shape = scale_shape(codes.aval.shape, node.act)
        if scale.aval.shape != shape:
            params = {
                "shape": shape,
                "broadcast_dimensions": tuple(range(len(shape))),
                "sharding": None,
            }
            self._out.append(apply(jp.broadcast_in_dim_p, [scale], params, like=producer))
            scale = self._out[-1].outvars[0]
        return codes, scale

    def _convert(self, var: Any, dtype: np.dtype, like: Any) -> Any:
        params = {"new_dtype": dtype, "weak_type": False, "sharding": None}
        self._out.append(apply(jp.convert_element_type_p, [var], params, like=like))
        return self._out[-1].outvars[0]


def _held(producer: Any, node: Node) -> QTensor | None:
    """The QTensor (of variables) whose codes and scale are those of the node's value."""
    if producer.primitive is not primitives.dequantize_p or node.act.static:
        return None
    w = unflatten(producer.params["tree"], producer.invars)
    plain = w.qtype.kind == "int" and w.qtype.table is None and w.packed_axis is None
    if not plain or w.zero_point is not None or isinstance(w.scale, QTensor):
        return None
    if node.act.dtype != "int8" or not (is_var(w.codes) and is_var(w.scale)):
        return None
    scale, shape = w.scale.aval, w.codes.aval.shape
    if np.dtype(w.dtype) != jnp.promote_types(scale.dtype, np.float32) or w.dtype != node.dtype:
        return None
    wanted = scale_shape(shape, node.act)
    fits = all(n in (1, m) for n, m in zip(scale.shape, wanted, strict=True))
    summed = [shape[i] for i in node.act.reduce_axes]
    few = all(isinstance(n, int) for n in summed) and math.prod(summed) <= _MOST_TERMS
    on_mesh = _compat.explicit_sharding(scale) is not None and tuple(scale.shape) != wanted
    return w if fits and few and not on_mesh else None
