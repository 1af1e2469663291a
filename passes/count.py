"""`count`: how often a program multiplies and quantizes, and how many bytes it quantizes.

What `share_activation_quant`, `fuse_siblings` and `elide_roundtrips` save, in numbers: for their
tests, for `jaxquant.compile(...).cost()` and for benchmarks. Counted on the jaxpr, as executed: the
body of a scan counts for each of its steps.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.extend.core import primitives as jp

from jaxquant.core import _compat, primitives
from jaxquant.passes.edit_jaxpr import bodies

#: Primitives that multiply and sum.
PRODUCTS = frozenset(
    {
        jp.conv_general_dilated_p,
        jp.dot_general_p,
        primitives.quantized_conv_general_dilated_p,
        primitives.quantized_dot_general_p,
        primitives.quantized_dots_p,
        primitives.quantized_ragged_dot_p,
        _compat.ragged_dot_general_p,
    }
)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program executes.

    Attributes:
      primitives: number of equations by the name of their primitive, bodies included.
      launches: number of products; several weights that meet one input in one equation are one.
      quantizations: how many times an activation is quantized, by an equation of its own or inside
        a product.
      quantized_bytes: bytes of the floats that are read for that.
    """

    primitives: Mapping[str, int]
    launches: int
    quantizations: int
    quantized_bytes: int


def count(jaxpr: Any) -> Counts:
    """Counts the equations of a jaxpr, closed or open.

    A scan's body counts once for each step, a while loop's once, and of the branches of a cond the
    one that multiplies most.
    """
    names, launches, quantizations, quantized = _count(_compat.open_jaxpr(jaxpr)[0])
    return Counts(dict(sorted(names.items())), launches, quantizations, quantized)


_Raw = tuple[collections.Counter[str], int, int, int]


def _count(jaxpr: Any) -> _Raw:
    names: collections.Counter[str] = collections.Counter()
    totals = [0, 0, 0]
    for eqn in jaxpr.eqns:
        own = [int(eqn.primitive in PRODUCTS), *_quantized(eqn)]
        names[eqn.primitive.name] += 1
        inner = [_count(body) for body in bodies(eqn)]
        if eqn.primitive is jp.cond_p:
            inner = [max(inner, key=lambda raw: raw[1:])]
        times = eqn.params["length"] if eqn.primitive is jp.scan_p else 1
        for body_names, *body in inner:
            for name, number in body_names.items():
                names[name] += times * number
            own = [n + times * m for n, m in zip(own, body, strict=True)]
        totals = [n + m for n, m in zip(totals, own, strict=True)]
    return names, totals[0], totals[1], totals[2]


def _quantized(eqn: Any) -> tuple[int, int]:
    """How many activations an equation quantizes, and their bytes."""
    x = eqn.invars[0].aval if eqn.invars else None
    implicit = eqn.params.get("act") is not None and not eqn.params.get("x_quantized", True)
    if not implicit and eqn.primitive is not primitives.quantize_activation_p:
        return 0, 0
    return 1, x.size * x.dtype.itemsize  # type: ignore[union-attr]
