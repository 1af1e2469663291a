"""`Rotate` in a recipe: what is rotated by parameters alone, and which inputs are explicitly.

Called by `apply`. The analysis is `jaxquant.passes.find_turns`; here the recipe's rules are brought
to bear, and what becomes of each input is written down.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.algorithms.transforms.subject import Subject
from jaxquant.algorithms.transforms.work import Work
from jaxquant.core.transforms import Rotate
from jaxquant.core.turns import InputTurn
from jaxquant.passes.channel_flow import unseen_weights
from jaxquant.passes.find_turns import FoundTurn
from jaxquant.passes.plan import TransformRow
from jaxquant.passes.rotate import FACT, rotate_parameters
from jaxquant.passes.rotate import Rotate as RotatePass


def apply_rotate(work: Work, transform: Rotate, subject: Subject) -> None:
    """Rotates what parameters alone can rotate, and the other inputs if the recipe wants that.

    Raises:
      FoldError: something is refused, or the function has changed.
    """
    inputs = work.quantized - work.kept - set(work.turns)
    multiplies = transform.unfoldable == "multiply"
    step = RotatePass(
        stream=transform.stream,
        heads=transform.heads,
        inputs=frozenset(inputs if multiplies else ()),
        fixed=frozenset(work.kept | set(work.turns)),
        seed=transform.seed,
    )
    result = step.run(subject.program)
    turned = result.program.facts[FACT]
    rows, read = [], set()
    for found, rotation in turned:
        weights = tuple(dict.fromkeys(filter(None, map(work.read.get, sorted(found.readers)))))
        if found.role == "input":
            weights = tuple(path for path, _, _ in found.absorbed)
            _turn(work, found, rotation.signs)
        read |= set(weights)
        rows.append(_rotated(found, weights))
    notes = [note for note in result.notes if "not rotated" in note or "be rotated" in note]
    notes += [f"{path}: {why}" for path, why in unseen_weights(subject.program).items()]
    for path in [p for p in dict.fromkeys(work.read.values()) if p and p not in read]:
        rows.append(_unturned(work, transform, path, notes))
    work.settle(transform, rows)
    fold = functools.partial(rotate_parameters, turned=turned)
    work.take(subject, step, result.program, fold)


def _turn(work: Work, found: FoundTurn, signs: Any) -> None:
    """Notes how the input of the weights of a rotation is turned."""
    for path, spot, _ in found.absorbed:
        shape = work.shapes[path]
        own = [1] * len(shape)
        own[spot.dim] = shape[spot.dim]
        index = np.arange(shape[spot.dim]) // spot.inner % spot.size
        work.multiply(path, signs[index].reshape(own), (found.size, signs.tobytes()))
        work.turns[path] = InputTurn(spot.dim - len(shape), spot.size, spot.inner)


def _unturned(work: Work, transform: Rotate, path: str, notes: Sequence[str]) -> TransformRow:
    row = functools.partial(TransformRow, "rotate", (path,))
    why = work.not_wanted((path,))
    if why:
        return row("left", reason=why)
    own = [note.partition(": ")[2] for note in notes if note.startswith(f"{path}: ")]
    general = [note for note in notes if note.startswith("no residual stream")]
    reason = "; ".join(own or general) or "it reads no stream and no heads that can be rotated"
    return row("refused" if transform.unfoldable == "refuse" else "left", reason=reason)


def _rotated(found: FoundTurn, weights: tuple[str, ...]) -> TransformRow:
    what = {"stream": "the residual stream", "heads": "the value heads", "input": "the input"}
    reason = f"{what[found.role]} of {found.size} channels"
    if found.role == "input":
        reason = f"a Hadamard matrix of {found.size} rows; parameters alone cannot turn it"
        return TransformRow("rotate", weights, "multiply", reason=reason)
    into = tuple(path for path, _, _ in found.absorbed if path not in weights)
    gains = tuple(path for path, _ in found.gains)
    return TransformRow("rotate", weights, "folded", (*into, *gains), reason)
