"""Errors for rules that match nothing: what they nearly match, and what would be matched.

Called by `assign_recipe`. A rule that matches nothing is a typing error until shown otherwise: it
would leave float, or quantize, what its author did not mean.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxquant.core.recipe import Recipe, Rule
from jaxquant.passes.op_use import OpUse

_SHOWN = 5
_REGEX = re.compile(r"\.[*+]|[\\^$|()]")  # what a regular expression has and a glob has not


def check_rules(
    recipe: Recipe,
    uses: Sequence[OpUse],
    matched: Sequence[Rule | None],
    parameters: Mapping[str, Any],
) -> None:
    """Raises ValueError if a rule that is not optional decides nothing.

    Args:
      recipe: the recipe.
      uses: all uses found.
      matched: the rule that matches each use first.
      parameters: all parameters by path; a rule that skips may name one that stays float anyway.
    """
    for index, rule in enumerate(recipe.rules):
        if rule.optional or any(rule is found for found in matched):
            continue
        named = any(rule.matches_path(p, p.rpartition("/")[0]) for p in parameters)
        if rule.skip and rule.op is None and named:
            continue
        raise ValueError(
            f"rule {index} of recipe {recipe.name!r}, {rule}, matches nothing: "
            f"{_why(rule, recipe.rules[:index], uses, parameters)}"
        )


def _why(
    rule: Rule, before: Sequence[Rule], uses: Sequence[OpUse], parameters: Mapping[str, Any]
) -> str:
    ops = [u for u in uses if u.primitive != "other" and (u.param or u.kind == "attention")]
    shadowed = [u for u in ops if rule.matches(u.kind, u.cls, u.param, u.module)]
    if shadowed:
        use = shadowed[0]
        first = next(r for r in before if r.matches(use.kind, use.cls, use.param, use.module))
        return f"the rules before it take all it would match, e.g. {first} takes {_where(use)!r}"
    here = [u for u in ops if rule.matches_path(u.param, u.module)]
    if here:
        found = _some(f"{_where(u)} ({u.kind}{f', {u.cls}' if u.cls else ''})" for u in here)
        return f"its path matches, but not its op={rule.op!r}: {found}"
    others = [u for u in uses if u.primitive == "other" and rule.matches_path(u.param, u.module)]
    if others:
        found = _some(f"{u.param} {u.detail}" for u in others)
        return f"what its path matches has no quantized form: {found}"
    unused = [path for path in parameters if rule.matches_path(path)]
    if unused:
        return f"the traced call has no op for {_some(unused)}"
    if not ops:
        return "the traced call has no op with a weight"
    known = [name for u in ops for name in (u.param, u.module) if name]
    near = difflib.get_close_matches(rule.path, dict.fromkeys(known), _SHOWN, cutoff=0.4)
    glob = "; a path is a glob, no regular expression" if _REGEX.search(rule.path) else ""
    return f"no path is like it{glob}. {'Near' if near else 'There are'}: {_some(near or known)}"


def _where(use: OpUse) -> str:
    return use.param or use.module or use.kind


def _some(items: Iterable[str]) -> str:
    unique = list(dict.fromkeys(items))
    more = f", and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return ", ".join(unique[:_SHOWN]) + more
