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
    left, left_tree = jax.tree_util.tree_flatten_with_path(ours)
    right, right_tree = jax.tree_util.tree_flatten_with_path(theirs)
    if left_tree != right_tree:
        return ["the tree's structure"]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, one), (_, other) in zip(left, right, strict=True)
        if not _same_bits(one, other)
    ]


def _same_bits(one: Any, other: Any) -> bool:
    a, b = np.asarray(one), np.asarray(other)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
