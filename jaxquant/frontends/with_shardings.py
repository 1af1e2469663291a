"""`jq.with_shardings`: writes down how quantized weights lie on an automatic mesh.

Inside `jax.jit` nothing of a sharding can be seen on an automatic mesh, and XLA's partitioner takes
no Pallas calls. What is written down here says which part of a product each device multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding

from jaxquant.core import _compat
from jaxquant.core.layout import layout_of
from jaxquant.core.names import path_string
from jaxquant.core.qtensor import QTensor, is_qtensor

T = TypeVar("T")


def with_shardings(tree: T, *, batch_axes: str | Sequence[str] = ()) -> T:
    """Records in every `QTensor` how it is sharded, so that kernels run on each device's part.

    Call it once, outside of `jax.jit`, on weights that lie where they are to stay (after `ptq`,
    `restore` or `jax.device_put`); again, if they are moved to another mesh. Meshes with explicit
    axis types need none of it: there the types of arrays say how they are split. A record that is
    wrong costs time, since XLA then moves operands to where it says they are; results stay right.

    Args:
      tree: variables, parameters, an NNX state or model, or a single `QTensor`; leaves may be
        `jax.ShapeDtypeStruct`s with a sharding.
      batch_axes: the mesh axes that batches are split over. Of a product's input it is the first
        axis that is neither summed over nor shared with the weight.

    Returns:
      A tree of the same arrays (NNX: a new model). The records are part of its structure, so a tree
      with and one without differ for `jax.tree.map`. Checkpoints do not hold them.

    Raises:
      TypeError: a weight is being traced.
      ValueError: an axis of `batch_axes` is none of a weight's mesh.
    """
    batch = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, with_shardings(state, batch_axes=batch))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _recorded(leaf, batch, path_string(path)) if is_qtensor(leaf) else leaf,
        tree,
        is_leaf=is_qtensor,
    )


def _recorded(w: QTensor, batch: tuple[str, ...], name: str) -> QTensor:
    codes: Any = w.codes
    if _compat.is_tracer(codes):
        raise TypeError(
            f"with_shardings: {name!r} is being traced, and its sharding cannot be seen: call it on"
            " the arrays, before jax.jit"
        )
    sharding = getattr(codes, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return w.replace(mesh_layout=None)  # one device, or none that is known
    missing = [axis for axis in batch if axis not in sharding.mesh.shape]
    if missing:
        raise ValueError(
            f"with_shardings: batch_axes has {missing[0]!r}, but {name!r} lies on a mesh with axes "
            f"{list(sharding.mesh.shape)}"
        )
    return w.replace(mesh_layout=layout_of(sharding, codes.ndim, batch))
