"""Models of other projects under jaxquant: does their code run as it is, and is the result right?

    python -m benchmarks.outside_models [--only NAME ...] [--flax-examples DIR] [--json FILE]

For every model in `benchmarks.outside_adapters` whose package is installed:

* with float weights the decorated model gives the very bits of the undecorated one;
* the plan has a row for each product (dot, convolution) of the traced program, and every product
  of a parameter is quantized, none on a dequantized copy;
* w4a16 (groups of 32): the largest difference to the float model with the dequantized weights,
  relative to the largest output, which is rounding;
* w8a8: the signal-to-noise ratio to the float model, in dB;
* the quantized tree, saved and restored without a template, is the same bit by bit.

It prints a table in Markdown, which docs/compatibility.md shows. Install the packages with
``--no-deps`` in an environment of their own: some pin old versions of JAX's numpy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxquant as jq
from benchmarks import outside_adapters as adapters
from jaxquant.core.qtensor import is_qtensor

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
COLUMNS = ("package", "model", "float bits", "products", "quantized", "w4a16 error", "w8a8 dB")
COLUMNS += ("restored",)


def check(built: adapters.Built) -> dict[str, Any]:
    """The table's figures for one model."""
    model, args, kwargs = built.model, built.args, built.kwargs
    decorated = jq.quantize("w8a8")(model)
    tree = nnx.state(model) if built.tree is None else built.tree
    first = () if built.tree is None else (tree,)
    # What is no array is static: a flag, None.
    values, treedef = jax.tree.flatten((args, kwargs))
    fixed = {i: v for i, v in enumerate(values) if not hasattr(v, "dtype")}
    arrays = [v for i, v in enumerate(values) if i not in fixed]

    def run(model: Any, tree: Any, arrays: Any) -> Any:
        rest = iter(arrays)
        full = [fixed[i] if i in fixed else next(rest) for i in range(len(values))]
        args, kwargs = jax.tree.unflatten(treedef, full)
        if isinstance(model, nnx.Module):
            return nnx.merge(nnx.graphdef(model), tree, copy=True)(*args, **kwargs)
        call = model.apply if isinstance(model, nn.Module) else model
        return call(tree, *args, **kwargs)

    plain = jax.jit(lambda tree, arrays: run(model, tree, arrays))
    quantized = jax.jit(lambda tree, arrays: run(decorated, tree, arrays))
    wanted = plain(tree, arrays)
    plan = jq.explain(decorated, *first, *args, recipe="w4a16_g32", **kwargs)
    of_parameters = [r for r in plan.rows if r.kind not in ("other", "embed") and r.param]
    seen = sum(r.kind not in ("other", "embed") for r in plan.rows)
    traced = sum(_count(jax.make_jaxpr(plain)(tree, arrays).jaxpr))

    def ptq(recipe: str) -> Any:
        done = jq.ptq(decorated, *first, *args, recipe=recipe, progress=False, **kwargs)
        return nnx.state(done) if built.tree is None else done

    w4, w8 = ptq("w4a16_g32"), ptq("w8a8")
    with tempfile.TemporaryDirectory() as folder:
        # Trees of foreign classes (Equinox) are saved as the list of their leaves.
        leaves = jax.tree.leaves(w4, is_leaf=is_qtensor)
        jq.save(Path(folder) / "checkpoint", leaves)
        restored = jq.restore(Path(folder) / "checkpoint")
    return {
        "float bits": _same(quantized(tree, arrays), wanted),
        "products": f"{seen} of {traced}",
        "quantized": f"{sum(r.status == 'quantized' for r in of_parameters)} of "
        f"{len(of_parameters)}",
        "w4a16 error": f"{_error(quantized(w4, arrays), plain(jq.dequantize(w4), arrays)):.0e}",
        "w8a8 dB": f"{_decibels(quantized(w8, arrays), wanted):.0f}",
        "restored": _same(restored, leaves),
    }


def _count(jaxpr: Any) -> Iterator[int]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name in PRODUCTS
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_has_equations):
            if _has_equations(inner):
                yield from _count(getattr(inner, "jaxpr", inner))


def _has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _floats(tree: Any) -> list[Any]:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return [np.asarray(x, np.float64) for x in leaves]


def _same(got: Any, wanted: Any) -> bool:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in pairs
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    )


def _error(got: Any, wanted: Any) -> float:
    pairs = zip(_floats(got), _floats(wanted), strict=True)
    return max(float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1)) for a, b in pairs)


def _decibels(got: Any, wanted: Any) -> float:
    a, b = _floats(got)[0], _floats(wanted)[0]
    return float(10 * np.log10(np.sum(b**2) / np.sum((a - b) ** 2)))


def rows(only: list[str], examples: Path | None) -> Iterator[dict[str, Any]]:
    """One row for each model that can be had; what is missing is printed."""
    for package, adapter in adapters.PACKAGES.items():
        try:
            label = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            print(f"not installed: {package}")
            continue
        for name, build in adapter():
            if not only or any(text in f"{label} {name}" for text in only):
                yield {"package": label, "model": name, **check(build())}
    if examples is not None:
        for name, build in adapters.flax_examples(examples):
            if not only or any(text in f"flax examples {name}" for text in only):
                yield {"package": "flax examples", "model": name, **check(build())}


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--flax-examples", type=Path, help="Flax's examples/ folder")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    found = []
    for row in rows(options.only, options.flax_examples):
        found.append(row)
        print("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
