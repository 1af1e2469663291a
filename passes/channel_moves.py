"""How factors pass through operations that move elements: arithmetic on arrays of labels.

Each function takes the labels on one side of an operation and gives those on the other. Labels
have `depth` leading axes for the scans around them; an axis of size one stands for equal factors
along it, and stays so wherever it can. Where elements meet that must share a factor, their labels
are merged. Called by `channel_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from jaxquant.passes.axes import groups
from jaxquant.passes.channel_labels import ONE, Array, Labels


def reshape(layout: Array, depth: int, old: Sequence[int], new: Sequence[int]) -> Array:
    """Labels after a reshape from ``old`` to ``new``; works in both directions."""
    lead = layout.shape[:depth]
    have, want = list(layout.shape), [1] * len(new)
    if math.prod(old) == 0:
        return np.full((*lead, *want), ONE)
    for ins, outs in groups(old, new):
        if any(layout.shape[depth + i] > 1 for i in ins):
            for i in ins:
                have[depth + i] = old[i]
            for i in outs:
                want[i] = new[i]
    return np.broadcast_to(layout, have).reshape((*lead, *want))


def transpose(layout: Array, depth: int, permutation: Sequence[int]) -> Array:
    """Labels with dimension i taken from dimension permutation[i]."""
    return layout.transpose(*range(depth), *(depth + p for p in permutation))


def project(
    labels: Labels,
    layout: Array,
    depth: int,
    old: Sequence[Hashable],
    new: Sequence[Hashable],
    keep: Sequence[Hashable] | None = None,
) -> Array:
    """Labels of an array with dimensions named ``new``, from those of one named ``old``.

    Along names that are not in ``new`` (or not in ``keep``) factors become equal; along names that
    are new they are equal.
    """
    kept = [n for n in new if n in old and (keep is None or n in keep)]
    gone = [depth + i for i, n in enumerate(old) if n not in kept]
    layout = labels.collapse(layout, gone)
    layout = layout.squeeze(tuple(gone))
    have = [n for n in old if n in kept]
    layout = layout.transpose(*range(depth), *(depth + have.index(n) for n in kept))
    missing = tuple(depth + i for i, n in enumerate(new) if n not in kept)
    return np.expand_dims(layout, missing)


def fit(labels: Labels, layout: Array, depth: int, shape: Sequence[int]) -> Array:
    """Labels of an operand that is broadcast to a result with these labels."""
    if len(shape) == layout.ndim - depth:
        ones = [depth + i for i, n in enumerate(shape) if n == 1]
        return labels.collapse(layout, ones)
    layout = labels.collapse(layout, range(depth, layout.ndim))  # a scalar
    return layout.reshape((*layout.shape[:depth], *(1,) * len(shape)))


def lift(layout: Array, depth: int, rank: int) -> Array:
    """Labels of a result to which an operand with these labels is broadcast."""
    missing = rank - (layout.ndim - depth)
    return layout.reshape((*layout.shape[:depth], *(1,) * missing, *layout.shape[depth:]))


def take(layout: Array, axis: int, index: slice) -> Array:
    """A part of an axis."""
    if layout.shape[axis] == 1:
        return layout
    where = [slice(None)] * layout.ndim
    where[axis] = index
    return layout[tuple(where)]


def put(labels: Labels, layout: Array, axis: int, size: int, index: slice) -> Array:
    """Labels of an axis of ``size`` of which a part has these labels; new ones for the rest."""
    shape = list(layout.shape)
    shape[axis] = size
    full = labels.fresh(shape)
    where = [slice(None)] * layout.ndim
    where[axis] = index
    full[tuple(where)] = layout
    return full


def join(
    labels: Labels, layouts: Sequence[Array | None], axis: int, sizes: Sequence[int]
) -> Array:
    """Labels of a concatenation; new ones for a part that has none."""
    known = [x for x in layouts if x is not None]
    common = np.broadcast_shapes(*(_without(x.shape, axis) for x in known))
    parts = []
    for layout, size in zip(layouts, sizes, strict=True):
        shape = (*common[:axis], size, *common[axis + 1 :])
        parts.append(labels.fresh(shape) if layout is None else np.broadcast_to(layout, shape))
    return np.concatenate(parts, axis)


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])
