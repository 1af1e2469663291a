"""What recipes with transforms are worth on the trained model: KL to the float model, and its tail.

    python -m benchmarks.transforms --out benchmarks/results

Each recipe is quantized as it is and with transforms, through `jq.ptq` alone. Calibrates on one
batch of 8x256 tokens of every held-out slice and scores on two others of each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxquant as jq
from jaxquant.models import shipped

RECIPES = ("w8a8", "w8a8_static", "w4a8", "w4a16_g64")
TRANSFORMS: dict[str, tuple[Any, ...]] = {
    "as it is": (),
    "smooth": (jq.Smooth(),),
    "smooth, multiply": (jq.Smooth(unfoldable="multiply"),),
    "rotate": (jq.Rotate(),),
    "rotate, multiply": (jq.Rotate(unfoldable="multiply"),),
    "rotate, multiply; smooth": (jq.Rotate(unfoldable="multiply"), jq.Smooth()),
}
_COMMAND = "python -m benchmarks.transforms --out benchmarks/results"


def main() -> None:
    """Measures, prints a line for each candidate, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transforms")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--out", type=Path, help="folder for transforms.json and transforms.md")
    given = parser.parse_args()
    model, variables = shipped.load()
    slices = shipped.held_out(8, 256)
    calibration = [batches[0] for batches in slices.values()]
    scored = [batch for batches in slices.values() for batch in batches[2:4]]
    want = [jax.nn.log_softmax(model.apply(variables, batch)) for batch in scored]
    rows = []
    for name in given.recipes:
        for transforms, steps in TRANSFORMS.items():
            recipe = jq.get_recipe(name).with_transforms(*steps)
            row = {"recipe": name, "transforms": transforms}
            row |= _figures(model, variables, recipe, calibration, scored, want)
            rows.append(row)
            print(_line(row), flush=True)
    if given.out is not None:
        record = {
            "command": _COMMAND, "jax": jax.__version__, "device": jax.devices()[0].device_kind,
            "tokens": sum(batch.size for batch in scored), "rows": rows,
        }  # fmt: skip
        (given.out / "transforms.json").write_text(json.dumps(record, indent=1) + "\n")
        (given.out / "transforms.md").write_text(_page(record))


def _figures(
    model: Any,
    variables: Any,
    recipe: Any,
    calibration: Sequence[Any],
    scored: Sequence[Any],
    want: Sequence[Any],
) -> dict[str, float]:
    """KL divergence in nats a token: the mean, and the tail; and what the weights take."""
    model = jq.quantize(recipe)(model)
    tree = jq.ptq(model, variables, calibration=calibration, progress=False)
    apply = jax.jit(model.apply)
    found = []
    for batch, a in zip(scored, want, strict=True):
        b = jax.nn.log_softmax(apply(tree, batch))
        found.append(np.sum(np.exp(a) * (np.asarray(a) - np.asarray(b)), -1).ravel())
    kl = np.concatenate(found)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jq.QTensor))
    return {
        "mean": float(kl.mean()), "p99": float(np.quantile(kl, 0.99)),
        "p999": float(np.quantile(kl, 0.999)), "max": float(kl.max()),
        "bytes": sum(leaf.nbytes for leaf in leaves),
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    figures = " | ".join(f"{row[key]:.3g}" for key in ("mean", "p99", "p999", "max"))
    return f"| {row['recipe']} | {row['transforms']} | {figures} | {row['bytes'] / 1e6:.2f} |"


def _page(record: dict[str, Any]) -> str:
    head = (
        "# Transforms in recipes, on the trained model\n\n"
        f"`{record['command']}`, jax {record['jax']} on {record['device']}: KL to the float model\n"
        f"in nats a token, {record['tokens']} held-out tokens.\n\n"
        "| recipe | transforms | mean | 99 % | 99.9 % | largest | MB |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(map(_line, record["rows"])) + "\n"


if __name__ == "__main__":
    main()
