"""What XLA makes of a lookup in a quantized table on TPU: why there is no kernel for it.

`python -m benchmarks.tpu_lookup` compiles `jnp.take` of codes and scales and their dequantization
and writes results/tpu-lookup.md: dtype of what the gather brings, whether it stays on the chip
(VMEM, "S(1)" in HLO) until it is dequantized, and intermediate results in HBM. Needs libtpu; see
`benchmarks.tpu_aot`. No hardware is timed.
"""

from __future__ import annotations

import os
import re
from typing import Any

from benchmarks.tpu_aot import ENVIRONMENT, compile_for

os.environ.update(ENVIRONMENT)

import jax  # noqa: E402  (reads the environment)
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from benchmarks.tpu_static import RESULTS  # noqa: E402
from jaxquant.pallas_kernels.tpu.chips import CHIPS  # noqa: E402


def lookup(rows: int, table: int, width: int, dtype: str, groups: int) -> tuple[Any, Any]:
    """`(fn, avals)`: rows of a table [table, width] with `groups` scales a row."""

    def fn(codes: jax.Array, scale: jax.Array, index: jax.Array) -> jax.Array:
        picked = jnp.take(codes, index, axis=0, mode="clip").astype(jnp.float32)
        factors = jnp.take(scale, index, axis=0, mode="clip")[:, :, None]
        return (picked.reshape(rows, groups, -1) * factors).reshape(rows, width).astype("bfloat16")

    struct = jax.ShapeDtypeStruct
    codes = struct((table, width), jnp.dtype(dtype))
    return fn, (codes, struct((table, groups), jnp.float32), struct((rows,), jnp.int32))


def main() -> None:
    """Compiles, writes, prints."""
    lines = [
        "| chip | table | rows | codes | scales a row | gather brings | HBM temporaries |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip in ("v5e", "v6e", "v7x"):
        name = CHIPS[chip].topology
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for dtype in ("bfloat16", "int8", "int4"):
            for rows, groups in ((16, 1), (16, 32), (1024, 1)):
                fn, avals = lookup(rows, 128_000, 4096, dtype, groups)
                compiled = compile_for(fn, avals, device)
                text = compiled.as_text()
                entry = text[text.index("\nENTRY") :]
                wide = rf"= (\w+\[{rows},4096\]\S*) fusion\("
                brought = re.findall(wide, entry)[0]
                kept = "in VMEM" if "S(1)" in brought else "in HBM"
                memory = compiled.memory_analysis()
                lines.append(
                    f"| {chip} | 128000x4096 | {rows} | {dtype} | {groups} |"
                    f" {brought.partition('{')[0]} {kept} | {memory.temp_size_in_bytes} bytes |"
                )
    text = "\n".join(lines) + "\n"
    (RESULTS / "tpu-lookup.md").write_text(f"# Lookups by XLA\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
