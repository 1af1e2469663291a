"""Comparing two trees bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def differences(ours: Any, theirs: Any) -> list[str]:
    """The paths at which two trees differ in structure, type, shape or any bit.

    Args:
      ours: a tree of arrays and QTensors.
      theirs: the other.

    Returns:
      Paths, or ["the tree's structure"]; empty if the trees are equal. NaNs are compared as bits.
    """
    left, right = (jax.tree_util.tree_leaves_with_path(tree) for tree in (ours, theirs))
    structures: list[Any] = [jax.tree.structure(tree) for tree in (ours, theirs)]
    if structures[0] != structures[1]:
        return ["the tree's structure"]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, one), (_, other) in zip(left, right, strict=True)
        if not _same_bits(one, other)
    ]


def _same_bits(one: Any, other: Any) -> bool:
    a, b = np.asarray(one), np.asarray(other)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
