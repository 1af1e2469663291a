"""Figures of bytes: what quantized weights occupy, and what quantizing them needs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxquant as jq
from benchmarks import peer_qwix
from benchmarks.harness import Figure, PeakMemory, directory_bytes, summary_line
from jaxquant.models import shipped

_LIMITS = {"w4a16_g128": 0.28, "w8a16": 0.51, "w2a16": 0.16}


def sizes(quick: bool) -> Figure:
    """Device and disk bytes of the quantized weights against bfloat16."""
    table = []
    met = {}
    model, variables = shipped.load(scan_layers=True)
    tokens = jnp.zeros((1, 8), jnp.int32)
    big = Stack(features=2048 if not quick else 256, depth=4)
    x = jnp.zeros((1, big.features))
    wide = jax.jit(big.init)(jax.random.key(0), x)
    cases = (("the trained model", model, variables, tokens), ("4 of 2048x2048", big, wide, x))
    for name, module, tree, example in cases:
        for preset, limit in _LIMITS.items():
            # One scheme for all: the presets keep embeddings at int8, which is not asked for here.
            scheme = jq.get_recipe(preset).rules[-1].weight
            recipe = jq.Recipe(preset, (jq.Rule("**", weight=scheme),))
            quantized = jq.ptq(jq.quantize(recipe)(module), tree, example)
            leaves = jax.tree.leaves(quantized, is_leaf=lambda x: isinstance(x, jq.QTensor))
            weights = [leaf for leaf in leaves if isinstance(leaf, jq.QTensor)]
            bfloat16 = 2 * sum(leaf.size for leaf in weights)
            device = sum(leaf.nbytes_on_device() for leaf in weights)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "weights"
                jq.save(path, {str(i): leaf for i, leaf in enumerate(weights)})
                disk = directory_bytes(path)
            table.append(
                {
                    "weights": name,
                    "recipe": preset,
                    "bfloat16 MB": bfloat16 / 1e6,
                    "device MB": device / 1e6,
                    "device / bfloat16": device / bfloat16,
                    "disk / bfloat16": disk / bfloat16,
                    "limit": limit,
                }
            )
            met[f"{preset}, {name}, device"] = device / bfloat16 <= limit
            met[f"{preset}, {name}, disk"] = disk / bfloat16 <= limit
    return Figure(
        title="Bytes of the quantized weights, scales included, against bfloat16",
        target="at most 0.28 (int4 in groups of 128), 0.51 (int8), 0.16 (int2)",
        rows=table,
        met=met,
        summary=[
            summary_line(
                f"bytes against bfloat16, {row['recipe']}: device, disk",
                f"≤ {row['limit']}",
                f"{row['device / bfloat16']:.3f}, {row['disk / bfloat16']:.3f}",
                "",
            )
            for row in table[: len(_LIMITS)]
        ],
        notes=[
            "Device bytes are what the runtime reports for codes and scales "
            "(`on_device_size_in_bytes`); disk bytes are all files of the checkpoint, metadata and "
            "checksums included."
        ],
    )


class Stack(nn.Module):
    """Square Dense layers in a row, each a parameter of its own."""

    features: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, features] to [B, features]."""
        for _ in range(self.depth):
            x = nn.Dense(self.features, use_bias=False)(x)
        return x


def quantizing(quick: bool) -> Figure:
    """Round-to-nearest int4 of 100 M parameters: throughput and extra memory."""
    features, depth = (2048, 24) if not quick else (512, 4)
    model, small = Stack(features, depth), Stack(features, 1)
    x = jnp.zeros((1, features))
    variables = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0), x))
    warm = {"params": {"Dense_0": variables["params"]["Dense_0"]}}
    floats = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    recipe = jq.Recipe("int4_g128", (jq.Rule(weight=jq.WeightScheme("int4", group_size=128)),))

    def ours(module: Any, tree: Any) -> Any:
        return jq.ptq(jq.quantize(recipe)(module), tree, x)

    def theirs(module: Any, tree: Any) -> Any:
        return peer_qwix.quantized(module, tree["params"], "w4a16_g128", x)[1]

    table, met = [], {}
    for name, quantize in (("jaxquant", ours), ("Qwix", theirs)):
        jax.block_until_ready(quantize(small, warm))  # compiled for this shape
        with PeakMemory() as memory:
            start = time.perf_counter()
            result = jax.block_until_ready(quantize(model, variables))
            seconds = time.perf_counter() - start
        leaves = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
        size = sum(leaf.on_device_size_in_bytes() for leaf in leaves)
        allowed = size + floats / depth
        table.append(
            {
                "library": name,
                "seconds": seconds,
                "MB/s of float32 input": floats / seconds / 1e6,
                "result MB": size / 1e6,
                "extra peak MB": memory.extra / 1e6,
                "allowed MB": allowed / 1e6,
            }
        )
        if name == "jaxquant":
            met["100 MB/s"] = floats / seconds >= 100e6
            met["extra memory"] = memory.extra <= allowed
        del result
    return Figure(
        title=f"Round-to-nearest int4 in groups of 128 of {floats / 4e6:.0f} M parameters",
        target="at least 100 MB/s of float input; extra memory at most the result and one layer",
        rows=table,
        met=met,
        summary=[
            summary_line(
                f"int4 of {floats / 4e6:.0f} M parameters: MB/s of float32",
                "≥ 100",
                *(f"{row['MB/s of float32 input']:.0f}" for row in table),
            ),
            summary_line(
                "extra memory at the peak (result and one layer), MB",
                "the number in brackets",
                *(f"{row['extra peak MB']:.0f} ({row['allowed MB']:.0f})" for row in table),
            ),
        ],
        notes=[
            "Extra memory is the growth of the process at its peak (the kernel's high-water "
            "mark, reset before), after one layer of the same shape was quantized to compile the "
            "program."
        ],
    )
