"""``jq.compare``: what a recipe costs in quality and saves in bytes and time, measured.

For: users, the command line and the demo. It runs every batch once through the float model and once
through each recipe, reduces the outputs to a few numbers on the device, and hands them to
:mod:`jaxquant.evaluate.summary`. It must never hold the logits of more than one batch, and never
report a number it did not measure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxquant.evaluate.batches import Call, named_slices
from jaxquant.evaluate.candidates import float_and_recipes
from jaxquant.evaluate.environment import describe_environment
from jaxquant.evaluate.latency import LatencyOptions, measure_latency, speedup
from jaxquant.evaluate.layers import layer_axes
from jaxquant.evaluate.progress import track
from jaxquant.evaluate.reading import Kind, Reader
from jaxquant.evaluate.report import Report
from jaxquant.evaluate.results import RecipeResult, Speed, WorstExample
from jaxquant.evaluate.runner import Runner
from jaxquant.evaluate.scores import worst_of
from jaxquant.evaluate.session import Metric, Session
from jaxquant.evaluate.summary import Summarizer
from jaxquant.evaluate.trees import measure_memory, weight_errors


def compare(
    model: Any,
    variables: Any,
    qvars: Any,
    data: Any,
    *,
    metrics: Mapping[str, Metric] | None = None,
    loss: Metric | None = None,
    inputs: Callable[[Any], Any] | None = None,
    outputs: Kind | Literal["auto"] = "auto",
    logits: Callable[[Any], Any] | None = None,
    targets: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    names: str | Sequence[str] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    latency: bool | LatencyOptions = True,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    worst: int = 10,
    on_nonfinite: Literal["raise", "flag"] = "raise",
    progress: bool = True,
    title: str = "jaxquant comparison",
    command: str | None = None,
) -> Report:
    """Measures quantized models against the float one: quality, bytes, speed.

    Next-token logits ``[B, T, V]`` beside integer tokens ``[B, T]`` get a loss and a perplexity of
    their own. These and class logits ``[B, C]`` get KL(float || quantized) and top-1 agreement per
    position; other outputs get the relative error and the signal-to-noise ratio instead, and the
    report says so.

    Args:
      model: a Linen module, an NNX module or a function of ``(params, *args, **kwargs)``; decorated
        with ``@jq.quantize`` or not.
      variables: the float variables or parameters; None for NNX, whose float model is ``model``.
      qvars: a quantized tree (NNX: model), or a mapping of recipe name to these. A tree without any
        QTensor is welcome too (a bfloat16 copy, say).
      data: a mapping of slice name to an iterable of batches, or one such iterable. A batch is an
        array, a tuple of positional arguments or a mapping of keyword arguments. Each iterable is
        walked once.
      metrics: name to ``fn(outputs, batch)``, which returns one number per example ``[B]`` or a
        scalar; ``outputs`` are the model's own.
      loss: replaces the next-token loss, called as a metric is. No perplexity is made of it.
      inputs: ``fn(batch)`` returning what of a batch the model takes, as array, tuple or mapping,
        for batches that also hold labels.
      outputs: how to read the outputs: "tokens", "classes", "values", or "auto" from their shape.
      logits: ``fn(outputs)`` returning the array to read, for models that return more than one.
      targets: ``fn(batch)`` returning the class to predict at each position ``[B, T]`` (or
        ``[B]``), negative for none; default: the next token.
      mask: ``fn(batch)`` returning the positions that count ``[B, T]`` (or ``[B]``); default all.
      names: the recipe's name where ``qvars`` is one tree, or names where it is a sequence of
        trees.
      decode: token ids to text, for the worst examples.
      latency: whether and how to time all candidates, on the first batch.
      resamples: bootstrap resamples over examples; 0 for no intervals.
      level: coverage of the intervals.
      seed: of the resamples.
      worst: how many worst examples to keep per recipe, at most one per row; 0 for none.
      on_nonfinite: "raise" stops at a recipe's first NaN or infinite output; "flag" goes on, counts
        the position as infinitely far and lists it in the report. The float model's always raise.
      progress: whether to show a progress bar (on terminals only).
      title: of the report.
      command: shown in the report; default the process's own arguments.

    Returns:
      A :class:`Report`.

    Raises:
      ValueError: for an empty slice, outputs of different shapes, non-finite outputs, or where
        there is nothing to measure. Each names the recipe, slice and batch.
      TypeError: for slices, batches, trees or options of a wrong kind.
    """
    _check_options(metrics, latency, seed, worst)
    if on_nonfinite not in ("raise", "flag"):
        raise ValueError(f"on_nonfinite is 'raise' or 'flag'; got {on_nonfinite!r}")
    slices = named_slices(data)
    floating, recipes = float_and_recipes(model, variables, qvars, names)
    summarizer = Summarizer(resamples, level, seed)
    reader = Reader(outputs, logits, targets, mask)
    raising = on_nonfinite == "raise"
    session = Session(floating, recipes, reader, dict(metrics or {}), loss, inputs, worst, raising)
    for name, batches in track(slices, progress):
        session.run_slice(name, batches)
    assert session.first is not None and reader.kind is not None
    speeds = {}
    if latency:
        options = latency if isinstance(latency, LatencyOptions) else LatencyOptions()
        speeds = _speeds([floating, *recipes], session.first, session.items, options)
    stacked = layer_axes(floating.fn, floating.tree, session.first)
    results = []
    for runner in (floating, *recipes):
        results.append(_result(session, runner, summarizer, speeds, stacked, decode, worst))
    return Report(
        title=title,
        kind=reader.kind,
        float_model=results[0],
        recipes=tuple(results[1:]),
        environment=describe_environment(command),
        settings={
            "resamples": resamples,
            "level": level,
            "seed": seed,
            "latency_batch": session.first.describe(),
            "items": "tokens" if reader.kind == "tokens" else "examples",
            "own_loss": loss is None,
        },
    )


def _check_options(metrics: Any, latency: Any, seed: Any, worst: Any) -> None:
    """Refuses what would only fail, or be misread, after the models have run."""
    if not isinstance(metrics, Mapping | None) or not all(map(callable, (metrics or {}).values())):
        raise TypeError(f"metrics= is a mapping of name to fn(outputs, batch); got {metrics!r}")
    if not isinstance(latency, bool | LatencyOptions):
        raise TypeError(f"latency= is True, False or LatencyOptions; got {latency!r}")
    for name, number in (("seed", seed), ("worst", worst)):
        if type(number) is not int or number < 0:
            raise ValueError(f"{name}= is an integer of at least 0; got {number!r}")


def _speeds(
    runners: Sequence[Runner], call: Call, items: int, options: LatencyOptions
) -> dict[str, Speed]:
    timings = measure_latency({runner.name: runner.bind(call) for runner in runners}, options)
    base = timings[runners[0].name]
    speeds = {}
    for runner in runners:
        timing, spent = timings[runner.name], runner.compile_times[0]
        ratio = None if runner is runners[0] else speedup(base, timing)
        speeds[runner.name] = Speed(
            timing, ratio, items / timing.median_s, spent.trace_s, spent.compile_s
        )
    return speeds


def _result(
    session: Session,
    runner: Runner,
    summarizer: Summarizer,
    speeds: dict[str, Speed],
    stacked: Mapping[str, tuple[int, ...]],
    decode: Callable[[Sequence[int]], str] | None,
    keep: int,
) -> RecipeResult:
    scores = session.scores[runner.name]
    is_float = runner is session.floating
    base = None if is_float else session.scores[session.floating.name]
    own = session.loss is None
    tree = session.floating.tree
    found = worst_of((example for s in scores for example in s.worst()), keep)
    return RecipeResult(
        name=runner.name,
        overall=summarizer.quality(scores, base, own),
        slices={
            s.slice: summarizer.quality([s], None if base is None else [base[i]], own)
            for i, s in enumerate(scores)
        },
        memory=measure_memory(tree, runner.tree),
        speed=speeds.get(runner.name),
        weights=() if is_float else weight_errors(tree, runner.tree, stacked),
        survival=() if is_float else summarizer.survival(scores),
        worst=tuple(_decoded(example, decode) for example in found),
        flags=tuple(flag for s in scores for flag in s.flags),
    )


def _decoded(example: WorstExample, decode: Callable[[Sequence[int]], str] | None) -> WorstExample:
    if decode is None or not example.tokens:
        return example

    def text(token: int | None) -> str:
        return "" if token is None else str(decode([token]))

    return dataclasses.replace(
        example,
        context_text=str(decode(list(example.tokens))),
        float_text=text(example.float_top),
        quantized_text=text(example.quantized_top),
        target_text=text(example.target),
    )
