"""How the uses of one parameter are merged, for it has one set of codes and scales.

Which use decides, which products quantize their input, and what the plan says of the uses that did
not decide. Called by `assign_recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxquant.core.qtypes import get_qtype
from jaxquant.core.recipe import Rule
from jaxquant.passes.op_use import OpUse

#: A use and the rule that matches it first.
Ruled = tuple[OpUse, Rule | None]


def deciding(own: Sequence[Ruled]) -> Ruled:
    """The use that decides the axes of the scales: the product with most work, else a lookup.

    The first of equals; what a gradient multiplies decides last. The work tells a layer from what
    is done to its kernel on the side, such as the power iteration of a spectral norm.
    """
    products = [pair for pair in own if pair[0].is_product and pair[0].contracts]
    forward = [pair for pair in products if not pair[0].backward]
    lookups = [pair for pair in own if pair[0].primitive == "gather"]
    return max(forward or lookups or products, key=lambda pair: pair[0].work)


def rounding_ops(use: OpUse, rule: Rule, own: Sequence[Ruled]) -> dict[str, bool]:
    """For each primitive among a parameter's products whether it quantizes its input.

    All products of one primitive do the same. Those of the deciding use's follow it, the others a
    rule of theirs that says the same of their input. Sorted; empty if a lookup decides.
    """
    if not use.is_product:
        return {}
    products = [pair for pair in own if pair[0].is_product]
    forward = [pair for pair in products if not pair[0].backward]
    ops: dict[str, bool] = {}
    for other, its in forward or products:
        same = its is not None and its.act == rule.act and _quantizes_input(other, its)
        ops[other.primitive] = ops.get(other.primitive, False) or same
    ops[use.primitive] = _quantizes_input(use, rule)
    return dict(sorted((op, rounds and rule.act is not None) for op, rounds in ops.items()))


def notes(
    use: OpUse,
    rule: Rule,
    blocks: Sequence[int],
    own: Sequence[Ruled],
    ops: Mapping[str, bool],
) -> list[str]:
    """What happens to the uses that did not decide."""
    found = []
    scheme = rule.weight
    assert scheme is not None
    prescribed = get_qtype(scheme.qtype).group_size is not None
    if use.primitive == "conv" and scheme.granularity == "group" and not prescribed:
        found.append("a convolution has one scale an output channel, not groups")
    for other, other_rule in own:
        if (
            other_rule is not None
            and other_rule.act is not None
            and ops.get(other.primitive) is False
        ):
            whose = "its input" if other is use else f"the input of {name_of(other)}"
            found.append(f"{whose} stays float: {_why_float(other, other_rule, use)}")
        if other is use:
            continue
        if other.primitive == "other":
            found.append(f"{other.detail}{at(other)}: dequantized there")
            continue
        if other_rule is None and other.is_product:
            found.append(f"no rule matches {name_of(other)}; {name_of(use)} decides")
        elif other_rule is not None and (other_rule.weight, other_rule.act) != (
            rule.weight,
            rule.act,
        ):
            found.append(f"{name_of(other)} would follow {other_rule}; {name_of(use)} decides")
        if other.is_product and not _suits(other, blocks):
            found.append(f"{name_of(other)} sums over axes that have a scale each{at(other)}")
    return list(dict.fromkeys(found))


def name_of(use: OpUse) -> str:
    """What the plan calls an operation."""
    where = use.module if use.module else use.param
    return f"{use.kind} {where!r}" if where else use.kind


def at(use: OpUse) -> str:
    """The user's line in brackets, where it is known."""
    return f" ({use.source})" if use.source else ""


def _quantizes_input(use: OpUse, rule: Rule) -> bool:
    """Whether the rule's activation scheme is for this product.

    XLA has no integer convolution or ragged dot that is fast on every platform: these take a rule
    that names them.
    """
    return use.primitive == "dot_general" or (use.is_product and rule.op is not None)


def _why_float(other: OpUse, rule: Rule, use: OpUse) -> str:
    """Why a product does not quantize its input although its rule has a scheme for it."""
    if _quantizes_input(other, rule):
        return f"{name_of(use)} decides"
    return (
        f"XLA has no integer {other.kind} that is fast on every platform; "
        f"a rule with op={other.kind!r} quantizes it"
    )


def _suits(use: OpUse, blocks: Sequence[int]) -> bool:
    """Whether neighbours that a product sums over share scales of these blocks."""
    return all(
        axis.allows(block) and (block > 1 or axis.contracted == 1)
        for axis, block in zip(use.axes, blocks, strict=True)
    )
