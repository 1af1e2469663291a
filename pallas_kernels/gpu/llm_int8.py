"""LLM.int8(): columns of x with outliers leave the int8 product, and multiply in bfloat16.

For callers with plain arrays (Dettmers et al. 2022, arXiv:2208.07339):

    indices, mask, overflow = find_outliers(x)
    config = choose_outlier_config(m, k, n, chip)
    out = llm_int8_matmul(x, codes, scale, indices, mask, config=config)

`find_outliers` and `split_outliers` are XLA's on any platform and any jax; the product is one
launch of `gpu.llm_int8_body`, which needs Hopper and a jax with Mosaic GPU (0.11). XLA gathers the
outliers' columns of x and of the codes in front of it: the copy engine brings boxes of neighbours,
not single columns, and each block of the kernel would gather the same columns again. What is
gathered is small, `capacity` of k columns; but of K-minor codes each value is in another sector of
memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.pallas_kernels.gpu import select, tables
from jaxquant.pallas_kernels.gpu.chips import Chip
from jaxquant.pallas_kernels.gpu.config import GpuConfig, shared_bytes
from jaxquant.pallas_kernels.gpu.heuristics import choose_config
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported

# Outlier columns are multiplied in whole rows of shared memory: 128 bytes of bfloat16.
CAPACITY_UNIT = 64
_GREATEST = 127.0


class Outliers(NamedTuple):
    """Columns of x that are to be multiplied in x's own dtype.

    Attributes:
      indices: int32 [capacity], all different.
      mask: bool [capacity], False where fewer columns than that have outliers.
      overflow: int32 [], columns with outliers for which there was no place: they stay in the int8
        product, and rows' scales grow with them.
    """

    indices: jax.Array
    mask: jax.Array
    overflow: jax.Array


class Split(NamedTuple):
    """x as the two products take it: `x ~ codes * scale`, plus `outliers` at their columns.

    Attributes:
      codes: int8 [m, k], zero in outliers' columns.
      scale: float32 [m, 1]; NaN for rows with a NaN outside of outliers' columns.
      outliers: [m, capacity] of x's dtype; zero where the mask is False.
    """

    codes: jax.Array
    scale: jax.Array
    outliers: jax.Array


def find_outliers(x: jax.Array, threshold: float = 6.0, capacity: int = CAPACITY_UNIT) -> Outliers:
    """The columns of x with the largest magnitudes, of those that reach the threshold.

    Args:
      x: [m, k] floats.
      threshold: a column is an outlier if any magnitude in it is this or more.
      capacity: places for such columns, a positive multiple of 64, at most k.

    Returns:
      `Outliers`, by falling magnitude.

    Raises:
      ValueError: the capacity is not allowed.
    """
    k = x.shape[1]
    _check_capacity(capacity, k)
    size = jnp.abs(x.astype(jnp.float32))
    is_outlier = jnp.any(size >= threshold, axis=0)
    most = jnp.max(jnp.where(size >= 0, size, 0.0), axis=0)  # NaN has no size
    score, indices = lax.top_k(jnp.where(is_outlier, most, -1.0), capacity)
    overflow = jnp.maximum(jnp.sum(is_outlier, dtype=jnp.int32) - capacity, 0)
    return Outliers(indices.astype(jnp.int32), score >= 0, overflow)


def split_outliers(x: jax.Array, indices: jax.Array, mask: jax.Array) -> Split:
    """X without outliers' columns in int8, a scale a row, and those columns as they are.

    Args:
      x: [m, k] floats.
      indices: int32 [capacity], all different.
      mask: bool [capacity], which of them count.

    Returns:
      `Split`. Rows that are all zero but for outliers have scale 1.
    """
    is_outlier = jnp.zeros(x.shape[1], jnp.int32).at[indices].max(mask.astype(jnp.int32)) > 0
    rest = jnp.where(is_outlier, 0.0, x.astype(jnp.float32))
    most = jnp.max(jnp.abs(rest), axis=1, keepdims=True)
    scale = jnp.where(most == 0, 1.0, most / _GREATEST)
    scaled = jnp.round(rest / scale)
    codes = jnp.clip(jnp.nan_to_num(scaled), -_GREATEST, _GREATEST).astype(jnp.int8)
    return Split(codes, scale, jnp.where(mask, jnp.take(x, indices, axis=1), 0))


def choose_outlier_config(
    m: int, k: int, n: int, chip: Chip, capacity: int = CAPACITY_UNIT, out_dtype: str = "bfloat16"
) -> GpuConfig:
    """The config of `llm_int8_matmul` on a chip: what was timed, or the int8 product's.

    With room for outliers in both cases.

    Args:
      m: rows of x.
      k: contracted values.
      n: columns of the weight.
      chip: where it runs.
      capacity: outlier columns, as in `find_outliers`.
      out_dtype: dtype name of the result.

    Returns:
      A config with one part of k and one tile a block.

    Raises:
      ValueError: the capacity is not allowed.
      Unsupported: nothing fits; says why.
    """
    _check_capacity(capacity, k)
    problem = integer_problem(m, k, n, out_dtype)
    entry = tables.find(problem, chip, outliers=capacity)
    timed = None if entry is None else entry.config
    config = timed or choose_config(problem, chip)
    # The bfloat16 product follows the whole int8 one, and its blocks are brought once a tile.
    config = dataclasses.replace(config, split_k=1, blocks=0, cluster=1)
    own = 2 * capacity * (config.bm + config.tile_n)
    for stages in range(config.stages, 1, -1):
        fewer = dataclasses.replace(config, stages=stages)
        if shared_bytes(problem, fewer) + own <= chip.shared_bytes:
            return fewer
    raise Unsupported(
        f"{capacity} outlier columns of {config.bm} rows and {config.tile_n} columns do not fit the"
        f" {chip.shared_bytes >> 10} KiB of {chip.name}'s shared memory beside the int8 product"
    )


def llm_int8_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    indices: jax.Array,
    mask: jax.Array,
    *,
    config: GpuConfig,
    out_dtype: str = "bfloat16",
    interpret: Any = False,
) -> jax.Array:
    """`x @ (codes * scale).T`, outliers' columns in bfloat16, the others in int8.

    The bfloat16 product takes the codes themselves, which bfloat16 holds exactly, and is scaled
    with the rest: `(int32 sums * x's scale + outliers @ codes) * scale`.

    Args:
      x: bfloat16 [m, k].
      codes: int8 [n, k], K minor.
      scale: [1, n] floats.
      indices: int32 [capacity], of `find_outliers`.
      mask: bool [capacity], of `find_outliers`.
      config: of `choose_outlier_config`.
      out_dtype: dtype name of the result.
      interpret: False, or `plgpu.InterpretGPUParams()`.

    Returns:
      [m, n] of `out_dtype`.

    Raises:
      ValueError: an array's shape or dtype, or the capacity, is not allowed.
      Unsupported: this jax has no Mosaic GPU.
    """
    _check_arrays(x, codes, scale, indices, mask)
    if not select.has_mosaic_gpu():
        raise Unsupported(
            "this jax has no Mosaic GPU that LLM.int8() could be written in: 0.11 has"
        )
    # Imported here: with an older jax the module cannot be.
    from jaxquant.pallas_kernels.gpu.llm_int8_body import two_part_matmul

    m, k = x.shape
    split = split_outliers(x, indices, mask)
    return two_part_matmul(
        split.codes,
        codes,
        scale,
        split.scale,
        split.outliers,
        jnp.take(codes, indices, axis=1).astype(jnp.bfloat16),
        problem=integer_problem(m, k, codes.shape[0], out_dtype),
        config=config,
        interpret=interpret,
    )


def integer_problem(m: int, k: int, n: int, out_dtype: str) -> MatmulProblem:
    """The int8 part as the kernels' other modules know it."""
    return MatmulProblem(m, k, n, "int8", "int8", x_scale=True, out_dtype=out_dtype)


