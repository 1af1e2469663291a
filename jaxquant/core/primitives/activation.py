"""`quantize_activation`: floats to codes and scales, as a primitive that passes can see and share.

A quantized product quantizes its own input unless it is handed the result of this primitive
beside it. `jaxquant.passes.share_activation_quant` emits one for each input and scheme; the
arithmetic is `jaxquant.pallas_kernels.activation`, the same that the product itself would do.
Codes and scales have no tangent: the product's derivative goes to the float input (straight
through).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from jaxquant.core import _compat
from jaxquant.pallas_kernels import activation
from jaxquant.pallas_kernels.activation import ActQuant

quantize_activation_p = _compat.make_primitive("quantize_activation", multiple_results=True)


def quantize_activation(
    x: jax.Array,
    act: ActQuant,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    static_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Symmetric codes and scales of `x`; see `jaxquant.pallas_kernels.activation`.

    Args:
      x: floats, any shape.
      act: scheme and axes.
      dtype: dtype of the arithmetic and of the scale; None for the wider of x's and float32.
      static_scale: for a static scheme, positive scales of x's rank that broadcast against x.

    Returns:
      `(codes, scale)`: codes of x's shape; scale of x's rank, size 1 on `act.reduce_axes`.

    Raises:
      ValueError: a static scheme without a scale, or a scale for a dynamic one.
    """
    if act.static != (static_scale is not None):
        given = "without a static_scale" if act.static else "and a static_scale"
        raise ValueError(f"{act} {given}: static schemes need one, dynamic ones measure it")
    operands = [x] if static_scale is None else _compat.match_varying(x, static_scale)
    codes, scale = quantize_activation_p.bind(*operands, act=act, dtype=scale_dtype(x, dtype))
    return codes, scale


def scale_dtype(*operands: Any) -> np.dtype:
    """Dtype that the codes of an activation are computed in, from the operands of its product.

    Args:
      *operands: arrays, avals, dtypes, or None.
    """
    dtypes = [getattr(o, "dtype", o) for o in operands if o is not None]
    return np.dtype(jnp.promote_types(jnp.result_type(*dtypes), jnp.float32))


def _abstract_eval(x: Any, *static_scale: Any, act: ActQuant, dtype: np.dtype) -> tuple[Any, Any]:
    if static_scale:
        shape = tuple(static_scale[0].shape)
        wrong = len(shape) != x.ndim or any(n not in (1, m) for n, m in zip(shape, x.shape))  # noqa: B905
        if wrong:
            raise TypeError(f"static_scale {shape} does not broadcast against x {tuple(x.shape)}")
    else:
        shape = tuple(1 if i in act.reduce_axes else n for i, n in enumerate(x.shape))
    codes = x.update(dtype=np.dtype(act.dtype), weak_type=False)
    whole = [i for i, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n != m]
    scale = x.update(
        shape=shape, dtype=dtype, weak_type=False, sharding=_compat.unsplit(x.sharding, whole)
    )
    return codes, scale


def _compute(
    x: jax.Array, *static_scale: jax.Array, act: ActQuant, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    return activation.quantize_activation(x.astype(dtype), act, *static_scale)


def _batch(
    axis_data: Any, args: Sequence[Any], dims: Sequence[Any], *, act: ActQuant, dtype: np.dtype
) -> tuple[Sequence[jax.Array], Sequence[int | None]]:
    if dims[0] is None:  # only the given scale differs
        size = axis_data.size
        args, dims = [jnp.broadcast_to(args[0], (size, *args[0].shape)), *args[1:]], [0, *dims[1:]]
    moved = [
        jnp.expand_dims(a, 0) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    scale_dim = 0 if dims[-1] is not None else None
    codes, scale = quantize_activation_p.bind(*moved, act=act.behind_new_axis(), dtype=dtype)
    return (codes, scale if scale_dim == 0 else scale[0]), (0, scale_dim)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    if any(map(_compat.has_tangent, tangents[1:])):
        raise TypeError(
            "quantize_activation: a gradient with respect to a static scale was asked for, and it "
            "has none. Differentiate with respect to the float arguments only"
        )
    outs = quantize_activation_p.bind(*primals, **params)
    return outs, [_compat.zero_tangent(out) for out in outs]


quantize_activation_p.def_abstract_eval(_abstract_eval)
batching.fancy_primitive_batchers[quantize_activation_p] = _batch
ad.primitive_jvps[quantize_activation_p] = _jvp
mlir.register_lowering(
    quantize_activation_p, _compat.lower_without_shardings(_compute, multiple_results=True)
)
