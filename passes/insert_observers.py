"""`InsertObservers`: the pass that adds calibration to a program, and what it needs around it.

Rules (`Observe`) say which operands are observed and how. The pass gives a program whose outputs
are the function's own and the statistics. `Observation` is the same for whoever runs many batches:
a state that starts empty, is accumulated (and may be donated), and is read at the end; its size is
known before anything runs. Called by `jaxquant.algorithms.calibrate` and `explain`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.passes import observer_control as observer_control  # enters its rules
from jaxquant.passes.observe_rules import Observe, observe_rules
from jaxquant.passes.observer import Observer
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.plan import ObserverSize
from jaxquant.passes.program import Program
from jaxquant.passes.statistics import NonFinite, Statistic

Seen = dict[str, dict[str, Any]]
"""``{path: {name: state}}``."""


class Observation:
    """A program with observers.

    Args:
      program: the float program.
      rules: what to observe.

    Attributes:
      out_shape: the states of a batch as shapes and dtypes, ``{path: {name: state}}``.
      met: all operands that could be observed; True for those that meet a weight.
      statistics: what is collected, ``{path: {name: statistic}}``.
      uses: what the observed operands are, by path.

    Raises:
      ValueError: two different statistics of one operand have the same name, or a statistic cannot
        be collected where it is asked for.
    """

    def __init__(self, program: Program, rules: Sequence[Observe]) -> None:
        self.program, self.rules = program, tuple(rules)
        self._draws = any(s.draws for rule in self.rules for s in rule.statistics)
        observer = Observer(program, self._select)

        def observe(inputs: Sequence[Any]) -> Any:
            return observer.observe(inputs, self._key(0))[1]

        avals = [_struct(v.aval) for v in program.jaxpr.jaxpr.invars]
        self.out_shape = jax.eval_shape(observe, avals)
        self.met, self.statistics, self.uses = observer.met, observer.statistics, observer.uses

    def _select(self, path: str, weight: bool) -> Sequence[Statistic]:
        chosen: dict[str, Statistic] = {}
        for rule in self.rules:
            for statistic in rule.statistics if rule.matches(path, weight) else ():
                if chosen.setdefault(statistic.name, statistic) != statistic:
                    raise ValueError(
                        f"{path!r} is observed with {chosen[statistic.name]} and {statistic}, "
                        f"which share the name {statistic.name!r}; choose one"
                    )
        return (*chosen.values(), NonFinite()) if chosen else ()

    def __call__(self, *inputs: Any, step: Any = 0) -> tuple[list[Any], dict[str, Any]]:
        """The program's outputs, and the states of one batch: ``{path: {name: state}}``.

        Args:
          *inputs: the program's flat inputs.
          step: number of the batch, for statistics that draw at random.
        """
        return Observer(self.program, self._select).observe(inputs, self._key(step))

    def _key(self, step: Any) -> Any:
        return jax.random.fold_in(jax.random.key(0), step) if self._draws else None

    def init(self) -> dict[str, Any]:
        """The state before the first batch; every leaf is a buffer of its own."""
        seen = {path: self._empty(path) for path in self.out_shape}
        return {"step": jnp.zeros((), jnp.int32), "seen": seen}

    def _empty(self, path: str) -> dict[str, Any]:
        return {
            name: jax.tree.map(
                lambda e, s: jnp.array(jnp.broadcast_to(e, s.shape), copy=True),
                self.statistics[path][name].empty(self.uses[path]),
                state,
            )
            for name, state in self.out_shape[path].items()
        }

    def extended(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of other calls, with room for what only this program sees.

        Raises:
          ValueError: an operand has other channels here.
        """
        seen = dict(state["seen"])
        for path, own in self.out_shape.items():
            if path not in seen:
                seen[path] = self._empty(path)
            for name, structs in own.items():
                shapes = [x.shape for x in jax.tree.leaves(structs)]
                before = [x.shape for x in jax.tree.leaves(seen[path][name])]
                if shapes != before:
                    raise ValueError(
                        f"{path!r}: {name} has shape {shapes[0]} in this batch and {before[0]} in "
                        "those before; give batches of one shape, or observe the whole tensor"
                    )
        return {**state, "seen": seen}

    def accumulate(self, state: dict[str, Any], *inputs: Any) -> dict[str, Any]:
        """The state after one more batch; pure, so that ``state`` may be donated under jit.

        Args:
          state: from `init`, `extended` or `accumulate`.
          *inputs: the program's flat inputs.
        """
        _, found = self(*inputs, step=state["step"])
        seen = {}
        for path, before in state["seen"].items():
            new = found.get(path, {})
            seen[path] = {
                name: self.statistics[path][name].merge(old, new[name]) if name in new else old
                for name, old in before.items()
            }
        return {"step": state["step"] + 1, "seen": seen}

    def sizes(self) -> tuple[ObserverSize, ...]:
        """What each statistic takes; the sum of bytes is that of the state. Computes nothing."""
        found = [ObserverSize("", "step", (), 4)]
        for path, states in self.out_shape.items():
            for name, state in states.items():
                value = jax.eval_shape(self.statistics[path][name].value, state)
                size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
                found.append(ObserverSize(path, name, tuple(value.shape), size))
        return tuple(found)


