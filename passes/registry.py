"""`register`: enters rules into tables by primitive. A rule is never replaced silently."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def register(
    table: dict[K, R], *keys: K, others: Collection[Collection[K]] = ()
) -> Callable[[R], R]:
    """Decorator that enters a rule into a table.

    Args:
      table: the table.
      *keys: what the rule is for: primitives, or names of what has no primitive. JAX versions
        make one primitive of two, so a key may come twice.
      others: further tables that must not have a rule for it either.

    Raises:
      ValueError: a key has a rule.
    """

    def enter(rule: R) -> R:
        for key in dict.fromkeys(keys):
            if any(key in known for known in (table, *others)):
                raise ValueError(f"{key} already has a rule")
            table[key] = rule
        return rule

    return enter
