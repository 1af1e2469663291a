"""Dynamic quantization of activations in one pass: each row is read once and stays on the chip.

Called in front of `tpu.matmul` by `jaxquant.pallas_kernels.as_matrix`. XLA reads x twice, once for
the largest magnitude and once to round; here a block of whole rows is in VMEM for both. Codes and
scales are those of `jaxquant.pallas_kernels.activation.quantize_activation`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.activation import GREATEST, ROUNDER, SMALLEST_RANGE

# A block and what is computed from it, in bytes of float32.
_BLOCK_BYTES = 2 * 2**20


def quantize_rows(
    x: jax.Array, dtype: str, *, parallel: bool = False, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Symmetric codes and one scale a row: `x ~ codes * scale`.

    Args:
      x: [m, k], bfloat16 or float32.
      dtype: "int8", "int4", "float8_e4m3fn" or "float8_e5m2".
      parallel: rows are shared out among several cores (megacore).
      interpret: as for pl.pallas_call.

    Returns:
      `(codes, scale)`: [m, k] of `dtype`, and [m, 1] float32.

    Raises:
      ValueError: another dtype.
    """
    if dtype not in GREATEST:
        raise ValueError(f"activations become one of {list(GREATEST)}, not {dtype!r}")
    m, k = x.shape
    bm = max(32, _BLOCK_BYTES // (4 * k) // 32 * 32)
    bm = m if m <= bm else bm
    greatest = np.float32(GREATEST[dtype])

    def body(x_ref: Any, codes_ref: Any, scale_ref: Any) -> None:
        values = x_ref[...].astype(jnp.float32)
        reach = jnp.max(jnp.abs(values), axis=1, keepdims=True)
        reach = jnp.maximum(reach, np.float32(SMALLEST_RANGE))
        scale_ref[...] = reach * np.float32(1 / greatest)
        scaled = values * (greatest / reach)
        if dtype.startswith("int"):
            bits = lax.bitcast_convert_type(scaled + ROUNDER, jnp.int32)
            codes_ref[...] = (bits - np.int32(ROUNDER.view(np.int32))).astype(dtype)
        else:
            codes_ref[...] = scaled.astype(dtype)

    return pl.pallas_call(
        body,
        grid=(pl.cdiv(m, bm),),
        in_specs=[pl.BlockSpec((bm, k), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((bm, k), lambda i: (i, 0)),
            pl.BlockSpec((bm, 1), lambda i: (i, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((m, k), jnp.dtype(dtype)),
            jax.ShapeDtypeStruct((m, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if parallel else "arbitrary",)
        ),
        interpret=interpret,
        name=f"quantize_rows_{dtype}",
    )(x)
