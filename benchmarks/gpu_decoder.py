"""One decode step of the shipped decoder's class in the shape of an 8B model, on random weights.

`python -m benchmarks.gpu_decoder RECIPE BATCH [--layers apart] [--dry-run]` prints a line of JSON;
RECIPE is "bf16" or a preset. `benchmarks.gpu` runs each in a process of its own, so that the peak
of device memory is this step's alone: weights are made on the device in their stored form, nothing
is quantized. A step is the whole model, jitted, with a KV cache that it gives up and returns.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

import jaxquant as jq
from benchmarks.gpu_timing import require_gpu
from jaxquant.models import DecoderConfig, linen
from jaxquant.models.generate import linen_step

# Llama 3 8B (arXiv 2407.21783, table 3); the cache is as long as the shipped decoder's.
CONFIG = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rope_theta=500_000.0,
    max_length=256,
    tie_embeddings=False,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
)
SMALL = CONFIG.replace(
    vocab_size=512, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
    intermediate_size=512, max_length=32,
)  # fmt: skip
_STEPS = 32
_REPEATS = 5


def random_tree(shapes: Any) -> Any:
    """Arbitrary arrays of these shapes, dtypes and formats; making one takes no other memory."""

    def fill(leaf: Any) -> jax.Array:
        def make() -> jax.Array:
            mixed = jnp.uint32(0)
            for axis in range(len(leaf.shape)):
                index = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
                mixed = (mixed ^ index) * jnp.uint32(2654435761)
            mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(739982445)
            values = (mixed >> 24).astype(jnp.int32)
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return ((values - 128) * 2.0**-12).astype(leaf.dtype)
            bits = jnp.iinfo(leaf.dtype)
            return ((values >> (8 - bits.bits)) + int(bits.min)).astype(leaf.dtype)

        return jax.block_until_ready(jax.jit(make, out_shardings=leaf.format)())

    return jax.tree.map(fill, shapes)


def abstract(config: DecoderConfig, recipe: str, device: Any) -> tuple[Any, Any]:
    """The model, and the shapes of its variables in the recipe's form, laid out for CUDA."""
    model: Any = linen.Decoder(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    if recipe != "bf16":
        model = jq.quantize(recipe)(model)
        shapes = jq.ptq(model, shapes, tokens, progress=False)
    return model, jq.prepare(placed(shapes, device), "cuda")


def placed(shapes: Any, device: Any) -> Any:
    """The same shapes on a device."""
    here = SingleDeviceSharding(device)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)


def steps_of(model: Any) -> tuple[Any, Any]:
    """`first(variables, token, at) -> cache` and `step(variables, cache, token, at)`, jitted.

    The step's cache lies as the compiler wants it (`compiled.input_formats`): with a layout from
    outside, every step would transpose it on its way in and out, as no step of a loop of tokens
    within one program does. The cache is as large as without quantization.
    """

    def first(variables: Any, token: jax.Array, at: jax.Array) -> Any:
        return linen_step(model, variables)(None, token, at)[1]

    def step(variables: Any, cache: Any, token: jax.Array, at: jax.Array) -> Any:
        logits, cache = linen_step(model, variables)(cache, token, at)
        return cache, jnp.argmax(logits, -1).astype(jnp.int32), at + 1

    own = Format(Layout.AUTO)
    jitted = jax.jit(
        step,
        donate_argnums=1,
        in_shardings=(None, own, None, None),
        out_shardings=(own, None, None),
    )
    return jax.jit(first), jitted


def decode(recipe: str, batch: int, layers: str, dry_run: bool) -> dict[str, Any]:
    """Times decode steps; with `dry_run` runs two small ones."""
    require_gpu(dry_run, "gpu_decoder")
    config = (SMALL if dry_run else CONFIG).replace(scan_layers=layers == "stacked")
    model, shapes = abstract(config, recipe, jax.devices()[0])
    variables = random_tree(shapes)
    token = at = jnp.zeros((batch, 1), jnp.int32)
    first, step = steps_of(model)
    cache, at = first(variables, token, at), at + 1
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cache)
    step = step.lower(variables, shapes, token, at).compile()
    cache = jax.device_put(cache, step.input_formats[0][1])
    found = {"recipe": recipe, "batch": batch, "layers": layers}
    seconds = []
    for _ in range(1 if dry_run else _REPEATS + 1):  # the first warms up
        start, count = time.perf_counter(), 2 if dry_run else _STEPS
        for _ in range(count):
            cache, token, at = step(variables, cache, token, at)
        jax.block_until_ready(token)
        seconds.append((time.perf_counter() - start) / count)
    if dry_run:
        return found | {"milliseconds": None, "peak_bytes": None}
    stats = jax.devices()[0].memory_stats()
    return found | {
        "milliseconds": [1e3 * s for s in seconds[1:]],
        "peak_bytes": stats["peak_bytes_in_use"],
    }


def main() -> None:
    """One combination, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("batch", type=int)
    parser.add_argument("--layers", choices=("stacked", "apart"), default="stacked")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(decode(*vars(arguments).values())))


if __name__ == "__main__":
    main()
