"""`jq.smooth`: SmoothQuant for any model, folded into whatever feeds each group of weights.

Xiao et al. 2022, "SmoothQuant" (arXiv:2211.10438). Outliers of activations sit in a few channels.
Each input channel j of a group of weights is multiplied by s_j = max|X_j|^a / max|W_j|^(1-a), what
feeds the group is divided by it, and quantization of activations becomes easier at the cost of
that of weights. Which parameters take part is found by `jaxquant.passes.channel_flow`.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.algorithms.calibrate import Call, run_batches
from jaxquant.algorithms.transforms.subject import (
    Subject,
    split_arguments,
    subject_of,
    with_pass,
)
from jaxquant.core.transforms import Smooth, Unfoldable
from jaxquant.frontends.batches import call_arguments
from jaxquant.passes.channel_flow import Absorber, ChannelGroup, find_channel_groups
from jaxquant.passes.channel_labels import Array
from jaxquant.passes.fold_transforms import FACT, FoldTransforms, fold_parameters
from jaxquant.passes.insert_observers import read
from jaxquant.passes.observe_rules import observe_rules

STATISTIC = "channel_absmax"


def smooth(
    model: Any,
    *args: Any,
    calibration: Iterable[Any],
    alpha: float = 0.5,
    only: str | Sequence[str] = "**",
    unfoldable: Unfoldable = "leave",
    tolerance: float | None = None,
    **kwargs: Any,
) -> Any:
    """Moves outliers of activations into the weights; the float function stays.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      *args: Linen: the variables. Function: its parameters. NNX: nothing.
      calibration: batches: each is an array, a tuple of positional arguments or a mapping of
        keyword arguments. Read once.
      alpha: 0 looks at the weights only, 1 at the activations only.
      only: glob, or globs, over paths of weights (`fnmatch`; ``**`` is everything): the groups to
        smooth are those that one of their weights matches.
      unfoldable: what to do with a group that no parameter can be divided for: "leave" it,
        "refuse" with an error, or "multiply": an explicit operation divides its input.
      tolerance: how much the function may differ on the first batch, relative to its largest
        magnitude; by default 1e-5. A model of shorter floats is compared in float32.
      **kwargs: keyword arguments of the model, part of each batch.

    Returns:
      The float variables (parameters, NNX module) in the structure they came in, for `jq.ptq` as
      before. With ``unfoldable="multiply"`` the pair of a function of ``(tree, ...)`` and the tree,
      for ``jq.quantize(recipe)(fn)``.

    Raises:
      FoldError: a group cannot be folded and that is refused, or the function has changed.
      ValueError: no batch, ``alpha`` outside of [0, 1], ``only`` matches nothing, or the tree is
        quantized already.
    """
    Smooth(alpha, unfoldable)  # checks them
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration is empty: smooth needs a batch of data")
    variables, rest = split_arguments(model, args)
    if rest:
        raise ValueError("give batches as calibration=, not the model's arguments")
    calls = (
        (own, {**kwargs, **named})
        for own, named in (
            call_arguments(batch, f"calibration batch {number}")
            for number, batch in enumerate(itertools.chain([first], batches))
        )
    )
    example = next(calls)
    adapter, subject = subject_of(model, variables, example, "smooth")
    groups = find_channel_groups(subject.program)
    chosen = _chosen(groups, only)
    wanted = [group for group in groups if chosen & set(group.consumers)]
    found = channel_statistics(subject, itertools.chain([example], calls), wanted)

    def factors(group: ChannelGroup) -> Array | None:
        if not chosen & set(group.consumers):
            return None
        return smooth_factors(group, subject.parameters, found, alpha)

    step = FoldTransforms(factors, unfoldable)
    program = step.run(subject.program).program
    fold = functools.partial(fold_parameters, factors=program.facts[FACT])
    tree = subject.after(program, fold, tolerance)
    if unfoldable != "multiply":
        return adapter.with_tree(tree)
    return with_pass(subject.fn, subject.paths, step, adapter.name), tree


def channel_statistics(
    subject: Subject, calls: Iterable[Call], groups: Sequence[ChannelGroup]
) -> dict[str, dict[str, Any]]:
    """The largest magnitude in each channel of what the weights of some groups multiply.

    Args:
      subject: the float function and its parameters.
      calls: arguments of each batch.
      groups: groups of its program.

    Returns:
      ``{path: {"channel_absmax": array}}``, one leading axis for each scan around the product.

    Raises:
      ValueError: there is no batch, something is not finite, or no batch reaches a product.
    """
    observed = [weight.path for group in groups for weight in _weights(group)]
    if not observed:
        return {}
    rules = observe_rules(dict.fromkeys(observed, STATISTIC))
    run = run_batches(subject.fn, subject.tree, subject.paths, calls, rules)
    found = read(run.seen, run.statistics)
    unseen = [path for path in observed if path not in found]
    if unseen:
        raise ValueError(f"no calibration batch reaches the product that {unseen[0]!r} is used in")
    return found


def smooth_factors(
    group: ChannelGroup,
    parameters: Mapping[str, Any],
    statistics: Mapping[str, Mapping[str, Any]],
    alpha: float,
) -> Array:
    """SmoothQuant's factors of one group, by number.

    Args:
      group: a group of `find_channel_groups`.
      parameters: arrays by path.
      statistics: by path of a weight the "channel_absmax" of its input.
      alpha: the migration strength.

    Returns:
      ``[group.count]``. Channels that share a factor count as one; a channel that is zero
      throughout keeps the factor 1.

    Raises:
      ValueError: statistics of another shape than the weight's channels.
    """
    x, w = np.zeros(group.count + 1), np.zeros(group.count + 1)
    for weight in group.weights:
        numbers = np.abs(weight.factors)
        magnitude = np.abs(np.asarray(parameters[weight.path], np.float32))
        rest = tuple(a for a, n in enumerate(numbers.shape) if n == 1)
        own = 1 / float(weight.power)  # as if it were multiplied by the factors themselves
        np.maximum.at(w, numbers, magnitude.max(axis=rest, keepdims=True) ** own)
        seen = _at_weight(
            np.asarray(statistics[weight.path][STATISTIC]), magnitude.shape, numbers.shape
        )
        if seen is None:
            raise ValueError(
                f"the statistics of the input of {weight.path!r} are of other channels than "
                f"{numbers.shape} in the program: leave it out (jaxquant.smooth: only=; a recipe: "
                "a rule with transforms=False)"
            )
        np.maximum.at(x, numbers, seen**own)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.maximum(x**alpha / w ** (1 - alpha), 1e-5)
    return np.where((x > 0) & (w > 0), factors, 1.0)[1:]


def _at_weight(seen: Array, weight: Sequence[int], numbers: Sequence[int]) -> Array | None:
    """Statistics laid out over a weight's axes; the largest over experts that share a factor.

    Args:
      seen: magnitudes, of layers, experts and channels, in the order of the weight's axes.
      weight: shape of the weight.
      numbers: shape of its factors: axes of the weight, or of size one.

    Returns:
      An array of the shape ``numbers``, or None where the statistics are of other channels.
    """
    if seen.size == math.prod(numbers):
        return seen.reshape(numbers)
    for axis, (whole, own) in enumerate(zip(weight, numbers, strict=True)):
        full = [*numbers[:axis], whole, *numbers[axis + 1 :]]
        if own == 1 and [n for n in full if n > 1] == [n for n in seen.shape if n > 1]:
            return seen.reshape(full).max(axis=axis, keepdims=True)
    return None


def _weights(group: ChannelGroup) -> tuple[Absorber, ...]:
    """The weights that may take factors, if need be behind an explicit operation."""
    return (group if group.foldable or group.explicit is None else group.explicit).weights


def _chosen(groups: Sequence[ChannelGroup], only: str | Sequence[str]) -> set[str]:
    globs = [only] if isinstance(only, str) else list(only)
    paths = [path for group in groups for path in group.consumers]
    chosen = {p for p in paths if any(fnmatch.fnmatchcase(p, g) for g in globs)}
    if not chosen:
        raise ValueError(
            f"only={only!r} matches no weight with an input to smooth; there are: "
            + ", ".join(dict.fromkeys(paths))
        )
    return chosen
