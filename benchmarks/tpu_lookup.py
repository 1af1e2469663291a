"""What becomes of a lookup in a quantized table on TPU: by XLA, and how jaxquant does it.

`python -m benchmarks.tpu_lookup` compiles `jnp.take` of codes and scales and their dequantization,
the scales by XLA's gather or by `pick_rows`, and writes results/tpu-lookup.md: dtype of what the
gather of codes brings, whether it stays on the chip (VMEM, "S(1)" in HLO) until it is dequantized,
what the program copies of the scales, and intermediate results in HBM. Needs libtpu; see
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
from jaxquant.core.structure.pick import pick_rows  # noqa: E402
from jaxquant.pallas_kernels.tpu.chips import CHIPS  # noqa: E402

TABLE = 128_000
# Rows that are looked up, scales a row, whether these are picked by `pick_rows`.
CASES = ((16, 1, False), (16, 32, False), (16, 32, True), (1024, 1, False), (1024, 32, False))


def _copied(groups: int) -> int:
    """Bytes that are read and written where float32 [TABLE, groups] is laid out row by row."""
    return 4 * TABLE * (-(-groups // 8) * 8 + 128)


def lookup(
    rows: int, table: int, width: int, dtype: str, groups: int, ours: bool
) -> tuple[Any, Any]:
    """`(fn, avals)`: rows of a table [table, width] with `groups` scales a row."""

    def fn(codes: jax.Array, scale: jax.Array, index: jax.Array) -> jax.Array:
        picked = jnp.take(codes, index, axis=0, mode="clip").astype(jnp.float32)
        factors = pick_rows(scale, index) if ours else jnp.take(scale, index, axis=0, mode="clip")
        return (
            (picked.reshape(rows, groups, -1) * factors[:, :, None])
            .reshape(rows, width)
            .astype("bfloat16")
        )

    struct = jax.ShapeDtypeStruct
    codes = struct((table, width), jnp.dtype(dtype))
    return fn, (codes, struct((table, groups), jnp.float32), struct((rows,), jnp.int32))


def main() -> None:
    """Compiles, writes, prints."""
    lines = [
        "| chip | table | rows | codes | scales a row | scales by | gather brings |"
        " copied of scales | HBM temporaries |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for chip in ("v5e", "v6e", "v7x"):
        name = CHIPS[chip].topology
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for dtype in ("bfloat16", "int8", "int4"):
            for rows, groups, ours in CASES:
                fn, avals = lookup(rows, TABLE, 4096, dtype, groups, ours)
                compiled = compile_for(fn, avals, device)
                text = compiled.as_text()
                entry = text[text.index("\nENTRY") :]
                wide = rf"= (\w+\[{rows},4096\]\S*) fusion\("
                brought = re.findall(wide, entry)[0]
                kept = "in VMEM" if "S(1)" in brought else "in HBM"
                copies = re.findall(rf"= f32\[{TABLE},{groups}\]\S* copy\(", entry)
                copied = _copied(groups) if copies else 0
                memory = compiled.memory_analysis()
                lines.append(
                    f"| {chip} | {TABLE}x4096 | {rows} | {dtype} | {groups} |"
                    f" {'pick_rows' if ours else 'gather'} | {brought.partition('{')[0]} {kept} |"
                    f" {copied} bytes | {memory.temp_size_in_bytes} bytes |"
                )
    text = "\n".join(lines) + "\n"
    (RESULTS / "tpu-lookup.md").write_text(f"# Lookups by XLA\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
