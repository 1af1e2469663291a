"""Which products have no weight but may still be named by a rule: attention scores and mixing.

Used by `rewrite` to execute such rules and by the planning passes to list the products. A product
counts as attention's when the innermost module around it is an attention module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as jp

from jaxquant.core.names import innermost_module
from jaxquant.core.recipe import Rule


def is_attention_product(eqn: Any, names: Sequence[str]) -> bool:
    """True for a float dot_general with batch axes directly inside an attention module."""
    if eqn.primitive is not jp.dot_general_p:
        return False
    module = innermost_module(names)
    if module is None or "attention" not in module[1].lower():
        return False
    _, (batch, _) = eqn.params["dimension_numbers"]
    return bool(batch) and all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.invars)


def rule_for(rules: Sequence[Rule], names: Sequence[str]) -> Rule | None:
    """The first of ``rules`` that names the module around the product."""
    module = innermost_module(names)
    if module is None:
        return None
    path, class_name = module
    for rule in rules:
        if rule.matches("attention", class_name, path):
            return rule
    return None
