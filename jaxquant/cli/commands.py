"""The commands explain, quantize, inspect and compare."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from etils import epath

import jaxquant as jq
from jaxquant.algorithms.planning import require_quantized
from jaxquant.cli import target
from jaxquant.cli.errors import UsageError
from jaxquant.cli.outcome import Outcome
from jaxquant.cli.target import recipe_of

if TYPE_CHECKING:
    from jaxquant.evaluate.report import Report


def explain(args: argparse.Namespace) -> Outcome:
    """`jaxquant explain`: the plan of a recipe."""
    recipe = target.recipe(args.recipe)
    chosen = target.load(args.model, args.checkpoint, shapes_only=True)
    plan = jq.explain(chosen.quantizable(recipe), *chosen.arguments)
    failures = []
    if args.strict:
        try:
            require_quantized(plan)
        except jq.StrictError as error:
            failures.append(str(error))
    return Outcome(data=plan.to_json(), shown=(plan,), failures=tuple(failures))


def quantize(args: argparse.Namespace) -> Outcome:
    """`jaxquant quantize`: quantize and save."""
    recipe = target.recipe(args.recipe)
    out = epath.Path(args.out)
    if out.exists() and not args.overwrite:
        raise UsageError(f"{out} exists; --overwrite replaces it")
    chosen = target.load(args.model, args.checkpoint)
    model = chosen.quantizable(recipe)
    tree = quantized(chosen, model)
    jq.save(out, tree, recipe=recipe_of(model), overwrite=args.overwrite)
    return inspection(out, verify=False)


def inspect(args: argparse.Namespace) -> Outcome:
    """`jaxquant inspect`: what a checkpoint holds, and whether it is intact."""
    return inspection(target.existing(args.checkpoint), verify=args.verify)


def inspection(path: epath.Path, *, verify: bool) -> Outcome:
    """What a checkpoint says of itself; with `verify` every array is read and checked too."""
    info = jq.inspect(path)
    if verify:
        jq.restore(path)
    seal = ("Every array matches its checksum.",) if verify else ()
    return Outcome(data={**info.to_json(), "verified": verify}, shown=(info, *seal))


def compare(args: argparse.Namespace) -> Outcome:
    """`jaxquant compare`: quality, bytes and speed beside the float model."""
    paths = [target.existing(text) for text in args.quantized]
    if args.html and not epath.Path(args.html).parent.is_dir():
        raise UsageError(f"--html {args.html}: there is no such folder")
    names = args.recipes if args.recipes or paths else ["w8a8"]
    recipes = target.recipes(names)
    chosen = target.load(args.model, args.checkpoint, args.batches)
    if not chosen.data:
        raise UsageError(f"--model {args.model}: the factory's mapping has no data to compare on")
    candidates = {
        name: quantized(chosen, chosen.quantizable(recipe)) for name, recipe in recipes.items()
    }
    for path in paths:
        if path.name in candidates:
            raise UsageError(f"two candidates are named {path.name}")
        candidates[path.name] = chosen.restore(path)
    report = jq.compare(
        chosen.quantizable(None),
        chosen.variables,
        candidates,
        chosen.data,
        metrics=chosen.metrics or None,
        latency=args.latency,
        title=f"{chosen.name}: float and quantized",
    )
    failures = beyond_limits(report, args.max_kl, args.min_agreement)
    if args.html:
        report.save_html(args.html)
    return Outcome(
        data=json.loads(report.to_json()),
        shown=(report, f"Report with plots: {args.html}") if args.html else (report,),
        failures=tuple(failures),
    )


def quantized(chosen: target.Target, model: Any) -> Any:
    """The target's weights under a decorated model's recipe: a tree (NNX: a model)."""
    return jq.ptq(model, *chosen.arguments, calibration=chosen.calibration or None)


def beyond_limits(
    report: Report, max_kl: float | None, min_agreement: float | None
) -> Iterator[str]:
    """One line for every recipe and limit that it exceeds.

    Raises:
      UsageError: a limit was given on something that these outputs do not have.
    """
    for result in report.recipes:
        quality = result.overall
        if max_kl is not None:
            if report.kind == "values" or quality.divergence is None:
                raise UsageError("--max-kl needs logits; this model's outputs are plain values")
            if not quality.divergence.mean.value <= max_kl:
                found = quality.divergence.mean.value
                yield f"{result.name}: KL {found:.4g} is above the limit {max_kl:g}"
        if min_agreement is not None:
            if quality.agreement is None:
                raise UsageError("--min-agreement needs logits; these outputs are plain values")
            if not quality.agreement.value >= min_agreement:
                found = quality.agreement.value
                yield f"{result.name}: agreement {found:.4g} is below the limit {min_agreement:g}"
