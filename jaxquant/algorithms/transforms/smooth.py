"""`jq.smooth`: SmoothQuant for any model, folded into whatever feeds each group of weights.

Xiao et al. 2022, "SmoothQuant" (arXiv:2211.10438). Outliers of activations sit in a few channels.
Each input channel j of a group of weights is multiplied by s_j = max|X_j|^a / max|W_j|^(1-a), what
feeds the group is divided by it, and quantization of activations becomes easier at the cost of
that of weights. Which parameters take part is found by `jaxquant.passes.channel_flow`.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxquant.algorithms.calibrate import calibrate
from jaxquant.algorithms.transforms.subject import Subject, split_arguments
from jaxquant.frontends.batches import call_arguments
from jaxquant.passes.channel_flow import Absorber, ChannelGroup, find_channel_groups
from jaxquant.passes.channel_labels import Array
from jaxquant.passes.fold_transforms import FACT, FoldTransforms, fold_parameters

Unfoldable = Literal["leave", "refuse", "multiply"]
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
        magnitude; by default 1e-5, and 0.05 where the model computes in less than float32.
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
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be between 0 and 1")
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration is empty: smooth needs a batch of data")
    variables, rest = split_arguments(model, args)
    if rest:
        raise ValueError("give batches as calibration=, not the model's arguments")
    own, named = call_arguments(first, "calibration batch 0")
    subject = Subject(model, variables, own, {**kwargs, **named}, "smooth")
    groups = find_channel_groups(subject.program)
    chosen = _chosen(groups, only)
    found: Mapping[str, Mapping[str, Any]] = {}
    observed = [w.path for g in groups if chosen & set(g.consumers) for w in _weights(g)]
    if observed:
        found = calibrate(
            model, *args, calibration=itertools.chain([first], batches),
            statistics=dict.fromkeys(observed, STATISTIC), **kwargs,
        )  # fmt: skip

    def factors(group: ChannelGroup) -> Array | None:
        if not chosen & set(group.consumers):
            return None
        return smooth_factors(group, subject.parameters, found, alpha)

    step = FoldTransforms(factors, unfoldable)
    program = step.run(subject.program).program
    new = fold_parameters(subject.parameters, program.facts[FACT])
    tree = subject.with_parameters(new)
    subject.check(program, tree, tolerance)
    return subject.result(tree, step if unfoldable == "multiply" else None)


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
        np.maximum.at(w, numbers, magnitude.max(axis=rest, keepdims=True))
        seen = np.asarray(statistics[weight.path][STATISTIC])
        if seen.size != numbers.size:
            raise ValueError(
                f"the input of {weight.path!r} has {seen.shape} channels in its statistics and "
                f"{numbers.shape} in the program: leave its group out with only="
            )
        np.maximum.at(x, numbers, seen.reshape(numbers.shape))
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.maximum(x**alpha / w ** (1 - alpha), 1e-5)
    return np.where((x > 0) & (w > 0), factors, 1.0)[1:]


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
