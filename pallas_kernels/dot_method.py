"""How the XLA route multiplies an activation with a quantized weight, and why.

`choose_dot` is asked by the reference, which then does it, and by the plan, which shows it: so
the two cannot disagree. It looks at shapes and dtypes only.

Measured on two cores of an AVX-512 VNNI CPU with jax 0.12, speed of float32 = 1:

* weights float, group scales: dequantize-then-dot 0.9 at 256 to 2048 rows; one dot per group
  0.1 to 0.5, since its G x M x N partial sums go through memory. From 1 to 8 rows both are level
  on CPU, and on TPU only the per-group form fuses there.
* int8 activations, group scales: a loop over groups 0.8 to 0.9 at 2 to 8 rows, 0.9 to 2 at 16 to
  2048 rows; all groups at once 0.3 at 2 to 8 rows and less beyond, but level for a single row.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.dot_axes import DotAxes

# Up to this many rows, all groups are multiplied at once: float and integer dots.
GROUPED_ROWS = 8
GROUPED_INTEGER_ROWS = 1
# ... unless the partial sums of all groups would be more elements than this (16 MiB of float32).
GROUPED_ELEMENTS = 2**22
# More contracted values than this could overflow int32: |code| <= 127, |code - zero point| <= 255.
MOST_INT32_TERMS = (2**31 - 1) // (127 * 255)
# Groups shorter than this do not pay for an integer dot each.
SHORTEST_INTEGER_GROUP = 8


class DotMethod(enum.Enum):
    """The forms that the reference knows; the values are the names shown in plans."""

    INT8 = "int8 dot"
    INT8_GROUPS = "int8 dot per group, all at once"
    INT8_LOOP = "int8 dot per group, in a loop"
    FP8 = "fp8 dot"
    CODES = "float dot on codes"
    SCALED_INPUT = "float dot on codes, input scaled"
    GROUPS = "float dot per group, all at once"
    DEQUANTIZE = "dequantize, then float dot"


class DotChoice(NamedTuple):
    """A method and the reason for it, in words."""

    method: DotMethod
    reason: str


def choose_dot(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    w_dtype: np.dtype,
    scale_shape: tuple[int, ...],
    axes: DotAxes,
    act: ActQuant | None,
) -> DotChoice:
    """Picks the form of the product.

    Args:
      x_shape: shape of the activation.
      w_shape: shape of the weight's values.
      w_dtype: dtype of the values: int8 or int4 codes, an 8-bit float, or floats out of a table.
      scale_shape: shape of the weight's scale, over the weight's axes.
      axes: which axis does what.
      act: how the activation is quantized, or None.

    Returns:
      The method and its reason.
    """
    groups = [scale_shape[a] for a in axes.w_contract]
    if all(n == 1 for n in groups):
        return _one_scale_a_column(math.prod(w_shape[a] for a in axes.w_contract), w_dtype, act)
    blocks = [w_shape[a] // n for a, n in zip(axes.w_contract, groups, strict=True)]
    shown = " and ".join(str(b) for b, n in zip(blocks, groups, strict=True) if n > 1)
    block, count = math.prod(blocks), math.prod(groups)
    rows = axes.rows(x_shape)
    batch = math.prod(w_shape[a] for a in axes.w_batch)
    partial_sums = count * batch * rows * axes.columns(w_shape)
    most = GROUPED_ROWS if act is None else GROUPED_INTEGER_ROWS
    # A symbolic number of rows (jax.export) compares with no number: it counts as many.
    few = isinstance(rows, int) and rows <= most and partial_sums <= GROUPED_ELEMENTS
    if act is None:
        if all(scale_shape[a] == 1 for a in axes.w_free):
            return DotChoice(
                DotMethod.SCALED_INPUT,
                "scales vary along contracted axes only: the input takes them",
            )
        if few and block > 1:
            return DotChoice(DotMethod.GROUPS, f"group scales ({shown}), only {rows} rows")
        return DotChoice(DotMethod.DEQUANTIZE, f"group scales ({shown}), {rows} rows")
    if not (act.integer and _integer(w_dtype)):
        return DotChoice(DotMethod.DEQUANTIZE, f"group scales ({shown}); {_mixed(w_dtype, act)}")
    if not SHORTEST_INTEGER_GROUP <= block <= MOST_INT32_TERMS:
        length = "short" if block < SHORTEST_INTEGER_GROUP else "long"
        return DotChoice(
            DotMethod.DEQUANTIZE, f"groups of {block} are too {length} for an integer dot each"
        )
    method = DotMethod.INT8_GROUPS if few else DotMethod.INT8_LOOP
    return DotChoice(method, f"group scales ({shown}), {rows} rows")


def _one_scale_a_column(terms: int, w_dtype: np.dtype, act: ActQuant | None) -> DotChoice:
    if act is None:
        return DotChoice(
            DotMethod.CODES, "scales are constant over contracted axes: the output takes them"
        )
    if act.integer and _integer(w_dtype):
        if terms > MOST_INT32_TERMS:
            return DotChoice(DotMethod.CODES, f"sums of {terms} products could overflow int32")
        return DotChoice(DotMethod.INT8, "integer codes on both sides, int32 sums")
    if not act.integer and w_dtype.itemsize == 1 and not _integer(w_dtype):
        return DotChoice(DotMethod.FP8, "8-bit floats on both sides, float32 sums")
    return DotChoice(DotMethod.CODES, _mixed(w_dtype, act))


def _mixed(w_dtype: np.dtype, act: ActQuant) -> str:
    kind = "integer" if _integer(w_dtype) else "float"
    return f"{act.dtype} activations meet {kind} codes: multiplied as floats"


def _integer(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))
