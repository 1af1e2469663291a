"""`jq.explain_folds`: which parameters can absorb what, with proofs; computes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxquant.algorithms.transforms.subject import split_arguments
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.marks import recipe_of
from jaxquant.passes.channel_flow import ChannelGroup, find_channel_groups, unseen_weights
from jaxquant.passes.find_turns import FoundTurn, find_turns
from jaxquant.passes.program import trace


@dataclasses.dataclass(frozen=True, eq=False)
class Folds:
    """What can be folded into the parameters of a model; print it for the proofs.

    Attributes:
      groups: groups of weights with one input, and what can take factors of its channels.
      turns: what can be rotated.
      notes: what cannot be rotated, what is not looked at, and why.
    """

    groups: tuple[ChannelGroup, ...]
    turns: tuple[FoundTurn, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """All proofs, one paragraph each."""
        groups = [group.proof() for group in self.groups]
        turns = [turn.proof() for turn in self.turns]
        return "\n\n".join([*groups, *turns, *self.notes])


def explain_folds(model: Any, *args: Any, online: bool = False, **kwargs: Any) -> Folds:
    """The groups that `jq.smooth` would scale and the rotations that `jq.rotate` would make.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      *args: Linen: the variables, then the model's own arguments as the example to trace.
        Function: its parameters, then its other arguments. NNX: the example arguments only.
        Arrays and `jax.ShapeDtypeStruct`s may be mixed.
      online: allow explicit rotations (see `jq.rotate`).
      **kwargs: keyword arguments of the model.
    """
    if recipe_of(model) is None:
        model = quantize(model)
    variables, rest = split_arguments(model, args)
    adapter = describe(model)
    fn, tree = adapter.pure(variables)
    program = trace(fn, tree, rest, kwargs, adapter.param_paths(tree))
    turns, notes = find_turns(program, stream=True, heads=True, online=online)
    unseen = (f"{path}: not looked at: {why}" for path, why in unseen_weights(program).items())
    return Folds(find_channel_groups(program), turns, (*notes, *unseen))
