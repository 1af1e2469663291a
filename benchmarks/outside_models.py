"""Models of other projects under jaxquant: does their code run as it is, and is the result right?

    python -m benchmarks.outside_models [--only NAME ...] [--flax-examples DIR] [--json FILE]

For every model in `benchmarks.outside_adapters`, `benchmarks.outside_transformers` and
`benchmarks.outside_linen` whose package is installed:

* with float weights the decorated model gives the very bits of the undecorated one;
* the plan has a row for each product (dot, convolution) of the traced program, and every product
  of a parameter is quantized, none on a dequantized copy;
* w4a16 (groups of 32; w8a16 where a width has none): the largest difference to the float model
  with the dequantized weights, relative to the largest output, which is rounding;
* w8a8: the signal-to-noise ratio to the float model, in dB;
* the quantized tree, saved and restored without a template, is the same bit by bit.

It prints the rows, and with ``--json`` keeps them in FILE and, as a table, in FILE's ``.md``: rows
of earlier runs on the same versions and flags stay, those of the same model are replaced. A package
that cannot be imported and a model that fails have their reason there; the exit code is 1 if one
failed. Install the packages with ``--no-deps`` in an environment of their own: some pin old
versions of JAX's numpy. The kept tables were run with
``XLA_FLAGS=--xla_backend_optimization_level=0``, so that XLA does less on a busy CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
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
from benchmarks import outside_linen, outside_transformers
from jaxquant.core.qtensor import is_qtensor

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
COLUMNS = ("package", "model", "float bits", "products", "quantized", "recipe", "error")
COLUMNS += ("w8a8 dB", "restored")

PACKAGES: dict[str, Callable[[], Iterator[adapters.Named]]] = {
    "transformers": outside_transformers.transformers,
    "google-tunix": adapters.tunix,
    "gemma": adapters.gemma,
    "diffusers": outside_linen.diffusers,
    "jax-resnet": outside_linen.jax_resnet,
    "flaxmodels": outside_linen.flaxmodels,
    "keras": adapters.keras,
    "dm-haiku": adapters.haiku,
    "equinox": adapters.equinox,
    "equimo": adapters.equimo,
    "penzai": adapters.penzai,
}
"""Distribution name -> its adapter."""


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
    plan = jq.explain(decorated, *first, *args, recipe=built.recipe, **kwargs)
    of_parameters = [r for r in plan.rows if r.kind not in ("other", "embed") and r.param]
    seen = sum(r.kind not in ("other", "embed") for r in plan.rows)
    traced = sum(_count(jax.make_jaxpr(plain)(tree, arrays).jaxpr))

    def ptq(recipe: str) -> Any:
        done = jq.ptq(decorated, *first, *args, recipe=recipe, progress=False, **kwargs)
        return nnx.state(done) if built.tree is None else done

    coded, w8 = ptq(built.recipe), ptq("w8a8")
    with tempfile.TemporaryDirectory() as folder:
        # Trees of foreign classes (Equinox) are saved as the list of their leaves.
        leaves = jax.tree.leaves(coded, is_leaf=is_qtensor)
        jq.save(Path(folder) / "checkpoint", leaves)
        restored = jq.restore(Path(folder) / "checkpoint")
    return {
        "float bits": _same(quantized(tree, arrays), wanted),
        "products": f"{seen} of {traced}",
        "quantized": f"{sum(r.status == 'quantized' for r in of_parameters)} of "
        f"{len(of_parameters)}",
        "recipe": built.recipe,
        "error": f"{_error(quantized(coded, arrays), plain(jq.dequantize(coded), arrays)):.0e}",
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
    """One row for each model; a package that cannot be had is one row with the reason."""
    sources = dict(PACKAGES)
    if examples is not None:
        sources["flax examples"] = lambda: outside_linen.flax_examples(examples)
    for package, adapter in sources.items():
        label = package
        if package in PACKAGES:
            try:
                label += f" {importlib.metadata.version(package)}"
            except importlib.metadata.PackageNotFoundError:
                print(f"not installed: {package}")
                continue
        for name, build in adapter():
            row = {"package": label, "model": name}
            if only and not any(text in f"{label} {name}" for text in only):
                continue
            try:
                row |= check(build())
            except ImportError as error:
                row |= {"not run": str(error)}
            except Exception as error:  # noqa: BLE001 - a finding of the table; the others go on
                row |= {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            yield row


def _setting() -> dict[str, str]:
    """What a table's rows have in common."""
    names = ("jax", "jaxlib", "flax", "numpy")
    python = {"python": platform.python_version()}
    flags = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    return python | {n: importlib.metadata.version(n) for n in names} | flags


def _table(found: list[dict[str, Any]]) -> str:
    """All rows that ran in Markdown, then a line for each that did not."""
    ran = [row for row in found if "restored" in row]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in ran]
    for row in found:
        for word in ("not run", "failed"):
            if word in row:
                lines.append(f"\n{row['package']}, {row['model']}: {word}: {row[word]}")
    return "\n".join(lines) + "\n"


def _write(file: Path, row: dict[str, Any]) -> None:
    """Puts one row into ``file`` and its table beside it; rows of another setting go."""
    setting = _setting()
    kept = json.loads(file.read_text()) if file.exists() else {}
    old = kept["rows"] if kept.get("setting") == setting else []
    key = (row["package"], row["model"])
    found = [r for r in old if (r["package"], r["model"]) != key] + [row]
    order = [*PACKAGES, "flax examples"]
    found.sort(key=lambda r: next(i for i, p in enumerate(order) if r["package"].startswith(p)))
    command = "python -m benchmarks.outside_models --flax-examples DIR/examples --json FILE"
    file.write_text(json.dumps({"setting": setting, "command": command, "rows": found}, indent=1))
    head = "# Models of others, on the CPU: " + ", ".join(" ".join(v) for v in setting.items())
    file.with_suffix(".md").write_text(f"{head}\n\n`{command}`\n\n{_table(found)}")


def main() -> int:
    """Runs what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--flax-examples", type=Path, help="Flax's examples/ folder")
    parser.add_argument("--json", type=Path, help="file to keep the rows in")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = False
    for row in rows(options.only, options.flax_examples):
        print(json.dumps(row), flush=True)
        failed |= "failed" in row
        if options.json:
            _write(options.json, row)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
