"""Puts explicit factors in front of products: for what no parameter can absorb.

The jaxpr is evaluated with the weights of the products marked, and what such a product multiplies
the weight with is changed first. Called by `fold_transforms`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.passes import custom_derivatives as custom_derivatives  # enters its rules
from jaxquant.passes.control_flow import CONTROL
from jaxquant.passes.interpreter import (
    ELEMENT_MOVES,
    Context,
    Interpreter,
    Rule,
    Site,
    Weight,
    is_weight,
    register,
)
from jaxquant.passes.program import Program

RULES: dict[Primitive, Rule] = {}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array", "factors"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _Marked:
    """A weight and, by the site of each product, the factors of its other operand."""

    array: Any
    factors: dict[Site, Any]


def insert_multiplies(
    program: Program, factors: Mapping[Site, tuple[frozenset[str], Any]]
) -> Program:
    """A program in which the inputs of some products are multiplied by factors first.

    Args:
      program: a float program.
      factors: by the site of a product: the paths of the parameters its weight is made of, and the
        factors: one leading axis for each scan around the product, then axes that broadcast
        against the operand that is no weight.

    Returns:
      The program with one more multiplication for each site; the factors are constants of it.

    Raises:
      ValueError: a product is inside scans of which only some number the layers of its weight.
    """
    jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
    of_path: dict[str, dict[Site, Any]] = {}
    for site, (paths, factor) in factors.items():
        for path in paths:
            of_path.setdefault(path, {})[site] = jnp.asarray(factor)

    def flat(*inputs: Any) -> list[Any]:
        marked = [
            Weight(_Marked(x, of_path[path]), path) if path in of_path else x
            for x, path in zip(inputs, program.paths, strict=True)
        ]
        interpreter = _Inserter()
        outs = interpreter.run(jaxpr, consts, marked)
        return [out.value.array if is_weight(out) else out for out in outs]

    return program.with_jaxpr(jax.make_jaxpr(flat)(*(v.aval for v in jaxpr.invars)))


class _Inserter(Interpreter):
    rules = RULES
    control_rules = CONTROL

    def to_float(self, ctx: Context, weight: Weight, reason: str) -> Any:
        return weight.value.array


@register(RULES, *ELEMENT_MOVES)
def _move(ctx: Context, ins: list[Any]) -> list[Any]:
    (mark, *_) = (x for x in ins if is_weight(x))
    outs = _compat.bind(ctx.eqn, [x.value.array if is_weight(x) else x for x in ins])
    return [mark.replace(value=_Marked(out, mark.value.factors)) for out in outs]


@register(RULES, jp.dot_general_p, jp.conv_general_dilated_p, _compat.ragged_dot_general_p)
def _product(ctx: Context, ins: list[Any]) -> list[Any]:
    marks = [x for x in ins if is_weight(x)]
    arrays = [x.value.array if is_weight(x) else x for x in ins]
    factor = marks[0].value.factors.get(ctx.site)
    if factor is not None:
        side = 1 if is_weight(ins[0]) else 0
        x = arrays[side]
        scans = factor.ndim - x.ndim
        if scans and marks[0].levels:
            raise ValueError(
                f"{marks[0].path!r} is stacked by some but not all of the scans around its "
                f"product at {ctx.source}: there is no place for factors in front of it"
            )
        wide = jnp.promote_types(x.dtype, jnp.float32)  # as `jaxquant.core.turns` does it
        y = x.astype(wide) * factor[(0,) * scans].astype(wide)
        arrays[side] = y.astype(x.dtype)
    return _compat.bind(ctx.eqn, arrays)


