"""`Smooth` in a recipe: which inputs get factors, and where these go.

Called by `apply`. The analysis is `jaxquant.passes.channel_flow`, the factors are those of
`jaxquant.smooth`; here the recipe's rules are brought to bear, and what becomes of each input is
written down.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxquant.algorithms.transforms.smooth import channel_statistics, smooth_factors
from jaxquant.algorithms.transforms.subject import Subject
from jaxquant.algorithms.transforms.work import Work
from jaxquant.core.transforms import Smooth
from jaxquant.passes.channel_flow import ChannelGroup, find_channel_groups, unseen_weights
from jaxquant.passes.fold_transforms import FACT, FoldTransforms, fold_parameters, group_factors
from jaxquant.passes.plan import TransformRow


def apply_smooth(work: Work, transform: Smooth, subject: Subject) -> None:
    """Scales the channels of every input that the recipe wants scaled.

    Raises:
      ValueError: there is no batch.
      FoldError: something is refused, or the function has changed.
    """
    groups = find_channel_groups(subject.program)
    rows = [_smoothed(work, transform, group) for group in groups]
    told = {path for group in groups for path in group.consumers}
    work.settle(transform, [*rows, *_unseen(work, transform, subject, told)])
    chosen: dict[tuple[str, ...], ChannelGroup] = {}
    explicit: list[ChannelGroup] = []
    for row, group in zip(rows, groups, strict=True):
        if row.status == "multiply":
            assert group.explicit is not None
            explicit.append(group.explicit)
            chosen[group.explicit.consumers] = group.explicit
        elif row.status == "folded":
            chosen[group.consumers] = group
    values = _values(work, transform, subject, chosen)

    def factors(group: ChannelGroup) -> Any:
        return values.get(group.consumers)

    step = FoldTransforms(factors, "multiply" if explicit else "leave")
    program = step.run(subject.program).program
    for group in explicit:
        for path, array in group_factors(group, values[group.consumers]).items():
            work.multiply(path, 1 / array, group.consumers)
    fold = functools.partial(fold_parameters, factors=program.facts[FACT])
    work.take(subject, step, program, fold)


def _unseen(
    work: Work, transform: Smooth, subject: Subject, told: set[str]
) -> Iterator[TransformRow]:
    """Weights that are in no group."""
    unseen = unseen_weights(subject.program)
    refuses = transform.unfoldable == "refuse"
    for path in dict.fromkeys(work.read.values()):
        if path is not None and path not in told:
            why = work.not_wanted((path,))
            other = unseen.get(path, "no product sums over channels of its input")
            row = functools.partial(TransformRow, "smooth", (path,), reason=why or other)
            yield row("refused") if refuses and not why else row("left")


def _smoothed(work: Work, transform: Smooth, group: ChannelGroup) -> TransformRow:
    """What becomes of a group."""
    row = functools.partial(TransformRow, "smooth", group.consumers)
    why = work.not_wanted(group.consumers)
    if why:
        return row("left", reason=why)
    obstacles = "; ".join(group.obstacles)
    if group.foldable:
        into = tuple(absorber.path for absorber in group.producers)
        why = work.kept_among(into)
        if why:
            return row("left", reason=why)
        kept = int(np.count_nonzero(group.channels == 0))
        reason = f"{kept} of {group.channels.size} channels stay: {obstacles}" if kept else ""
        return row("folded", into, reason)
    if transform.unfoldable != "multiply":
        refuses = transform.unfoldable == "refuse"
        return row("refused" if refuses else "left", reason=obstacles)
    explicit = group.explicit
    why = "the weight cannot take factors alone" if explicit is None else work.not_storable(
        [weight.path for weight in explicit.weights]
    )  # fmt: skip
    if why:
        return row("left", reason=f"{why}; {obstacles}")
    return row("multiply", reason=obstacles)


def _values(
    work: Work,
    transform: Smooth,
    subject: Subject,
    chosen: Mapping[tuple[str, ...], ChannelGroup],
) -> dict[tuple[str, ...], Any]:
    """Factors by number, of each group; ones where nothing is computed."""
    if not work.computes:
        return {consumers: np.ones(group.count) for consumers, group in chosen.items()}
    if not work.calls:
        raise ValueError(
            f"{work.name(transform)} needs statistics of activations: give batches of data as "
            "calibration="
        )
    found = channel_statistics(subject, work.calls, list(chosen.values()))
    return {
        consumers: smooth_factors(group, subject.parameters, found, transform.alpha)
        for consumers, group in chosen.items()
    }
