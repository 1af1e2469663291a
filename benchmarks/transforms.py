"""What smoothing and rotation are worth on the trained model: KL to the float model.

    python -m benchmarks.transforms

Calibrates on one batch of 8x256 tokens of every held-out slice and scores on two others of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import jaxquant as jq
from jaxquant.models import shipped


def main() -> None:
    """Prints one line for each recipe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transforms")
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a8", "w4a16_g64"])
    given = parser.parse_args()
    slices = shipped.held_out(8, 256)
    calibration = [batches[0] for batches in slices.values()]
    scored = [batch for batches in slices.values() for batch in batches[2:4]]
    print("| recipe | as it is | smooth | rotate, online |\n|---|---|---|---|")
    for recipe in given.recipes:
        figures = (f"{kl:.3g}" for kl in _figures(recipe, calibration, scored))
        print(f"| {recipe} | {' | '.join(figures)} |", flush=True)


def _figures(recipe: str, calibration: Sequence[Any], scored: Sequence[Any]) -> list[float]:
    model, variables = shipped.load()
    smoothed = jq.smooth(model, variables, calibration=calibration)
    turned, rotated = jq.rotate(model, variables, calibration[0], online=True)
    plain, turned = jq.quantize(recipe)(model), jq.quantize(recipe)(turned)
    want = [jax.nn.log_softmax(model.apply(variables, batch)) for batch in scored]
    found = []
    for subject, tree, call in (
        (plain, variables, plain.apply),
        (plain, smoothed, plain.apply),
        (turned, rotated, turned),
    ):
        quantized = jq.ptq(subject, tree, calibration[0], progress=False)
        found.append(_divergence(jax.jit(call), quantized, scored, want))
    return found


def _divergence(
    call: Callable[..., Any], tree: Any, scored: Sequence[Any], want: Sequence[Any]
) -> float:
    """Mean KL divergence in nats a token."""
    values = []
    for batch, a in zip(scored, want, strict=True):
        b = jax.nn.log_softmax(call(tree, batch))
        values.append(float(np.mean(np.sum(np.exp(a) * (a - b), -1))))
    return float(np.mean(values))


if __name__ == "__main__":
    main()
