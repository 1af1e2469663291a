"""`jq.dequantize`: from quantized weights back to floats, to export them or to train on.

The oracle of a quantized model is its float model on these; nothing in the library calls it.
"""

from __future__ import annotations

from typing import TypeVar

import jax
from flax import nnx

from jaxquant.core.qtensor import is_qtensor

T = TypeVar("T")


def dequantize(tree: T) -> T:
    """Puts the float array that it stands for in the place of every `QTensor`.

    Args:
      tree: variables, parameters, an NNX state or model, or a single `QTensor`.

    Returns:
      A tree of the same structure (NNX: a new model that runs in float); every other leaf is the
      very object it was. Each array has the shape and dtype that the weight was quantized from.
    """
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, dequantize(state))
    return jax.tree_util.tree_map(
        lambda leaf: leaf.dequantize() if is_qtensor(leaf) else leaf, tree, is_leaf=is_qtensor
    )
