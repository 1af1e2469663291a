"""Whether a transform left the function as it was: checked on data, sharply in every dtype.

A model that computes in bfloat16 differs from itself by a percent as soon as anything is rounded
elsewhere. So that a wrong fold cannot hide there, both programs are run with all floats widened to
float32 and products at full precision, on parameters that are folded before they are rounded. What
is rounded when they are stored is looked at as well, with the tolerance that this takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from jaxquant.passes.channel_graph import build_graph
from jaxquant.passes.fold_transforms import check_same
from jaxquant.passes.program import Program
from jaxquant.passes.widen import wide_array, wide_dtype, widened

_EXACT = 1e-5
_ROUNDED = 0.05


def check_unchanged(
    before: Program,
    after: Program,
    inputs: Sequence[Any],
    fold: Callable[[Mapping[str, Any]], dict[str, Any]],
    *,
    tolerance: float | None,
    what: str,
) -> None:
    """Compares a function before and after a transform.

    Args:
      before: the float program.
      after: the program after the transform, of the same inputs.
      inputs: values of these, with the parameters before it.
      fold: gives the parameters that change, in the dtypes of those it is given.
      tolerance: how much results may differ, relative to their largest magnitude, in float32. When
        None, 1e-5.
      what: names the transform in the error.

    Raises:
      FoldError: the function has changed, or the parameters it leaves are useless in their dtype.
    """
    exact = _EXACT if tolerance is None else tolerance
    wide = [wide_array(x) for x in inputs]
    results = [
        jax.jit(jaxpr_as_fun(widened(program)))(*values)
        for program, values in ((before, wide), (after, _folded(before, wide, fold)))
    ]
    check_same(*results, tolerance=exact, what=what)
    if all(x is y for x, y in zip(wide, inputs, strict=True)) and not _computes_short(before):
        return
    stored = [
        jax.jit(jaxpr_as_fun(program.jaxpr))(*values)
        for program, values in ((before, inputs), (after, _folded(before, inputs, fold)))
    ]
    rounded = what + ", whose parameters are rounded to the model's dtype,"
    check_same(*stored, tolerance=max(exact, _ROUNDED), what=rounded)


def _folded(
    program: Program,
    inputs: Sequence[Any],
    fold: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> list[Any]:
    named = {p: x for p, x in zip(program.paths, inputs, strict=True) if p is not None}
    new = fold(named)
    return [new.get(p, x) if p is not None else x for p, x in zip(program.paths, inputs)]


def _computes_short(program: Program) -> bool:
    """Whether anything in the program is a float of fewer than 32 bits."""
    values = (v for node in build_graph(program).nodes for v in node.values)
    return any(wide_dtype(v.dtype) != v.dtype for v in values)
