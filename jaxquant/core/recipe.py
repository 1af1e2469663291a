"""Recipes: which op of a model is quantized how, as ordered rules, and the presets.

A recipe is plain data. The decorator holds one, `passes/assign_recipe.py` reads it, checkpoints
store it as JSON. The first rule that matches an op decides. Rules must not depend on a model's
objects: they see the path of a parameter or module, the kind of an op and its class name.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from jaxquant.core.schemes import ActScheme, WeightScheme, check_type, checked_fields
from jaxquant.core.transforms import (
    Rotate,
    Smooth,
    Transform,
    transform_from_json,
    transform_to_json,
)

__all__ = [
    "OP_KINDS",
    "PRESETS",
    "ActScheme",
    "Recipe",
    "Rotate",
    "Rule",
    "Smooth",
    "WeightScheme",
    "get_recipe",
]

OP_KINDS = {
    "dense": "a Dense, DenseGeneral or Linear layer",
    "einsum": "an Einsum layer",
    "conv": "a convolution",
    "embed": "an embedding lookup",
    "attend": "an embedding used as output head",
    "attention": "a product of two activations inside an attention class",
    "ragged_dot": "a matmul of rows grouped by expert",
    "dot": "a raw dot_general (@, jnp.dot, jnp.einsum) in other code",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
      path: glob over "/"-separated paths; `?` and `*` stay within a segment, `**` spans any
        number of them (also none). It matches when the path of the parameter
        ("layers/attn/q/kernel") or of the module ("layers/attn/q") does.
      op: None for every op that has a weight; else an op kind (see `OP_KINDS`) or a glob over
        class names ("MultiHead*"). Products of two activations are matched only by a rule that
        names them: op="attention".
      weight: how the weight is stored, or None for a weightless op.
      act: what is done with the op's input, or None to leave it float.
      skip: True to leave the matching ops float.
      optional: True if it is fine that no op of the model matches; else that is an error.
      transforms: False to keep what the matching ops read as it is: the recipe's transforms leave
        them alone.
    """

    path: str = "**"
    op: str | None = None
    weight: WeightScheme | None = None
    act: ActScheme | None = None
    skip: bool = False
    optional: bool = False
    transforms: bool = True

    def __post_init__(self) -> None:
        check_type("path", self.path, str)
        check_type("transforms", self.transforms, bool)
        check_type("op", self.op, str, optional=True)
        check_type("weight", self.weight, WeightScheme, optional=True)
        check_type("act", self.act, ActScheme, optional=True)
        if not self.path or self.path.startswith("/") or self.path.endswith("/"):
            raise ValueError(
                f"path={self.path!r} must be a glob such as 'layers/*/attn/**', without a '/' at "
                "either end"
            )
        if self.skip and (self.weight is not None or self.act is not None):
            raise ValueError("skip=True leaves an op float; give no weight and no act with it")
        if not self.skip and self.weight is None and self.act is None:
            raise ValueError("a rule needs weight=, act= or skip=True")
        if self.op == "attention" and self.weight is not None:
            raise ValueError("op='attention' names products without a weight; give act= only")
        if not self.skip and self.weight is None and self.op != "attention":
            raise ValueError(
                "act= without weight= is for op='attention' only: an activation is quantized to "
                "meet a quantized weight"
            )

    def matches_path(self, *paths: str | None) -> bool:
        """Whether the glob matches one of the given paths (None never matches)."""
        pattern = _path_pattern(self.path)
        rooted = [f"/{path}" if path else "" for path in paths if path is not None]
        return any(pattern.fullmatch(path) for path in rooted)

    def matches_op(self, kind: str, cls: str | None) -> bool:
        """Whether the rule is for an op of this kind, in a module of this class."""
        if self.op is None:
            return kind != "attention"
        if fnmatch.fnmatchcase(kind, self.op):
            return True
        named = cls is not None and fnmatch.fnmatchcase(cls, self.op)
        return named and (kind != "attention" or self.weight is None)

    def matches(self, kind: str, cls: str | None, *paths: str | None) -> bool:
        """Whether the rule is for this op; `paths` are its parameter's and module's."""
        return self.matches_op(kind, cls) and self.matches_path(*paths)

    def __str__(self) -> str:
        """The rule as one would write it, with the fields that differ from the default."""
        words = [repr(self.path)]
        if self.op is not None:
            words.append(f"op={self.op!r}")
        if self.skip:
            words.append("skip=True")
        if self.weight is not None:
            words.append(f"weight={self.weight}")
        if self.act is not None:
            words.append(f"act={self.act}")
        if not self.transforms:
            words.append("transforms=False")
        return f"Rule({', '.join(words)})"

    def to_json(self) -> dict[str, Any]:
        """The rule as a JSON-able mapping."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; an unknown field is a ValueError."""
        fields = checked_fields(cls, data)
        if fields.get("weight") is not None:
            fields["weight"] = WeightScheme.from_json(fields["weight"])
        if fields.get("act") is not None:
            fields["act"] = ActScheme.from_json(fields["act"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Ordered rules under a name; the first rule that matches an op decides.

    Attributes:
      name: shown in plans and reports, stored in checkpoints.
      rules: the rules, most specific first.
      transforms: what is done to the float model first, in this order: `Smooth`, `Rotate`.
    """

    name: str
    rules: tuple[Rule, ...]
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        check_type("name", self.name, str)
        check_type("rules", self.rules, Iterable)
        object.__setattr__(self, "rules", tuple(self.rules))
        for number, rule in enumerate(self.rules):
            check_type(f"rules[{number}]", rule, Rule)
        check_type("transforms", self.transforms, Iterable)
        object.__setattr__(self, "transforms", tuple(self.transforms))
        for number, transform in enumerate(self.transforms):
            if not isinstance(transform, Transform):
                raise TypeError(f"transforms[{number}]= takes Smooth or Rotate, not {transform!r}")

    def with_transforms(self, *transforms: Transform, name: str | None = None) -> Recipe:
        """This recipe with these transforms in the place of its own; none for none."""
        kinds = "".join(f"+{transform.kind}" for transform in transforms)
        return Recipe(name or f"{self.name}{kinds or '-transforms'}", self.rules, transforms)

    def with_rules(self, *rules: Rule, name: str | None = None) -> Recipe:
        """This recipe with `rules` in front, so that they decide before its own.

        The rules that were there become optional: the new ones may leave them nothing to match.
        """
        old = tuple(dataclasses.replace(rule, optional=True) for rule in self.rules)
        return Recipe(name or f"{self.name}+{len(rules)}", (*rules, *old), self.transforms)

    def to_json(self) -> dict[str, Any]:
        """The recipe as a JSON-able mapping."""
        return {
            "name": self.name,
            "rules": [rule.to_json() for rule in self.rules],
            "transforms": [transform_to_json(transform) for transform in self.transforms],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Recipe:
        """The inverse of `to_json`; also takes its JSON text.

        Raises:
          ValueError: a field is missing or unknown, or a value is not allowed.
        """
        data = json.loads(data) if isinstance(data, str) else data
        if not isinstance(data, Mapping) or not {"name", "rules"} <= set(data):
            raise ValueError("a stored recipe is a JSON object with the fields 'name' and 'rules'")
        fields = checked_fields(cls, data)
        return cls(
            fields["name"],
            tuple(Rule.from_json(rule) for rule in fields["rules"]),
            tuple(transform_from_json(each) for each in fields.get("transforms", ())),
        )


def get_recipe(recipe: str | Recipe | None) -> Recipe:
    """The recipe for a preset's name; a Recipe is returned as it is, None means "w8a8".

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
      TypeError: neither a name nor a Recipe.
    """
    if recipe is None:
        recipe = "w8a8"
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"a recipe is a preset's name or a Recipe, got {type(recipe).__name__}")
    if recipe not in PRESETS:
        near = difflib.get_close_matches(recipe, PRESETS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(PRESETS))
        raise ValueError(f"unknown recipe {recipe!r}.{hint} Known: {known}")
    return PRESETS[recipe]


@functools.lru_cache(maxsize=1024)
def _path_pattern(glob: str) -> re.Pattern[str]:
    """The glob as a regular expression over "/" + path."""
    pattern = ""
    for segment in glob.split("/"):
        if segment == "**":
            pattern += "(?:/[^/]+)*"
        else:
            literal = re.escape(segment)
            pattern += "/" + literal.replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.compile(pattern)


def _preset(
    weight: WeightScheme, act: ActScheme | None = None, *, embed: WeightScheme | None = None
) -> tuple[Rule, ...]:
    """One scheme for every op with a weight, and perhaps another for embeddings and tied heads."""
    rules = [Rule("**", weight=weight, act=act)]
    if embed is not None:
        head_act = ActScheme("int8") if act is not None else None
        rules = [
            Rule("**", op="embed", weight=embed, act=head_act, optional=True),
            Rule("**", op="attend", weight=embed, act=head_act, optional=True),
            *rules,
        ]
    return tuple(rules)


def _presets() -> dict[str, Recipe]:
    """The recipes that have names.

    Below 8 bits, embeddings (and the heads tied to them) are kept at int8, one scale a row: they
    are read a row at a time, so their bits cost no bandwidth, and their rows are the least
    redundant weights of a model. Two and three bits, and four with one scale a channel, choose
    their ranges by mean squared error, since the absolute maximum wastes much of so small a grid
    (w4a8 on the shipped model: KL 0.010 against 0.014). Write a recipe for anything else.
    """
    token = ActScheme("int8")
    rows = WeightScheme("int8")
    int4 = functools.partial(WeightScheme, "int4")
    table = {
        "w8a8": _preset(WeightScheme("int8"), token),
        "w8a8_static": _preset(WeightScheme("int8"), ActScheme("int8", mode="static")),
        "w8a16": _preset(WeightScheme("int8")),
        "fp8": _preset(WeightScheme("float8_e4m3"), ActScheme("float8_e4m3")),
        "w4a16": _preset(int4(range="mse"), embed=rows),
        "w4a16_g128": _preset(int4(group_size=128), embed=rows),
        "w4a16_g64": _preset(int4(group_size=64), embed=rows),
        "w4a16_g32": _preset(int4(group_size=32), embed=rows),
        "w4a8": _preset(int4(range="mse"), token, embed=rows),
        "w4a8_g128": _preset(int4(group_size=128), token, embed=rows),
        "w4a8_g64": _preset(int4(group_size=64), token, embed=rows),
        "w4a4": _preset(int4(range="mse"), ActScheme("int4"), embed=rows),
        "w4a4_g128": _preset(int4(group_size=128), ActScheme("int4"), embed=rows),
        "nf4": _preset(WeightScheme("nf4"), embed=rows),
        "mxfp4": _preset(WeightScheme("mxfp4"), embed=rows),
        "nvfp4": _preset(WeightScheme("nvfp4"), embed=rows),
        "w3a16": _preset(WeightScheme("int3", group_size=64, range="mse"), embed=rows),
        "w2a16": _preset(WeightScheme("int2", group_size=64, range="mse"), embed=rows),
        "w1a16": _preset(WeightScheme("int1", group_size=64), embed=rows),
    }
    recipes = {name: Recipe(name, rules) for name, rules in table.items()}
    w8a8 = recipes["w8a8"]
    recipes["w8a8_smooth"] = w8a8.with_transforms(Smooth(), name="w8a8_smooth")
    turn = Rotate(unfoldable="multiply")
    recipes["w8a8_rotated"] = w8a8.with_transforms(turn, name="w8a8_rotated")
    return recipes


PRESETS: dict[str, Recipe] = _presets()
