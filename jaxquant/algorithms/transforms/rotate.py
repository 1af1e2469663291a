"""`jq.rotate`: QuaRot for any model: rotated residual stream and heads, no outlier channels.

Ashkboos et al. 2024, "QuaRot" (arXiv:2404.00456); Liu et al. 2024, "SpinQuant" (arXiv:2405.16406).
Gains of norms are folded into the weights behind them, everything that reads or writes the residual
stream is multiplied by one orthogonal matrix, and the float function stays what it was. The stream
is found by `jaxquant.passes.find_turns`, not by names.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxquant.algorithms.transforms.subject import split_arguments, subject_of, with_pass
from jaxquant.passes.rotate import FACT, Rotate, rotate_parameters


def rotate(
    model: Any,
    *args: Any,
    stream: bool = True,
    heads: bool = True,
    online: bool = False,
    seed: int = 0,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Any:
    """Rotates what weights read, so that activations have no outlier channels.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      *args: Linen: the variables, then the model's own arguments: an example, on which the function
        is compared before and after. Function: its parameters, then its other arguments. NNX: the
        example arguments only.
      stream: rotate the residual stream.
      heads: rotate the features that attention passes from values to the output projection.
      online: allow explicit operations, which the model's code does not have: around a stream that
        parameters alone cannot rotate (a head tied to the embedding), and in front of all other
        weights, such as the last one of an MLP.
      seed: of the matrices.
      tolerance: how much the function may differ on the example, relative to its largest
        magnitude; by default 1e-5. A model of shorter floats is compared in float32.
      **kwargs: keyword arguments of the model, part of the example.

    Returns:
      The float variables (parameters, NNX module) in the structure they came in. With ``online``
      the pair of a function of ``(tree, ...)`` and the tree, for ``jq.quantize(recipe)(fn)``.

    Raises:
      FoldError: there is no residual stream, or something does not commute with its rotation (the
        operation is named); or the function has changed.
      ValueError: the tree is quantized already.
    """
    variables, example = split_arguments(model, args)
    adapter, subject = subject_of(model, variables, (example, kwargs), "rotate")
    step = Rotate(stream=stream, heads=heads, online=online, seed=seed)
    program = step.run(subject.program).program
    fold = functools.partial(rotate_parameters, turned=program.facts[FACT])
    tree = subject.after(program, fold, tolerance)
    if not online:
        return adapter.with_tree(tree)
    return with_pass(subject.fn, subject.paths, step, adapter.name), tree
