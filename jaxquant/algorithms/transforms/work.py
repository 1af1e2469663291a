"""A recipe's model between two of its transforms, and what they say and keep of its weights.

Made by `apply`; `recipe_smooth` and `recipe_rotate` work on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxquant.algorithms.calibrate import Call
from jaxquant.algorithms.transforms.subject import Example, Folded, Subject, with_pass
from jaxquant.core.transforms import Transform
from jaxquant.core.turns import InputTurn
from jaxquant.passes.assign_recipe import Assignment
from jaxquant.passes.fold_transforms import FoldError
from jaxquant.passes.pass_manager import Pass
from jaxquant.passes.plan import TransformRow
from jaxquant.passes.program import Program


class Work:
    """The model between two transforms.

    Attributes:
      fn: the function, with the explicit operations so far.
      tree: its parameters.
      paths: name of each leaf, or None.
      example: positional and keyword arguments.
      computes: whether parameters are to be computed, not only shapes.
      explains: whether what is refused is only to be said.
      calls: calibration batches.
      recipe: the recipe.
      shapes: shape of each parameter.
      quantized: paths that the recipe quantizes.
      kept: paths whose inputs are to stay as they are.
      read: by the site of each product the parameter that it reads.
      factors: by path what the input of a weight is multiplied with.
      alike: for each of these a key that is equal where the factors are.
      turns: by path how the input of a weight is turned.
      rows: what was done.

    Raises:
      ValueError: parameters are to be computed, but the example has shapes only.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        tree: Any,
        paths: Sequence[str | None],
        example: Example,
        assignment: Assignment,
        calls: Sequence[Call] | None,
    ) -> None:
        self.fn, self.tree, self.paths, self.example = fn, tree, paths, example
        self.computes = calls is not None and not is_abstract(tree)
        if self.computes and is_abstract(example):
            raise ValueError(
                f"recipe {assignment.recipe.name!r} has transforms, which are checked on data: "
                "give an example of arrays, or calibration="
            )
        self.explains = calls is None
        self.calls = calls or ()
        self.recipe = assignment.recipe
        self.shapes = {path: plan.shape for path, plan in assignment.params.items()}
        self.quantized = {plan.path for plan in assignment.quantized}
        self.kept = {
            use.param
            for use, rule in zip(assignment.uses, assignment.rules, strict=True)
            if rule is not None and not rule.transforms and use.param is not None
        }
        self.read = {use.site: use.param for use in assignment.uses if use.is_product}
        self.factors: dict[str, Any] = {}
        self.alike: dict[str, Any] = {}
        self.turns: dict[str, InputTurn] = {}
        self.rows: list[TransformRow] = []

    def name(self, transform: Transform) -> str:
        """What errors call a transform."""
        return f"{transform.kind} of recipe {self.recipe.name!r}"

    def take(self, subject: Subject, step: Pass, program: Program, fold: Folded) -> None:
        """Goes on with the model after a step."""
        if self.computes:
            self.tree = subject.after(program, fold)
        if program.jaxpr is not subject.program.jaxpr:
            self.fn = with_pass(self.fn, self.paths, step, getattr(self.fn, "__name__", "fn"))

    def settle(self, transform: Transform, rows: Iterable[TransformRow]) -> None:
        """Keeps the rows; what is refused is an error, unless it is only to be said."""
        rows = list(rows)
        self.rows += rows
        refused = [row for row in rows if row.status == "refused"]
        if refused and not self.explains:
            lines = [f"  {', '.join(row.weights)}: {row.reason}" for row in refused]
            raise FoldError(
                f"{self.name(transform)}: these inputs cannot be folded into parameters "
                "(unfoldable='leave' leaves them, 'multiply' makes explicit operations; a rule "
                "with transforms=False leaves one out):\n" + "\n".join(lines)
            )

    def multiply(self, path: str, factor: Any, key: Any) -> None:
        """Multiplies the input of a weight; weights with equal keys get equal factors."""
        before = self.factors.get(path)
        self.factors[path] = factor if before is None else before * factor
        self.alike[path] = (*self.alike.get(path, ()), key)

    def not_wanted(self, paths: Sequence[str]) -> str:
        """Why the rules want an input left as it is, or ""."""
        quantized = bool(self.quantized & set(paths))
        return self.kept_among(paths) or ("" if quantized else "no rule quantizes what reads it")

    def kept_among(self, paths: Sequence[str]) -> str:
        """Why the rules want a parameter left as it is, or ""."""
        kept = [path for path in paths if path in self.kept]
        return f"a rule with transforms=False names {kept[0]}" if kept else ""

    def not_storable(self, paths: Sequence[str]) -> str:
        """Why weights cannot keep what is done to their input, or ""."""
        floats = [path for path in paths if path not in self.quantized]
        if floats:
            return f"{floats[0]} stays float, and only a quantized weight keeps factors"
        turned = [path for path in paths if path in self.turns]
        return f"the input of {turned[0]} is rotated explicitly already" if turned else ""


def is_abstract(tree: Any) -> bool:
    """Whether some leaves are shapes only."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree_util.tree_leaves(tree))
