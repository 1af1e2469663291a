"""`quantize_array`: one float array to one QTensor.

Called by `jaxquant.algorithms.rtn` (which adds the choice of a range) and by algorithms that
bring their own scales. Eagerly it compiles once per shape and setting, checks the weight for NaN
and Inf, and lays the parts out like the weight's sharding; inside jit, vmap or eval_shape it is
plain traced code and checks no values. Nothing here knows what the axes mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxquant.core.absmax import RangeFn, absmax_range
from jaxquant.core.blocks import check_block_shape, map_slices
from jaxquant.core.codes import encode
from jaxquant.core.placement import part_shardings
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType, get_qtype
from jaxquant.core.scales import double_quantize, kept_axes, nvfp4_scale, scale_from_range
from jaxquant.pallas_kernels import packing

__all__ = [
    "RangeFn",
    "absmax_range",
    "check_finite",
    "choose_packed_axis",
    "encode",
    "quantize_array",
]

_SLICE = 2**20  # elements; what a search for ranges may hold temporarily, a few times over


def quantize_array(
    w: Any,
    qtype: str | QType,
    block_shape: Sequence[int],
    *,
    symmetric: bool = True,
    range_fn: RangeFn = absmax_range,
    scale: jax.Array | QTensor | None = None,
    zero_point: jax.Array | None = None,
    scale_dtype: Any = jnp.float32,
    packed_axis: int | None = None,
    double_quant: bool = False,
    stack_axes: Sequence[int] | None = None,
    name: str = "array",
) -> QTensor:
    """Quantizes by rounding to nearest.

    Args:
      w: floats of any shape: a JAX or numpy array or a tracer. For a ShapeDtypeStruct go
        through `jax.eval_shape`.
      qtype: target type or its name.
      block_shape: neighbours along each axis that share a scale; divides w's shape.
      symmetric: False for zero points; ignored when `scale` is given.
      range_fn: how the range of a block is found; ignored when `scale` is given.
      scale: scales that are already chosen, one a block. `block_shape` follows from them.
      zero_point: the zero points that go with `scale`.
      scale_dtype: dtype of the scales; types that prescribe one override it.
      packed_axis: for packed types, the axis to pack along, or None to let
        `choose_packed_axis` decide (int8 codes if no axis is safe).
      double_quant: True to store the scales in 8 bits themselves (`double_quantize`).
      stack_axes: axes of layers and experts, which a scan or an index removes. They keep scales
        of their own on every level and decide where to pack. None: not known.
      name: parameter name for errors.

    Returns:
      QTensor that stands for w's shape and dtype. Eager results are laid out like w: codes with
      its sharding, scales with the axes unsharded that they cannot share.

    Raises:
      ValueError: NaN or Inf in w (with their count), a block shape that does not divide (with
        the divisors), an axis that w lacks, or an option the type does not have. All name the
        parameter.
    """
    qtype = get_qtype(qtype)
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: only floating-point arrays are quantized, not {w.dtype}")
    if not w.size:
        raise ValueError(f"{name}: shape {w.shape} holds no values to quantize")
    if zero_point is not None and scale is None:
        raise ValueError(f"{name}: zero_point= goes with scale=; symmetric=False finds both")
    if not jnp.issubdtype(jnp.dtype(scale_dtype), jnp.floating):
        raise ValueError(f"{name}: scale_dtype={scale_dtype!r} is no floating-point dtype")
    for axis in (*(stack_axes or ()), *(() if packed_axis is None else (packed_axis,))):
        if not -w.ndim <= axis < w.ndim:
            raise ValueError(f"{name}: there is no axis {axis} in shape {w.shape}")
    if scale is not None:
        block_shape = tuple(n // s for n, s in zip(w.shape, scale.shape, strict=True))
    block_shape = check_block_shape(w.shape, block_shape, name)
    _check_options(qtype, block_shape, symmetric or scale is not None, double_quant, name)
    if packed_axis is None:
        packed_axis = choose_packed_axis(w.shape, block_shape, stack_axes or ())
    elif packed_axis >= 0:
        packed_axis -= w.ndim
    settings = _Settings(
        qtype,
        block_shape,
        symmetric,
        range_fn,
        jnp.dtype(scale_dtype),
        packed_axis if qtype.packed else None,
        double_quant,
        kept_axes(block_shape, stack_axes),
        sliced=False,
    )
    operands = (w, scale, zero_point)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        return _quantize(settings, *operands)[0]
    result, finite = _compiled_for(settings, operands)(*operands)
    if not finite:
        check_finite(w, name)
    return result


def check_finite(w: jax.Array, name: str = "array") -> None:
    """Raises ValueError with the parameter's name and the counts if w holds NaN or Inf."""
    if w.size and not math.isfinite(_largest(w)):  # needs no memory; counting needs two copies
        nans, infs = (int(n) for n in jax.device_get(_count_nonfinite(w)))
        raise ValueError(
            f"{name}: {nans + infs} of {w.size} values are not finite ({nans} NaN, {infs} Inf);"
            " a quantized weight cannot hold them"
        )


def choose_packed_axis(
    shape: Sequence[int], block_shape: Sequence[int], stack_axes: Sequence[int] = ()
) -> int | None:
    """The axis to pack sub-byte codes along, negative, or None if none is safe.

    A QTensor keeps its packed axis as a static negative number. Scans and indexing remove axes
    from the arrays only, so the number stays right exactly for axes behind all that are removed:
    those are the candidates. Among them, the last whose length is a multiple of 8 and that shares
    scales (a contracted axis, as a rule); then any that shares scales; then the last.

    Args:
      shape: logical shape.
      block_shape: its blocks.
      stack_axes: axes of layers and experts.
    """
    ndim = len(shape)
    first = max((axis % ndim for axis in stack_axes), default=-1) + 1
    candidates = range(first, ndim)
    if not candidates:
        return None

    def rank(axis: int) -> tuple[bool, bool, int]:
        shares = block_shape[axis] > 1
        return shares and shape[axis] % 8 == 0, shares, axis

    return max(candidates, key=rank) - ndim


