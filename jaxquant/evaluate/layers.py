"""Which axes of a parameter number layers: found from its use, never from its name or rank.

For: :mod:`jaxquant.evaluate.compare`, so that each layer of a stacked weight is measured by itself.
It traces the float model once and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxquant.evaluate.batches import Call
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.program import trace


def layer_axes(fn: Callable[..., Any], tree: Any, call: Call) -> dict[str, tuple[int, ...]]:
    """Parameter path to the axes that a scan or an index takes apart in every use of it.

    Args:
      fn: the float computation, ``fn(tree, *args, **kwargs)``.
      tree: the float parameters.
      call: one batch.
    """
    found: dict[str, set[int]] = {}
    for use in find_weights(trace(fn, tree, call.args, call.kwargs)):
        if use.param is not None and use.axes:
            axes = {axis.axis for axis in use.axes if axis.is_layer}
            found[use.param] = found.get(use.param, axes) & axes
    return {path: tuple(sorted(axes)) for path, axes in found.items() if axes}
