"""Unknown per-channel factors, and what is known to be equal among them.

`channel_flow` writes the factor of every element of a value as an array of labels. A label stands
for an unknown positive number; labels come in pairs, a number and its inverse, and label 0 is the
number one. Equations between factors merge labels; a number merged with its own inverse is one.
Called by the rules of `channel_rules`; plain numpy, sizes of channels and not of activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray

ONE = 0


class Labels:
    """A union-find over labels, closed under inversion.

    Even and odd neighbours are inverse to each other; 0 and 1 both mean one.
    """

    def __init__(self) -> None:
        self._parent: Array = np.zeros(2, np.int64)

    def copy(self) -> Labels:
        """An independent copy: what is merged in it stays in it."""
        other = Labels()
        other._parent = self._parent.copy()
        return other

    def fresh(self, shape: Sequence[int]) -> Array:
        """An array of new labels, all different."""
        start, count = len(self._parent), int(np.prod(shape))
        new = np.arange(start, start + 2 * count)
        self._parent = np.concatenate([self._parent, new])
        return new[::2].reshape(shape)

    def find(self, labels: Array) -> Array:
        """For each label the one that represents all it is merged with."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                return roots
            roots = above

    def merge(self, a: Array, b: Array | int) -> None:
        """Makes equal what stands at the same place; broadcasts."""
        pairs = np.broadcast_arrays(a, np.asarray(b))
        left, right = (np.concatenate([x.ravel(), inverse(x.ravel())]) for x in pairs)
        while True:
            x, y = self.find(left), self.find(right)
            differ = x != y
            if not differ.any():
                break
            low, high = np.minimum(x, y)[differ], np.maximum(x, y)[differ]
            np.minimum.at(self._parent, high, low)
        self._drop_self_inverse()

    def _drop_self_inverse(self) -> None:
        """A positive number that equals its inverse is one."""
        roots = self.find(np.arange(len(self._parent)))
        same = (roots[::2] == roots[1::2]) & (roots[::2] != ONE)
        if same.any():
            self._parent[np.unique(roots[::2][same])] = ONE

    def collapse(self, labels: Array, axes: Sequence[int]) -> Array:
        """Makes equal what differs along axes only; the axes become of size one."""
        for axis in axes:
            if labels.shape[axis] > 1:
                first = labels.take([0], axis)
                self.merge(labels, first)
                labels = first
        return labels

    def is_one(self, labels: Array) -> bool:
        """Whether every factor is known to be one."""
        return not self.find(labels).any()

    def varies(self, labels: Array, axes: Sequence[int]) -> bool:
        """Whether factors may differ along any of some axes."""
        roots = self.find(labels)
        return any((roots != roots.take([0], axis)).any() for axis in axes)


def inverse(labels: Array) -> Array:
    """The labels of the inverse numbers."""
    return labels ^ 1