class _Settings(NamedTuple):
    """What is static when one array is quantized."""

    qtype: QType
    block_shape: tuple[int, ...]
    symmetric: bool
    range_fn: RangeFn
    scale_dtype: Any
    packed_axis: int | None
    double_quant: bool
    kept: tuple[int, ...]
    sliced: bool  # find ranges slice by slice: not for sharded weights


def _quantize(
    settings: _Settings,
    w: jax.Array,
    scale: jax.Array | QTensor | None,
    zero_point: jax.Array | None,
) -> tuple[QTensor, jax.Array]:
    """The traced part of `quantize_array`; also tells whether all of w is finite."""
    qtype = settings.qtype
    if scale is None:
        scale, zero_point, finite = _find_scale(settings, w)
    else:
        finite = jnp.isfinite(_largest(w))
    if settings.double_quant and not isinstance(scale, QTensor):
        scale = double_quantize(scale, settings.kept)
    values = scale.dequantize() if isinstance(scale, QTensor) else scale
    w_again, values = jax.lax.optimization_barrier((w, values))
    codes = encode(w_again, values, zero_point, qtype)
    length = None
    if settings.packed_axis is not None:
        length = w.shape[settings.packed_axis]
        codes = packing.pack(codes, qtype.bits, settings.packed_axis)
    result = QTensor(
        codes,
        scale,
        zero_point,
        qtype=qtype,
        dtype=jnp.dtype(w.dtype),
        packed_axis=settings.packed_axis,
        packed_length=length,
    )
    return result, finite


def _find_scale(
    settings: _Settings, w: jax.Array
) -> tuple[jax.Array | QTensor, jax.Array | None, jax.Array]:
    """Scale, zero point, and whether all of w is finite."""
    qtype, block_shape = settings.qtype, settings.block_shape

    def find_range(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return settings.range_fn(w, block_shape, qtype, settings.symmetric)

    if settings.range_fn is absmax_range:
        lo, hi = find_range(w)
        finite = jnp.isfinite(hi).all() & jnp.isfinite(lo).all()  # they pass NaN and Inf on
    else:
        lo, hi = map_slices(find_range, w, block_shape, _SLICE if settings.sliced else w.size)
        finite = jnp.isfinite(_largest(w))
    # Else XLA merges reductions and conversions of w across the steps and keeps a copy of w.
    lo, hi = jax.lax.optimization_barrier((lo, hi))
    if qtype.scale_qtype is not None:
        outer = [n if axis in settings.kept else 1 for axis, n in enumerate(lo.shape)]
        return nvfp4_scale(jnp.maximum(-lo, hi), outer), None, finite
    scale, zero_point = scale_from_range(
        lo,
        hi,
        qtype,
        symmetric=settings.symmetric,
        scale_dtype=settings.scale_dtype,
        dtype=w.dtype,
    )
    return scale, zero_point, finite


def _compiled_for(settings: _Settings, operands: tuple[Any, ...]) -> Callable[..., Any]:
    """The compiled quantizer for where the weight lies."""
    sharding = operands[0].sharding
    if len(sharding.device_set) == 1 or not isinstance(sharding, NamedSharding):
        return _compiled(settings._replace(sliced=len(sharding.device_set) == 1))
    leaves, treedef = jax.tree.flatten(operands)
    avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return _compiled(settings, sharding, treedef, avals)


@functools.lru_cache(maxsize=4096)
def _compiled(
    settings: _Settings,
    sharding: NamedSharding | None = None,
    treedef: Any = None,
    avals: tuple[jax.ShapeDtypeStruct, ...] = (),
) -> Callable[..., tuple[QTensor, jax.Array]]:
    """The jitted quantizer of one setting; for a sharded weight, of one setting and shape."""
    quantize = functools.partial(_quantize, settings)
    if sharding is None:
        return jax.jit(quantize)
    result, _ = jax.eval_shape(quantize, *treedef.unflatten(avals))
    shardings = part_shardings(result, sharding), NamedSharding(sharding.mesh, PartitionSpec())
    if AxisType.Explicit in sharding.mesh.axis_types:  # groups across shards need the partitioner
        return jax.jit(jax.sharding.auto_axes(quantize, out_sharding=shardings))
    return jax.jit(quantize, out_shardings=shardings)


@jax.jit
def _largest(w: jax.Array) -> jax.Array:
    """The largest |w|; NaN or Inf if any element is. Not max(abs(w)), see `absmax_range`."""
    return jnp.maximum(jnp.max(w), -jnp.min(w)).astype(jnp.float32)


@jax.jit
def _count_nonfinite(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(jnp.isnan(w), dtype=jnp.int32), jnp.sum(jnp.isinf(w), dtype=jnp.int32)


def _check_options(
    qtype: QType, block_shape: tuple[int, ...], symmetric: bool, double_quant: bool, name: str
) -> None:
    if not symmetric and not qtype.asymmetric:
        raise ValueError(f"{name}: {qtype.name} has no zero point; use symmetric=True")
    if double_quant and (qtype.scale_dtype or qtype.scale_qtype):
        raise ValueError(
            f"{name}: the format {qtype.name} prescribes its scales; use double_quant=False"
        )
    groups = [b for b in block_shape if b > 1]
    if qtype.group_size is not None and (len(groups) != 1 or groups[0] != qtype.group_size):
        raise ValueError(
            f"{name}: {qtype.name} has groups of {qtype.group_size} along one axis, not blocks"
            f" {block_shape}"
        )
