"""What XLA makes of prepared weights in front of GPU kernels, compiled for an H200 without one.

`python -m benchmarks.gpu_layout` prints a line of JSON for each program: how often a weight is
moved, the bytes of intermediate results, and how many kernels there are. Programs are a product of
a plain matrix, of heads, of layers stacked under a scan, and that scan in a loop over tokens, each
with weights as they are restored and as `jq.prepare` lays them out. It needs the CUDA plugin of jax
(see `benchmarks.gpu_aot`), and is run by the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxquant as jq
from benchmarks.gpu_aot import ENVIRONMENT, TARGETS, on_gpu
from jaxquant.core.qtypes import get_qtype

SCHEMES = {
    name: jq.WeightScheme(name, "group", group_size=128) for name in ("int4", "int8", "float8_e4m3")
}
WIDTH, HEADS, LAYERS, ROWS = 1024, 8, 3, 16
_CODES = {"s4": 4, "s8": 8, "f8e4m3fn": 8, "u8": 8, "s32": 32, "u32": 32}


def plain(p: Any, x: jax.Array) -> jax.Array:
    """One matrix."""
    return x @ p["w"]


def heads(p: Any, x: jax.Array) -> jax.Array:
    """A query and an output kernel: one contracted axis of three, and two."""
    return jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", x, p["in"]), p["out"])


def stacked(p: Any, x: jax.Array) -> jax.Array:
    """Layers under a scan."""
    return lax.scan(lambda h, w: (heads(w, h @ w["w"]), None), x, p)[0]


def tokens(p: Any, x: jax.Array) -> jax.Array:
    """A loop over steps that scan all layers."""
    return lax.fori_loop(0, 8, lambda _, x: stacked(p, x), x)


PROGRAMS = {"plain": plain, "heads": heads, "stacked": stacked, "tokens": tokens}


def parameters(name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a program's weights."""
    size = WIDTH // HEADS
    shapes = {"w": (WIDTH, WIDTH), "in": (WIDTH, HEADS, size), "out": (HEADS, size, WIDTH)}
    wanted = {"plain": ("w",), "heads": ("in", "out")}.get(name, tuple(shapes))
    lead = (LAYERS,) if name in ("stacked", "tokens") else ()
    return {key: jax.ShapeDtypeStruct((*lead, *shapes[key]), jnp.bfloat16) for key in wanted}


def facts(name: str, recipe: str, prepared: bool, device: Any) -> dict[str, Any]:
    """What the compiled program does with its weights."""
    fn, here = PROGRAMS[name], SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=here)
    rule = jq.Recipe(recipe, (jq.Rule(weight=SCHEMES[recipe]),))
    weights = jq.ptq(jq.quantize(rule)(fn), parameters(name), x, progress=False)
    weights = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), weights
    )
    if prepared:
        weights = jq.prepare(weights, "cuda")
    with on_gpu():
        lowered = jax.jit(jq.transform(fn)).trace(weights, x).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    text = compiled.as_text()
    least = WIDTH * WIDTH * get_qtype(recipe).bits // 8
    moves = re.findall(r"= (\S+ (?:copy|transpose))\(", text)
    return {
        "program": name,
        "codes": recipe,
        "prepared": prepared,
        "moves": [move for move in moves if _bytes(move) >= least],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "weight": least,
        "kernels": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
    }


def _bytes(move: str) -> int:
    """Bytes of codes that an operation like "s4[2,3]{1,0} copy" makes; 0 if it makes others."""
    dtype, sizes = re.match(r"\(?(\w+)\[([\d,]*)\]", move).groups()  # type: ignore[union-attr]
    return math.prod(map(int, filter(None, sizes.split(",")))) * _CODES.get(dtype, 0) // 8


def main() -> None:
    """All programs, a line each."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ.update(ENVIRONMENT)
    text = (TARGETS / "h200.textproto").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    for recipe in SCHEMES:
        for name in PROGRAMS:
            for prepared in (True, False):
                print(json.dumps(facts(name, recipe, prepared, topology.devices[0])), flush=True)


if __name__ == "__main__":
    main()
