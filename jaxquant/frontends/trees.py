"""Small tree helpers that the Linen and NNX shells share.

A shell hands variables to `transform` and gets some of them back; what a call did not touch must
stay the very object it was (a QTensor parameter above all), so it travels as a mark, not a value.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxquant.core.qtensor import is_qtensor

# A method that looks at values (`while not done:`) cannot be traced. Called eagerly it runs as it
# is, and the methods it calls are transformed one by one. Inside a trace this is the user's error.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Uncached:
    """A static argument that cannot be hashed: with it, `transform` traces the call every time."""

    __hash__ = None  # type: ignore[assignment]


@jax.tree_util.register_static
class Unchanged:
    """Stands in an output tree for a leaf that the function left as it was."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unchanged)

    def __hash__(self) -> int:
        return hash(Unchanged)


def has_qtensor(tree: Any) -> bool:
    """Whether any leaf of the tree is a QTensor."""
    return any(map(is_qtensor, jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor)))


def same_leaf(new: Any, old: Any) -> bool:
    """Whether a value (a leaf or a small tree of leaves) consists of the very same leaves."""
    if new is old:
        return True
    trees: list[Any] = [jax.tree_util.tree_structure(new), jax.tree_util.tree_structure(old)]
    new_leaves, old_leaves = map(jax.tree_util.tree_leaves, (new, old))
    return trees[0] == trees[1] and all(a is b for a, b in zip(new_leaves, old_leaves, strict=True))


def mark_unchanged(new: Any, old: Any) -> Any:
    """The new tree, with `Unchanged` for each leaf that is the old tree's leaf at its path."""
    before = dict(jax.tree_util.tree_flatten_with_path(old)[0])
    missing = object()

    def mark(path: Any, leaf: Any) -> Any:
        return Unchanged() if before.get(path, missing) is leaf else leaf

    return jax.tree_util.tree_map_with_path(mark, new)


def restore_unchanged(new: Any, old: Any) -> Any:
    """Undoes `mark_unchanged`: puts the leaves of the old tree back, QTensors whole."""
    before = dict(jax.tree_util.tree_flatten_with_path(old, is_leaf=is_qtensor)[0])

    def restore(path: Any, leaf: Any) -> Any:
        return before[path] if isinstance(leaf, Unchanged) else leaf

    return jax.tree_util.tree_map_with_path(
        restore, new, is_leaf=lambda x: is_qtensor(x) or isinstance(x, Unchanged)
    )
