"""The user's words for an operation: module path, class name and op kind.

Paths and classes come from the scopes that the frontends open (`jaxquant.core.names`); kinds
follow from the primitive, the class, and from how a parameter is used elsewhere. Called by
`find_weights`. Recipes match these words, so they must not depend on a JAX version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxquant.core.names import innermost_module
from jaxquant.passes.op_use import OpUse
from jaxquant.passes.weightless import is_attention_product

_CLASSES = {
    "Dense": "dense",
    "DenseGeneral": "dense",
    "Linear": "dense",
    "LinearGeneral": "dense",
    "Einsum": "einsum",
    "Embed": "attend",
}
_PRIMITIVES = {"conv": "conv", "ragged_dot": "ragged_dot", "gather": "embed", "other": "other"}


def describe(
    primitive: str, names: Sequence[str], path: str | None, eqn: Any = None
) -> tuple[str | None, str | None, str]:
    """Module path, class name and kind of an operation.

    Args:
      primitive: as in `OpUse.primitive`.
      names: scope names of the equation, outermost first.
      path: the parameter's path, or None for a product of two activations.
      eqn: the equation, for products without a parameter.

    Returns:
      The module's path. A body that JAX traced once and uses for several modules carries the
      scope of the first; where scope and parameter disagree, the parameter's own module is meant.
    """
    module, cls = innermost_module(names) or (None, None)
    if path is not None and module is not None and not _inside(path, module):
        module = path.rpartition("/")[0]
    if primitive in _PRIMITIVES:
        return module, cls, _PRIMITIVES[primitive]
    if path is None:
        return module, cls, "attention" if is_attention_product(eqn, names) else "dot"
    return module, cls, _CLASSES.get(cls or "", "dot")


def mark_attends(uses: Sequence[OpUse]) -> tuple[OpUse, ...]:
    """Renames products with a table that is also looked up: an output head tied to embeddings."""
    tables = {
        (use.param, axis)
        for use in uses
        if use.kind == "embed"
        for axis in use.with_role("indexed")
    }

    def renamed(use: OpUse) -> OpUse:
        tied = any((use.param, axis) in tables for axis in use.with_role("free"))
        if use.primitive == "dot_general" and tied and use.contracts:
            return dataclasses.replace(use, kind="attend")
        return use

    return tuple(map(renamed, uses))


def _inside(path: str, module: str) -> bool:
    return module == "" or path == module or path.startswith(module + "/")
