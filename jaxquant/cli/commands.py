"""The commands explain, quantize, inspect and compare."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxquant as jq
from jaxquant.cli import target
from jaxquant.cli.errors import UsageError
from jaxquant.cli.outcome import Outcome

if TYPE_CHECKING:
    from jaxquant.core.recipe import Recipe


def explain(args: argparse.Namespace) -> Outcome:
    """`jaxquant explain`: the plan of a recipe."""
    recipe = target.recipe(args.recipe)
    chosen = target.load(args.model, args.checkpoint)
    plan = jq.explain(
        chosen.quantizable(recipe), chosen.variables, *chosen.example, strict=args.strict
    )
    return Outcome(data=_plain(plan.to_json()), shown=(plan,))


def quantize(args: argparse.Namespace) -> Outcome:
    """`jaxquant quantize`: quantize and save."""
    recipe = target.recipe(args.recipe)
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise UsageError(f"{out} exists; --overwrite replaces it")
    chosen = target.load(args.model, args.checkpoint)
    tree = quantized(chosen, recipe)
    if out.exists():
        shutil.rmtree(out)
    jq.save(out, tree)
    return inspection(out, verify=False)


def inspect(args: argparse.Namespace) -> Outcome:
    """`jaxquant inspect`: what a checkpoint holds, and whether it is intact."""
    return inspection(target.existing(args.checkpoint), verify=args.verify)


def compare(args: argparse.Namespace) -> Outcome:
    """`jaxquant compare`: quality, bytes and speed beside the float model."""
    recipes = [target.recipe(text) for text in args.recipes]
    paths = [target.existing(text) for text in args.quantized]
    if not recipes and not paths:
        recipes = [target.recipe("w8a8")]
    chosen = target.load(args.model, args.checkpoint, args.batches)
    if not chosen.data:
        raise UsageError(f"--model {args.model}: the factory's mapping has no data to compare on")
    candidates = {recipe.name: quantized(chosen, recipe) for recipe in recipes}
    for path in paths:
        if path.name in candidates:
            raise UsageError(f"two candidates are named {path.name}")
        candidates[path.name] = jq.restore(path)
    model = chosen.quantizable(None)
    report = jq.compare(
        model, chosen.variables, candidates, chosen.data, metrics=chosen.metrics or None
    )
    if args.html:
        report.save_html(args.html)
    return Outcome(
        data=json.loads(report.to_json()),
        shown=(report, f"report: {args.html}") if args.html else (report,),
        failures=tuple(beyond_limits(report, args.max_kl, args.min_agreement)),
    )


def quantized(chosen: target.Target, recipe: Recipe | None) -> Any:
    """The target's weights under a recipe, as a tree (NNX: a model)."""
    return jq.ptq(
        chosen.quantizable(recipe),
        chosen.variables,
        *chosen.example,
        calibration=chosen.calibration or None,
    )