def _check_capacity(capacity: int, k: int) -> None:
    if capacity < 1 or capacity % CAPACITY_UNIT or capacity > k:
        raise ValueError(
            f"capacity (now {capacity}) must be a positive multiple of {CAPACITY_UNIT}"
            f" and at most k = {k}"
        )


def _check_arrays(
    x: jax.Array, codes: jax.Array, scale: jax.Array, indices: jax.Array, mask: jax.Array
) -> None:
    if x.ndim != 2 or x.dtype != jnp.bfloat16:
        raise ValueError(f"x must be bfloat16 [m, k], not {x.dtype}{list(x.shape)}")
    k = x.shape[1]
    if codes.ndim != 2 or codes.shape[1] != k or codes.dtype != jnp.int8:
        raise ValueError(f"codes must be int8 [n, {k}], not {codes.dtype}{list(codes.shape)}")
    if scale.shape != (1, codes.shape[0]):
        raise ValueError(f"scale must be [1, {codes.shape[0]}], not {list(scale.shape)}")
    if indices.ndim != 1 or indices.dtype != jnp.int32:
        raise ValueError(
            f"indices must be int32 [capacity], not {indices.dtype}{list(indices.shape)}"
        )
    if mask.shape != indices.shape or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool {list(indices.shape)}, not {mask.dtype}{list(mask.shape)}"
        )
    _check_capacity(indices.shape[0], k)
