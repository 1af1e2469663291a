"""`jaxquant demo`: the whole path on the shipped model, every step checked."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxquant as jq
from jaxquant.cli import target
from jaxquant.cli.commands import quantized
from jaxquant.cli.errors import UsageError
from jaxquant.cli.outcome import Outcome, say
from jaxquant.cli.trees import differences

if TYPE_CHECKING:
    from jaxquant.core.recipe import Recipe

_BATCHES = 3
_MARKER = "report.json"


def demo(args: argparse.Namespace) -> Outcome:
    """Quantizes, saves, restores and compares; writes checkpoints, report.html and report.json."""
    recipes = target.recipes(args.recipes)
    out = _fresh_folder(Path(args.out))
    chosen = target.shipped(args.batches or _BATCHES)
    trees: dict[str, Any] = {}
    checkpoints: dict[str, dict[str, Any]] = {}
    failures = []
    for name, recipe in recipes.items():
        say(f"{name}: quantize, save, restore")
        record, trees[name] = _round_trip(chosen, recipe, out / name)
        checkpoints[name] = record
        if record["differences"]:
            failures.append(f"{name}: restored, it differs in {', '.join(record['differences'])}")
    say(f"float model and {len(trees)} recipes: compare on {', '.join(chosen.data)}")
    report = jq.compare(
        chosen.quantizable(None),
        chosen.variables,
        trees,
        chosen.data,
        decode=_decoder(),
        latency=args.latency,
        title="jaxquant demo",
        command="jaxquant demo",
    )
    page = report.save_html(out / "report.html")
    report.save_json(out / _MARKER)
    return Outcome(
        data={
            "checkpoints": checkpoints,
            "html": str(page),
            "report": json.loads(report.to_json()),
        },
        shown=(report, _saved_table(checkpoints), f"Report with plots: {page}"),
        failures=tuple(failures),
    )


def _fresh_folder(out: Path) -> Path:
    """Empties the folder of an earlier demo; refuses any other that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / _MARKER).is_file():
            raise UsageError(f"{out} exists and is no earlier demo's; give another with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text("{}")
    return out


def _round_trip(
    chosen: target.Target, recipe: Recipe, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantizes, saves and restores; returns what was found, and the restored tree."""
    start = time.perf_counter()
    tree = quantized(chosen, chosen.quantizable(recipe))
    quantized_after = time.perf_counter()
    jq.save(path, tree, recipe=recipe)
    saved_after = time.perf_counter()
    restored = jq.restore(path)
    restored_after = time.perf_counter()
    record = {
        "path": str(path),
        "quantize_s": quantized_after - start,
        "save_s": saved_after - quantized_after,
        "restore_s": restored_after - saved_after,
        "disk_bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
        "differences": differences(tree, restored),
    }
    return record, restored


def _decoder() -> Any:
    from jaxquant.models import shipped

    return shipped.tokenizer().decode


def _saved_table(checkpoints: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="Saved with Orbax and restored")
    for column in ("recipe", "MB on disk", "quantize s", "save s", "restore s", "bit by bit"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for name, record in checkpoints.items():
        table.add_row(
            name,
            f"{record['disk_bytes'] / 1e6:.2f}",
            *(f"{record[key]:.2f}" for key in ("quantize_s", "save_s", "restore_s")),
            "[red]differs" if record["differences"] else "[green]equal",
        )
    return table
