"""Dynamic quantization of activations in one launch: each row is read once and stays on the chip.

Called in front of `gpu.matmul` by `gpu.select`. XLA makes three or four kernels of it on Hopper
(the largest magnitude, the scales, the rounding) and reads x twice. Here a thread block has a row
in shared memory for both. Codes and scales are those of
`jaxquant.pallas_kernels.activation.quantize_activation`: scales to the last bit, and codes but for
ties, since the compiler joins a multiplication and an addition into one that rounds once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.pallas_kernels.activation import BYTES, GREATEST, ROUNDER, SMALLEST_RANGE

# A row is [k / 128, 128]: the copy engine's tiles have at most 256 elements along each axis.
_MINOR = 128
_LONGEST = 256 * _MINOR
# Values that are in registers at a time; longer rows would spill from them.
_CHUNK = 4096
_THREADS = 128


def fits(k: int) -> bool:
    """Whether rows of k values can be cut for the copy engine and the threads."""
    return k % _MINOR == 0 and k <= _LONGEST


def quantize_rows(
    x: jax.Array, dtype: str, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Symmetric codes and one scale a row: `x ~ codes * scale`.

    Args:
      x: [m, k], bfloat16 or float32; `fits(k)`.
      dtype: "int8", "float8_e4m3fn" or "float8_e5m2".
      interpret: False, or `plgpu.InterpretGPUParams()`.

    Returns:
      `(codes, scale)`: [m, k] of `dtype`, and [m, 1] float32.

    Raises:
      ValueError: another dtype, or a k that does not fit.
    """
    if dtype not in BYTES:
        raise ValueError(f"activations become one of {list(BYTES)}, not {dtype!r}")
    m, k = x.shape
    if not fits(k):
        raise ValueError(f"k = {k} is no multiple of {_MINOR}, or more than {_LONGEST}")
    major, step = k // _MINOR, min(k, _CHUNK) // _MINOR
    greatest = np.float32(GREATEST[dtype])
    parts = [pl.ds(at, min(step, major - at)) for at in range(0, major, step)]

    def body(x_ref: Any, codes_ref: Any, scale_ref: Any, row: Any, out: Any, full: Any) -> None:
        i = lax.axis_index("row")
        plgpu.copy_gmem_to_smem(x_ref.at[i], row, full)
        plgpu.barrier_wait(full)

        def values(part: Any) -> jax.Array:
            return _load(row.at[part], interpret).astype(jnp.float32)

        most = jnp.abs(values(parts[0]))
        for part in parts[1 : major // step]:
            most = jnp.maximum(most, jnp.abs(values(part)))
        reach = jnp.maximum(jnp.max(most), np.float32(SMALLEST_RANGE))
        if major > step and major % step:  # the last part is shorter
            reach = jnp.maximum(reach, jnp.max(jnp.abs(values(parts[-1]))))
        scale_ref[i] = reach * np.float32(1 / greatest)
        factor = greatest / reach
        for part in parts:
            scaled = values(part) * factor
            if dtype == "int8":
                bits = lax.bitcast_convert_type(scaled + ROUNDER, jnp.int32)
                out[part] = (bits - np.int32(ROUNDER.view(np.int32))).astype(jnp.int8)
            else:
                out[part] = scaled.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, codes_ref.at[i])
        plgpu.wait_smem_to_gmem(0)

    body.__name__ = f"quantize_rows_{dtype}"
    codes, scale = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((m, major, _MINOR), jnp.dtype(dtype)),
            jax.ShapeDtypeStruct((m,), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((major, _MINOR), x.dtype),
            plgpu.SMEM((major, _MINOR), jnp.dtype(dtype)),
            plgpu.Barrier(),
        ],
        grid=(m,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )(x.reshape(m, major, _MINOR))
    return codes.reshape(m, k), scale[:, None]


def _load(ref: Any, interpret: Any) -> jax.Array:
    """Part of a row in registers; a thread reads up to 16 bytes at once."""
    if interpret:
        return ref[...]
    share = math.prod(ref.shape) // _THREADS
    size = math.gcd(share, 16 // jnp.dtype(ref.dtype).itemsize)
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=size))
