"""`Rotate`: rotates the residual stream, heads and other inputs of weights; the function stays.

Rotated activations have no outlier channels, so they lose less when quantized (Ashkboos et al.
2024, "QuaRot", arXiv:2404.00456; Liu et al. 2024, "SpinQuant", arXiv:2405.16406). `find_turns` says
what can be rotated and which parameters absorb the matrices. Like `fold_transforms` the pass leaves
what is to become of the parameters in a fact, for `rotate_parameters`; only where an explicit
operation is wanted does the program change. Called by `jaxquant.rotate`.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core import _compat
from jaxquant.core.rotations import Rotation, fixing_ones, hadamard, random_hadamard
from jaxquant.passes import custom_derivatives as custom_derivatives  # enters its rules
from jaxquant.passes.channel_flow import ChannelGroup
from jaxquant.passes.control_flow import CONTROL
from jaxquant.passes.find_turns import FoundTurn, find_turns
from jaxquant.passes.fold_transforms import FoldError, fold_parameters, group_factors
from jaxquant.passes.interpreter import Context, Interpreter, Site, Weight
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Program
from jaxquant.passes.rotation_flow import Spot

FACT = "parameter_rotations"
Turned = tuple[FoundTurn, Rotation]


@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Finds rotations that leave the function as it is.

    Attributes:
      stream: rotate residual streams.
      heads: rotate the features of value heads.
      online: allow explicit operations: where the stream cannot be rotated by parameters alone,
        and in front of all weights whose inputs are not rotated otherwise.
      inputs: paths of weights in front of which explicit operations are allowed, and only there:
        Hadamard matrices that follow from their size (`hadamard`), with random signs. None where
        ``online`` decides.
      fixed: paths of parameters that must stay as they are.
      seed: of the random signs and matrices.

    The fact "parameter_rotations" of the result says what is to become of the parameters.
    """

    stream: bool = True
    heads: bool = True
    online: bool = False
    seed: int = 0
    inputs: frozenset[str] | None = None
    fixed: frozenset[str] = frozenset()

    name: ClassVar[str] = "rotate"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    ensures: ClassVar[frozenset[str]] = frozenset({FACT})
    retraces: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`.

        Raises:
          FoldError: there is no residual stream, or it cannot be rotated; with the obstacle. Not
            where ``inputs`` are given.
        """
        found, notes = find_turns(
            program, stream=self.stream, heads=self.heads, online=self.online,
            inputs=self.inputs, fixed=self.fixed,
        )  # fmt: skip
        if self.stream and self.inputs is None and not any(f.role == "stream" for f in found):
            hint = "" if self.online else " (online=True allows explicit operations)"
            raise FoldError(f"{notes[0]}{hint}")
        turned = tuple((f, self._matrix(f)) for f in found)
        explicit = [(cut, spot, q) for f, q in turned for cut, spot in f.explicit]
        if explicit:
            program = _insert(program, explicit)
        notes = (*(f.proof().splitlines()[0] + _count(f) for f in found), *notes)
        return PassResult(program.with_facts(**{FACT: turned}), notes)

    def _matrix(self, found: FoundTurn) -> Rotation:
        # Not by number: other calls of the function may have other rotations before this one.
        name = min((path for path, _, _ in found.absorbed), default="")
        seed = self.seed + zlib.crc32(f"{found.role} {name}".encode())
        if found.role == "input" and self.inputs is not None:
            signs = np.random.default_rng(seed).choice([-1.0, 1.0], found.size)
            return Rotation(hadamard(found.size).factors, signs)
        make = fixing_ones if found.fixes_ones else random_hadamard
        return make(found.size, seed)


def _count(found: FoundTurn) -> str:
    more = f", {len(found.explicit)} explicit operations" if found.explicit else ""
    gains = f", after {len(found.gains)} gains" if found.gains else ""
    return f": {len(found.absorbed)} parameters rotated{gains}{more}"


def rotate_parameters(
    parameters: Mapping[str, Any], turned: tuple[Turned, ...]
) -> dict[str, Any]:
    """The parameters after the rotations.

    Args:
      parameters: arrays by path.
      turned: the fact "parameter_rotations" of `Rotate`.

    Returns:
      New arrays in the old dtypes, for the paths that change.

    Raises:
      FoldError: a gain is zero where a bias is not, or negative where that matters.
    """
    new: dict[str, Any] = {}

    def current(path: str) -> Any:
        return new.get(path, parameters[path])

    for found, _ in turned:
        for path, group in found.gains:
            new |= _fold_gain(path, group, {p: current(p) for p in parameters})
    for found, rotation in turned:
        for path, spot, _ in found.absorbed:
            turn = functools.partial(rotation.apply, axis=spot.dim, inner=spot.inner)
            new[path] = jax.jit(turn)(jnp.asarray(current(path)))  # one program, not one an op
    return new


def _fold_gain(path: str, group: ChannelGroup, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a gain one; what reads it takes it over."""
    gain = np.asarray(parameters[path], np.float64)
    if (gain < 0).any() and not group.signed:
        raise FoldError(f"the gain {path} has negative values, which {group.name} cannot take")
    values = np.zeros(group.count)
    values[np.abs(group.channels).ravel() - 1] = gain.ravel()
    dead = values == 0
    factors = group_factors(group, np.where(dead, 1.0, values))
    zero = group_factors(group, np.where(dead, 2.0, 1.0))
    folded = fold_parameters(parameters, {p: (f,) for p, f in factors.items()})
    for other, where in zero.items():
        old = np.asarray(parameters[other], np.float64)
        if other == path:
            folded[path] = jnp.ones_like(parameters[path])
        elif (where > 1).any():  # what such a channel was multiplied with never mattered
            folded[other] = jnp.where(jnp.asarray(where > 1), 0, folded[other])
        elif (np.where(where < 1, old, 0) != 0).any():
            raise FoldError(f"the gain {path} is zero where {other} is not: it cannot be made one")
    return folded


# --- explicit rotations -------------------------------------------------------------------------


def _insert(program: Program, explicit: list[tuple[Any, Spot, Rotation]]) -> Program:
    """The program with rotations in front of operands, behind results, at inputs and outputs."""
    jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
    at: dict[str, dict[Any, Any]] = {"operand": {}, "result": {}, "input": {}, "output": {}}
    for cut, spot, q in explicit:
        key = {"operand": (cut.site, cut.index), "result": cut.site}.get(cut.kind, cut.index)

        def turn(x: Any, cut: Any = cut, spot: Spot = spot, q: Rotation = q) -> Any:
            with jax.named_scope("rotation"):
                return q.apply(x, spot.dim, spot.inner, cut.back)

        at[cut.kind][key] = turn

    def flat(*inputs: Any) -> list[Any]:
        turned = [at["input"].get(i, _same)(x) for i, x in enumerate(inputs)]
        outs = _Turner(at["operand"], at["result"]).run(jaxpr, consts, turned)
        return [at["output"].get(i, _same)(x) for i, x in enumerate(outs)]

    return program.with_jaxpr(jax.make_jaxpr(flat)(*(v.aval for v in jaxpr.invars)))


def _same(x: Any) -> Any:
    return x


class _Turner(Interpreter):
    rules: Mapping[Any, Any] = {}
    control_rules = CONTROL
    visits = True

    def __init__(
        self, operands: Mapping[tuple[Site, int], Any], results: Mapping[Site, Any]
    ) -> None:
        self._operands, self._results = operands, results

    def visit(self, ctx: Context, ins: list[Any]) -> list[Any] | None:
        site = ctx.site
        ins = [self._operands.get((site, i), _same)(x) for i, x in enumerate(ins)]
        first, *rest = _compat.bind(ctx.eqn, ins)
        return [self._results.get(site, _same)(first), *rest]

    def to_float(self, ctx: Context, weight: Weight, reason: str) -> Any:
        return weight.value
