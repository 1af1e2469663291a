"""`jaxquant demo`: the whole path on the shipped model, every step checked."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
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
# Names what a demo wrote into its folder, one entry a line: a later one deletes these, no others.
_MARKER = ".jaxquant-demo"


def demo(args: argparse.Namespace) -> Outcome:
    """Quantizes, saves, restores and compares; writes checkpoints, report.html and report.json."""
    recipes = target.recipes(args.recipes)
    out = _fresh_folder(Path(args.out), (*recipes, "report.html", "report.json"))
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
    report.save_json(out / "report.json")
    return Outcome(
        data={
            "checkpoints": checkpoints,
            "html": str(page),
            "report": json.loads(report.to_json()),
        },
        shown=(report, _saved_table(checkpoints), f"Report with plots: {page}"),
        failures=tuple(failures),
    )


def _fresh_folder(out: Path, names: Sequence[str]) -> Path:
    """A folder for `names`: what an earlier demo wrote there is deleted, and nothing else.

    Raises:
      UsageError: something is in the way that no demo wrote.
    """
    marker = out / _MARKER
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.is_file())):
        raise UsageError(f"{out} exists and is no earlier demo's; give another with --out")
    out.mkdir(parents=True, exist_ok=True)
    earlier = marker.read_text(encoding="utf-8").splitlines() if marker.exists() else []
    for entry in out.iterdir():
        if entry.name in names and entry.name not in earlier:
            raise UsageError(f"{entry} is in the way and no earlier demo's; give another --out")
    for entry in [entry for entry in out.iterdir() if entry.name in earlier]:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    marker.write_text("\n".join(names), encoding="utf-8")
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
