"""`pick_rows`: a table's rows by index, as a primitive, since TPUs need help with narrow tables.

Used by `structure.gather` for the scales of an embedding. It is `lax.gather`; where one TPU is to
look up few rows of a long and narrow table, the kernel that reads no more than it needs
(`jaxquant.pallas_kernels.tpu.pick_rows`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from jaxquant.core import _compat
from jaxquant.pallas_kernels.tpu import pick_rows as kernel

pick_rows_p = _compat.make_primitive("pick_rows")


def pick_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`, indices out of bounds clamped.

    Args:
      table: [rows, groups].
      index: integers [...].

    Returns:
      [..., groups].
    """
    if _compat.explicit_sharding(table) or _compat.explicit_sharding(index):
        return _gather(table, index)
    return pick_rows_p.bind(*_compat.match_varying(table, index))


def _gather(table: jax.Array, index: jax.Array) -> jax.Array:
    dn = lax.GatherDimensionNumbers((index.ndim,), (0,), (0,))
    sizes = (1, table.shape[1])
    return lax.gather(table, index[..., None], dn, sizes, mode=lax.GatherScatterMode.CLIP)


def _abstract_eval(table: Any, index: Any) -> Any:
    return table.update(shape=(*index.shape, table.shape[1]))


def _batch(args: tuple[Any, ...], dims: tuple[Any, ...]) -> tuple[jax.Array, int]:
    table, index = args
    if dims[0] is None:  # more indices into the same table
        return pick_rows(table, jnp.moveaxis(index, dims[1], 0)), 0
    return jax.vmap(_gather, in_axes=dims)(table, index), 0


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (table, index), tangent = primals, tangents[0]
    out = pick_rows(table, index)
    if not _compat.has_tangent(tangent):
        return out, _compat.zero_tangent(out)
    return out, _gather(tangent, index)


def _lower_for_tpu(ctx: Any, *args: Any) -> Any:
    table, index = ctx.avals_in
    device, devices, manual = _compat.lowering_devices(ctx)
    alone, (rows, groups) = device is not None and (devices == 1 or manual), table.shape
    if not (alone and kernel.worth(index.size, rows, groups, table.dtype)):
        return _compat.lower_without_shardings(_gather)(ctx, *args)

    def pick(table: jax.Array, index: jax.Array) -> jax.Array:
        return kernel.pick_rows(table, index.reshape(-1)).reshape(*index.shape, groups)

    return _compat.lower_without_shardings(pick, device=_compat.abstract_device(device))(ctx, *args)


pick_rows_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[pick_rows_p] = _batch
ad.primitive_jvps[pick_rows_p] = _jvp
mlir.register_lowering(pick_rows_p, _compat.lower_without_shardings(_gather))
mlir.register_lowering(pick_rows_p, _lower_for_tpu, platform="tpu")
