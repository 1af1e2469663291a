"""`jq.prepare`: weights laid out once as a platform's kernels read them.

A checkpoint and `jq.ptq` have one form for every platform; this is what a platform wants besides.
What the layouts are is said in `jaxquant.core.prepared`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx

from jaxquant.core import _compat
from jaxquant.core.prepared import PLATFORMS, lay_out
from jaxquant.core.qtensor import is_qtensor

T = TypeVar("T")


def prepare(tree: T, platform: str | None = None) -> T:
    """Lays quantized weights out in memory as the platform's kernels read them.

    Shapes, values and results stay what they are, and the tree can be saved, compared and used
    like before; only its kernels need not transpose the codes at every call any more. On "cuda"
    that is: the axes that a product sums over come last in memory. Other platforms take
    codes as `ptq` and `restore` give them, and get them back in that order.

    Args:
      tree: variables, parameters, an NNX state or model, or a single `QTensor`; of arrays, or of
        `jax.ShapeDtypeStruct`s (those with a sharding get the layout).
      platform: "cuda", "tpu", "rocm" or "cpu"; None for the default device's.

    Returns:
      A tree of the same structure (NNX: a new model). What lies right already, and whatever is no
      QTensor, is the very object it was.

    Raises:
      ValueError: an unknown platform.
      TypeError: the tree is being traced.
    """
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, prepare(state, platform))
    return lay_out_tree(tree, check_platform(platform))


def lay_out_tree(tree: Any, platform: str, *, donate: bool = False) -> Any:
    """`lay_out` of every QTensor; with `donate` each weight's codes are given up as it is moved."""
    return jax.tree_util.tree_map(
        lambda leaf: lay_out(leaf, platform, donate=donate) if is_qtensor(leaf) else leaf,
        tree,
        is_leaf=is_qtensor,
    )


def check_platform(platform: str | None) -> str:
    """The platform, or the default device's for None.

    Raises:
      ValueError: it is none; the message lists them.
    """
    if platform is None:
        return _compat.lowering_platform(jax.local_devices()[0].client)
    if platform not in PLATFORMS:
        raise ValueError(f"platform is one of {', '.join(PLATFORMS)}, not {platform!r}")
    return platform
