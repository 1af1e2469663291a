"""What XLA makes of prepared weights in front of GPU kernels, compiled for an H200 without one.

`python -m benchmarks.gpu_layout` prints a line of JSON for each program: how often a weight is
moved, the bytes of intermediate results, and how many kernels there are. Programs are a product of
a plain matrix, of heads, of experts, of layers stacked under a scan, that scan in a loop over
tokens, and stacked layers split over four GPUs, each with weights as they are restored and as
`jq.prepare` lays them out. It needs the CUDA plugin of jax (see `benchmarks.gpu_aot`), and is run
by the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxquant as jq
from benchmarks.gpu_aot import ENVIRONMENT, TARGETS, on_gpu
from jaxquant.core.qtypes import get_qtype

SCHEMES = {
    name: jq.WeightScheme(name, "group", group_size=128)
    for name in ("int4", "int8", "int2", "float8_e4m3")
}
WIDTH, HEADS, LAYERS, ROWS, EXPERTS = 1024, 8, 3, 16, 4
_CODES = {"s4": 4, "s8": 8, "f8e4m3fn": 8, "u8": 8, "s32": 32, "u32": 32}


def plain(p: Any, x: jax.Array) -> jax.Array:
    """One matrix."""
    return x @ p["w"]


def heads(p: Any, x: jax.Array) -> jax.Array:
    """A query and an output kernel: one contracted axis of three, and two."""
    return jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", x, p["in"]), p["out"])


def experts(p: Any, x: jax.Array) -> jax.Array:
    """Rows grouped by expert."""
    sizes = jnp.full(EXPERTS, ROWS // EXPERTS, jnp.int32)
    return lax.ragged_dot(x[:, : WIDTH // 2], p["experts"], sizes)


def stacked(p: Any, x: jax.Array) -> jax.Array:
    """Layers under a scan."""
    return lax.scan(lambda h, w: (heads(w, h @ w["w"]), None), x, p)[0]


def tokens(p: Any, x: jax.Array) -> jax.Array:
    """A loop over steps that scan all layers."""
    return lax.fori_loop(0, 8, lambda _, x: stacked(p, x), x)


def parallel(p: Any, x: jax.Array) -> jax.Array:
    """Stacked layers on four devices: columns of the first weight split, rows of the second."""

    def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        h = jnp.tanh(h @ w["up"])
        return jnp.einsum("tf,fd->td", h, w["down"], out_sharding=PartitionSpec()), None

    return lax.scan(layer, x, p)[0]


PROGRAMS = {
    "plain": plain,
    "heads": heads,
    "experts": experts,
    "stacked": stacked,
    "tokens": tokens,
    "parallel": parallel,
}
_SPLIT = {"up": PartitionSpec(None, None, "model"), "down": PartitionSpec(None, "model", None)}
_DEVICES = 4


def parameters(name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a program's weights."""
    size = WIDTH // HEADS
    shapes = {"w": (WIDTH, WIDTH), "in": (WIDTH, HEADS, size), "out": (HEADS, size, WIDTH)}
    wanted = {"plain": ("w",), "heads": ("in", "out")}.get(name, tuple(shapes))
    if name == "parallel":
        wide = _DEVICES * WIDTH
        shapes, wanted = {"up": (WIDTH, wide), "down": (wide, WIDTH)}, ("up", "down")
    if name == "experts":
        shapes, wanted = {"experts": (EXPERTS, WIDTH // 2, WIDTH // 2)}, ("experts",)
    lead = (LAYERS,) if name in ("stacked", "tokens", "parallel") else ()
    return {key: jax.ShapeDtypeStruct((*lead, *shapes[key]), jnp.bfloat16) for key in wanted}


def on_one(name: str, recipe: str, prepared: bool, devices: Sequence[Any]) -> Any:
    """The program compiled for one device."""
    fn, here = PROGRAMS[name], SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=here)
    weights = _quantized(name, recipe, parameters(name), x)
    weights = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), weights
    )
    if prepared:
        weights = jq.prepare(weights, "cuda")
    with on_gpu():
        lowered = jax.jit(jq.transform(fn)).trace(weights, x).lower(lowering_platforms=("cuda",))
    return lowered.compile()


def on_several(name: str, recipe: str, prepared: bool, devices: Sequence[Any]) -> Any:
    """The program compiled for a mesh, the weights split as `_SPLIT` says."""
    mesh = Mesh(np.array(devices[:_DEVICES]), ("model",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=whole)
    shapes = {
        key: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, _SPLIT[key]))
        for key, s in parameters(name).items()
    }
    with jax.set_mesh(mesh):
        weights = _quantized(name, recipe, shapes, x)
        if prepared:
            weights = jq.prepare(weights, "cuda")
        traced = jax.jit(jq.transform(PROGRAMS[name])).trace(weights, x)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def _quantized(name: str, recipe: str, shapes: Any, x: Any) -> Any:
    rule = jq.Recipe(recipe, (jq.Rule(weight=SCHEMES[recipe]),))
    return jq.ptq(jq.quantize(rule)(PROGRAMS[name]), shapes, x, progress=False)


def facts(name: str, recipe: str, prepared: bool, devices: Sequence[Any]) -> dict[str, Any]:
    """What the compiled program does with its weights."""
    compiled = (on_several if name == "parallel" else on_one)(name, recipe, prepared, devices)
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
        "gathers": len(re.findall(r"all-gather(?:-start)?\(", text)),
        "reduces": len(re.findall(r"all-reduce(?:-start)?\(", text)),
    }


def _bytes(move: str) -> int:
    """Bytes of codes that an operation like "s4[2,3]{1,0} copy" makes; 0 if it makes others."""
    dtype, sizes = re.match(r"\(?(\w+)\[([\d,]*)\]", move).groups()  # type: ignore[union-attr]
    return math.prod(map(int, filter(None, sizes.split(",")))) * _CODES.get(dtype, 0) // 8


def main() -> None:
    """All programs, a line each."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # jax has read its environment by now
    text = (TARGETS / "h200.textproto").read_text()
    several = f"1x1x{_DEVICES}"
    topology = topologies.get_topology_desc(platform="cuda", topology=several, target_config=text)
    for recipe in SCHEMES:
        for name in PROGRAMS:
            for prepared in (True, False):
                print(json.dumps(facts(name, recipe, prepared, topology.devices)), flush=True)


if __name__ == "__main__":
    main()