def check_rules(rules: Sequence[Observe], met: Mapping[str, bool]) -> None:
    """Refuses rules that match nothing.

    Args:
      rules: the rules.
      met: all operands that could be observed (`Observation.met`).

    Raises:
      ValueError: with what could have been observed.
    """
    for rule in rules:
        if not any(rule.matches(path, weight) for path, weight in met.items()):
            known = [path for path, weight in met.items() if weight == (rule.op == "weight")]
            raise ValueError(
                f"{rule.path!r} matches no {rule.op} operation; there are: "
                f"{', '.join(known) or 'none'}"
            )


def check_finite(seen: Seen, weights: Container[str]) -> None:
    """Refuses states of values that were NaN or infinite.

    Args:
      seen: concrete states.
      weights: the paths of operands that meet a weight.

    Raises:
      ValueError: names the operation, and the layer where scans stack it.
    """
    for path, states in seen.items():
        counts = np.asarray(states["nonfinite"])
        if not counts.any():
            continue
        where = np.argwhere(counts)[0].tolist()
        layer = f", first in layer {', '.join(map(str, where))}" if where else ""
        what = f"are multiplied with {path!r}" if path in weights else f"enter {path!r}"
        raise ValueError(
            f"calibration: {int(counts.sum())} of the values that {what} are not finite{layer}"
        )


def read(seen: Seen, statistics: Mapping[str, Mapping[str, Statistic]]) -> Seen:
    """What was collected, ``{path: {name: array}}``, without the counts of bad values."""
    return {
        path: {
            name: statistics[path][name].value(state)
            for name, state in states.items()
            if name != "nonfinite"
        }
        for path, states in seen.items()
    }


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


@dataclasses.dataclass(frozen=True)
class InsertObservers(Pass):
    """Adds statistics of the operands of products to the outputs of a float program.

    The function's result becomes ``(result, {path: {name: state}})``. Every operand that
    is observed has a state "nonfinite" besides: how many of its values were NaN or infinite.

    Attributes:
      rules: what to observe; names, statistics and globs as `observe_rules` reads them.
    """

    rules: Any = "absmax"

    name: ClassVar[str] = "insert_observers"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    retraces: ClassVar[bool] = True
    keeps_outputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", observe_rules(self.rules))

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`."""
        observation = Observation(program, self.rules)
        check_rules(self.rules, observation.met)
        avals = [_struct(v.aval) for v in program.jaxpr.jaxpr.invars]
        closed = jax.make_jaxpr(observation)(*avals)
        total = sum(size.bytes for size in observation.sizes() if size.path)
        notes = [f"{len(observation.out_shape)} operands observed, {total} bytes of statistics"]
        states = jax.tree_util.tree_structure(observation.out_shape)
        tree = jax.tree_util.treedef_tuple([program.outputs.tree, states])
        outputs = dataclasses.replace(program.outputs, tree=tree)
        return PassResult(program.with_jaxpr(closed, outputs=outputs), tuple(notes))
