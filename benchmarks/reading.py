"""What reading quantized weights costs on CPU: memory and time of a decoder of eight layers.

`python -m benchmarks.reading` compiles one forward of 8 tokens for every recipe, layers apart and
under scan, with and without the barriers of `jaxquant.core.primitives.read_late`, and writes
results/reading-jax-VERSION.{json,md}. Temporary memory is the compiler's account.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import jaxquant as jq
from benchmarks import harness
from benchmarks.harness import Figure
from benchmarks.speed import race
from jaxquant.core.primitives import dot
from jaxquant.models import DecoderConfig
from jaxquant.models.linen import Decoder

RECIPES = ("w8a16", "w4a16_g128", "w4a8", "w3a16", "nf4", "fp8", "w8a8")


def reading(quick: bool, scan: bool) -> Figure:
    """One forward of 8 tokens: temporary bytes and time, beside the float model."""
    width = 256 if quick else 1024
    config = DecoderConfig(
        vocab_size=1024, hidden_size=width, num_layers=8, num_heads=width // 64,
        num_kv_heads=width // 128, head_dim=64, intermediate_size=3 * width,
        max_length=64, scan_layers=scan,
    )  # fmt: skip
    model, tokens = Decoder(config), jnp.zeros((1, 8), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    compiled = {"float32": (jax.jit(model.apply).lower(variables, tokens).compile(), variables)}
    for recipe in RECIPES:
        decorated = jq.quantize(recipe)(model)
        qvars = jq.ptq(decorated, variables, tokens, progress=False)
        compiled[recipe] = _compile(decorated, qvars, tokens), qvars
        with mock.patch.object(dot, "read_late", _at_once):
            compiled[f"{recipe}, no barriers"] = _compile(decorated, qvars, tokens), qvars
    calls: dict[str, Callable[[], Any]] = {
        name: lambda fn=fn, v=v: fn(v, tokens)  # type: ignore[misc]
        for name, (fn, v) in compiled.items()
    }
    rows, _ = race(calls, "float32", quick, seconds=60)
    for row in rows:
        memory = compiled[row["what"]][0].memory_analysis()
        row["temporary MB"] = memory.temp_size_in_bytes / 1e6
    floats = sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) / 1e6
    return Figure(
        title=f"Eight layers {'under scan' if scan else 'apart'}, 8 tokens",
        target="no more temporary memory than a few weights as floats",
        rows=rows,
        notes=[f"The parameters are {floats:.0f} MB as float32."],
    )


def _compile(model: Any, *args: Any) -> Any:
    jax.clear_caches()
    return jax.jit(lambda *args: model.apply(*args)).lower(*args).compile()


def _at_once(x: Any, quantized: Any, w: Any, act: Any) -> Any:
    """`read_late` without its effect."""
    del act
    return x, list(quantized), w


FIGURES = {
    "apart": lambda quick: reading(quick, scan=False),
    "scan": lambda quick: reading(quick, scan=True),
}


if __name__ == "__main__":
    harness.main("benchmarks.reading", FIGURES, tuple(FIGURES), "reading")
