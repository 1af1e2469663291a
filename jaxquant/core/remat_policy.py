"""Lets a remat policy see a quantized product as the float product it stands for.

`jax.checkpoint_policies.dots_saveable` and its kin ask whether a primitive *is* dot_general. Used
by the rule that rebuilds remat equations; for a remat *around* a quantized function the user
wraps the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.extend.core import primitives as jp

from jaxquant.core import _compat
from jaxquant.core.primitives import (
    quantized_conv_general_dilated_p,
    quantized_dot_general_p,
    quantized_dots_p,
    quantized_ragged_dot_p,
)
from jaxquant.core.primitives.dot import float_operands, split_operands
from jaxquant.core.primitives.weights import logical_aval, unflatten

_FLOAT = {
    quantized_dot_general_p: jp.dot_general_p,
    quantized_dots_p: jp.dot_general_p,
    quantized_conv_general_dilated_p: jp.conv_general_dilated_p,
    quantized_ragged_dot_p: _compat.ragged_dot_general_p,
}
_OWN_PARAMS = ("tree", "act", "weight_side", "x_quantized", "out_shardings", "implementation")


def as_dot_policy(policy: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """A remat policy that treats quantized products as dots, convolutions and ragged dots.

    Args:
      policy: from `jax.checkpoint_policies`, or None.

    Returns:
      The same policy for all other primitives; None for None.
    """
    if policy is None or isinstance(policy, _AsDot):
        return policy
    return _AsDot(policy)


@dataclasses.dataclass(frozen=True)
class _AsDot:
    """Equal for equal policies, so that caches of traces hit."""

    policy: Callable[..., Any]

    def __call__(self, prim: Any, *avals: Any, **params: Any) -> Any:
        if prim not in _FLOAT:
            return self.policy(prim, *avals, **params)
        x, _, leaves = split_operands(avals, params.get("x_quantized", False))
        operands = unflatten(params["tree"], leaves)
        weight, *extras = operands if isinstance(operands, tuple) else (operands,)
        floats = float_operands(x, logical_aval(weight), params.get("weight_side", "rhs"))
        kept = {name: value for name, value in params.items() if name not in _OWN_PARAMS}
        if prim is quantized_dots_p:  # asked about the first; the others differ in columns only
            extras, kept = [], {**kept, "out_sharding": params["out_shardings"][0]}
        return self.policy(_FLOAT[prim], *floats, *extras, **kept)
