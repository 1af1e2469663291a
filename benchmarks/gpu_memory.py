"""Device memory of the 8B decode step, by XLA's account of the program it compiles for an H200.

`python -m benchmarks.gpu_memory` needs no GPU, but the CUDA plugin of jax. It compiles the steps of
`benchmarks.gpu_decoder` and writes benchmarks/results/gpu-memory.json and .md: bytes of arguments
(weights and cache) and of intermediate results, and their sum against bfloat16's. No time is taken.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.gpu_aot import ENVIRONMENT, TARGETS, on_gpu
from benchmarks.gpu_decoder import CONFIG, abstract, placed, steps_of
from benchmarks.gpu_report import table
from jaxquant.models import DecoderConfig

RESULTS = Path(__file__).parent / "results"
RECIPES = ("bf16", "w4a16_g128", "w8a16")


def account(
    config: DecoderConfig, recipe: str, batch: int, layers: str, device: Any
) -> dict[str, Any]:
    """XLA's account of one step."""
    model, variables = abstract(config.replace(scan_layers=layers == "stacked"), recipe, device)
    token = placed(jax.ShapeDtypeStruct((batch, 1), jnp.int32), device)
    first, step = steps_of(model)
    cache = jax.eval_shape(first, variables, token, token)
    with on_gpu():
        lowered = step.trace(variables, cache, token, token).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "recipe": recipe,
        "batch": batch,
        "layers": layers,
        "arguments": int(memory.argument_size_in_bytes),
        "temporaries": int(memory.temp_size_in_bytes),
        "kernels": compiled.as_text().count('custom_call_target="mosaic_gpu'),
    }


def lines(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A line a step, with its bytes against bfloat16's."""
    totals = {
        (one["recipe"], one["batch"], one["layers"]): one["arguments"] + one["temporaries"]
        for one in found
    }
    return [
        {
            "weights": one["recipe"],
            "batch": str(one["batch"]),
            "layers": one["layers"],
            "weights and cache, GB": f"{one['arguments'] / 1e9:.2f}",
            "intermediate, GB": f"{one['temporaries'] / 1e9:.2f}",
            "of bf16": f"{total / totals['bf16', one['batch'], one['layers']]:.3f}",
            "kernels": str(one["kernels"]),
        }
        for one, total in zip(found, totals.values(), strict=True)
    ]


def main() -> None:
    """Compiles all steps and writes what they take."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # jax has read its environment by now
    target = (TARGETS / "h200.textproto").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    found = [
        account(CONFIG, recipe, batch, layers, topology.devices[0])
        for layers in ("stacked", "apart")
        for batch in (1, 16)
        for recipe in RECIPES
    ]
    record = {"command": "python -m benchmarks.gpu_memory", "jax": jax.__version__, "steps": found}
    (RESULTS / "gpu-memory.json").write_text(json.dumps(record, indent=1) + "\n")
    shown = table(lines(found))
    head = [f"# {__doc__.splitlines()[0]}", "", f"`{record['command']}`, jax {jax.__version__}", ""]
    (RESULTS / "gpu-memory.md").write_text("\n".join([*head, *shown, ""]))
    print("\n".join(shown))


if __name__ == "__main__":
    main()
