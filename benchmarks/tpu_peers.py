"""Kernels of other libraries for the same products, as programs whose static cost is asked for.

Makers for `benchmarks.tpu_aot.Job`; they need `pip install qwix tokamax`. What can be compared:

* Qwix, `contrib.kernels.quantized_matmul` (0.1.8): int8 by int8, scales of tiles of 128 x 128 and
  more, blocks that divide every size. A scale a row or a column is beyond it, so it gets one scale
  for 128 columns and one for x: less work than ours. Its own default blocks.
* tokamax, `gmm_v2` (0.0.17), its grouped product, here of one group that holds every row: int4 or
  int8 weights with scales in groups of k, floats left as they are or, for int8 weights, quantized
  inside (int8 by int4 is refused).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp


def available(label: str) -> bool:
    """Whether the library that a label of `PEERS` names is installed."""
    return importlib.util.find_spec(label.partition(" ")[0]) is not None


def can_do(label: str, m: int) -> bool:
    """Whether the library takes so many rows: Qwix's scales cover at least 128."""
    return not label.startswith("qwix") or m % 256 == 0


def qwix(m: int, k: int, n: int) -> tuple[Any, Any, int]:
    """Qwix's int8 product with its default blocks."""
    from qwix.contrib.kernels.quantized_matmul import QuantizedMatmulConfig, quantized_matmul

    blocks, struct = QuantizedMatmulConfig(), jax.ShapeDtypeStruct
    avals = (
        struct((m, k), jnp.int8),
        struct((1, 1), jnp.float32),
        struct((k, n), jnp.int8),
        struct((1, n // 128), jnp.float32),
    )

    def fn(x: jax.Array, sx: jax.Array, y: jax.Array, sy: jax.Array) -> jax.Array:
        return quantized_matmul(
            x, sx, y, sy, bm=blocks.bm, bk=blocks.bk, bn=blocks.bn, dtype=jnp.bfloat16
        )

    return fn, avals, 0


def tokamax(m: int, k: int, n: int, codes: str, group: int, act: str) -> tuple[Any, Any, int]:
    """Of tokamax, the product of one group; `act`: "" or the dtype x is quantized to inside."""
    from tokamax._src.ops.gmm_v2.gmm_v2 import gmm_v2

    struct = jax.ShapeDtypeStruct
    avals = (
        struct((m, k), jnp.bfloat16),
        struct((1, k, n), jnp.dtype(codes)),
        struct((1,), jnp.int32),
        struct((1, k // (group or k), 1, n), jnp.float32),
    )

    def fn(x: jax.Array, w: jax.Array, sizes: jax.Array, scale: jax.Array) -> jax.Array:
        return gmm_v2(
            x,
            w,
            sizes,
            scale,
            maybe_quantize_lhs=bool(act),
            lhs_quant_dtype=jnp.dtype(act) if act else None,
            preferred_element_type=jnp.bfloat16,
        )

    return fn, avals, 0


# By label: the maker, its arguments, and the format of ours that does the same.
PEERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwix w8a8": ("qwix", {}, "w8a8"),
    "tokamax w8a8": ("tokamax", {"codes": "int8", "group": 0, "act": "int8"}, "w8a8"),
    "tokamax w4a16 g128": ("tokamax", {"codes": "int4", "group": 128, "act": ""}, "w4a16 g128"),
}
