"""`Observer`: the interpreter that collects statistics while it evaluates a float jaxpr.

Parameters are marked; wherever a marked weight meets a product, statistics of the product's *other*
operand are recorded; of a product of two activations both operands can be observed. Rules for
equations with sub-jaxprs are in `observer_control`. Used through `observers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp
from jax.sharding import PartitionSpec

from jaxquant.core import _compat
from jaxquant.core.names import innermost_module
from jaxquant.core.structure import Unstructured
from jaxquant.passes.interpreter import (
    ELEMENT_MOVES,
    Context,
    Interpreter,
    Rule,
    Site,
    Weight,
    is_weight,
    register,
)
from jaxquant.passes.observed import Operand, Seen, conv_operand, dot_operand, ragged_operand
from jaxquant.passes.observer_checks import MergeChecks
from jaxquant.passes.program import Program
from jaxquant.passes.statistics import State, Statistic

# What is observed, and the scans that stack it.
Key = tuple[str, tuple[Site, ...]]
Collected = dict[Key, dict[str, State]]
Select = Callable[[str, bool], Sequence[Statistic]]
"""(path, whether a weight is there) -> what to collect."""

RULES: dict[Primitive, Rule] = {}
CONTROL: dict[Primitive, Rule] = {}


class Observer(Interpreter):
    """Marks flow like QTensors do; the values stay float.

    Args:
      program: the float program.
      select: what to collect of which operand.

    Attributes:
      met: every operand that could be observed, by path; True where it meets a weight.
      uses: what the observed operands are, by path.
      key: the random key of the place that is being evaluated, or None.
      stacked: sites of the scans over parameters around that place.
      manual: names of the mesh axes that are manual there.
      typed: whether types tell along which of these values vary.
    """

    rules = RULES
    control_rules = CONTROL
    visits = True

    def __init__(self, program: Program, select: Select) -> None:
        self.program, self._select = program, select
        self.met: dict[str, bool] = {}
        self.statistics: dict[str, dict[str, Statistic]] = {}
        self.key: Any = None
        self.stacked: tuple[Site, ...] = ()
        self.manual: tuple[str, ...] = ()
        self.typed = True
        self._found: Collected = {}
        self._draws: dict[Key, int] = {}
        self._checks = MergeChecks(program)
        self.uses = self._checks.uses
        self._numbers: dict[str | None, dict[Site, int]] = {}

    def observe(
        self, inputs: Sequence[Any], key: Any = None
    ) -> tuple[list[Any], dict[str, dict[str, State]]]:
        """Evaluates the program on its flat inputs.

        Args:
          inputs: as those of the program's jaxpr.
          key: for statistics that draw at random.

        Returns:
          Its outputs, and states by path and name of statistic.
        """
        jaxpr, consts = _compat.open_jaxpr(self.program.jaxpr)
        marked = [
            Weight(x, path) if path is not None and jnp.issubdtype(x.dtype, jnp.floating) else x
            for x, path in zip(inputs, self.program.paths, strict=True)
        ]
        self.key = key
        with self.collecting() as found:
            outs = self.run(jaxpr, consts, marked)
        merged: dict[str, dict[str, State]] = {}
        for (path, _), states in sorted(found.items(), key=lambda item: -len(item[0][1])):
            if path in merged:  # the parameter is also used outside the scan that stacks it
                states = self._merged(path, merged[path], states)
            merged[path] = states
        return [x.value if is_weight(x) else x for x in outs], merged

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Collected]:
        """What is recorded inside goes to a dict of its own: the outputs of one traced body."""
        outer, self._found = self._found, {}
        try:
            yield self._found
        finally:
            self._found = outer

    @contextlib.contextmanager
    def place(self, **changes: Any) -> Iterator[None]:
        """While open, `key`, `stacked`, `manual` or `typed` have other values."""
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)

    def record(
        self, ctx: Context, path: str, levels: tuple[Site, ...], seen: Seen, weight: bool
    ) -> None:
        """Adds the statistics of an operand to what is being collected."""
        if not jnp.issubdtype(seen.x.dtype, jnp.floating):
            return
        self.met.setdefault(path, weight)
        wanted = self._select(path, weight)
        if not wanted:
            return
        self._checks.check(ctx, path, seen.use, wanted, weight, self.manual)
        self.statistics[path] = {s.name: s for s in wanted}
        known, key = (path, levels), self.key
        if key is not None:  # another use of the same parameter draws anew
            number = self._draws[known] = self._draws.get(known, -1) + 1
            key = jax.random.fold_in(key, number)
            for axis in self.manual:  # devices draw differently, unless they hold the same rows
                if not self.typed or axis in _compat.varying_axes(seen.x):
                    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        seen = Seen(seen.x, seen.use, key, seen.group_sizes)
        self.add({known: {s.name: _of(s, seen) for s in wanted}})

    def add(self, found: Collected) -> None:
        """Merges states into what is being collected."""
        for key, states in found.items():
            if key in self._found:
                states = self._merged(key[0], self._found[key], states)
            self._found[key] = states

    def _merged(
        self, path: str, a: dict[str, State], b: dict[str, State]
    ) -> dict[str, State]:
        return {name: s.merge(a[name], b[name]) for name, s in self.statistics[path].items()}

    def each(self, found: Collected, do: Callable[[Statistic, State], State]) -> Collected:
        """Applies a function of a statistic and its state to all that was found."""
        return {
            key: {name: do(self.statistics[key[0]][name], state) for name, state in states.items()}
            for key, states in found.items()
        }

    def neutral(self, shapes: Collected) -> Collected:
        """Statistics of nothing, in the shapes of ``shapes``."""
        return {
            (path, levels): {
                name: jax.tree.map(
                    lambda e, s: _compat.vary_like(jnp.broadcast_to(e, s.shape), s),
                    self.statistics[path][name].empty(self.uses[path]),
                    state,
                )
                for name, state in states.items()
            }
            for (path, levels), states in shapes.items()
        }

    def number(self, ctx: Context, module: str | None) -> int:
        """The number of a weightless product among those of its module."""
        numbers = self._numbers.setdefault(module, {})
        return numbers.setdefault(ctx.site, len(numbers))

    def to_float(self, ctx: Context, weight: Weight, reason: str) -> Any:
        """The value: marks change nothing."""
        return weight.value

    def visit(self, ctx: Context, ins: list[Any]) -> list[Any] | None:
        """Observes both operands of a product of two activations."""
        if ctx.eqn.primitive is jp.dot_general_p:
            _weightless(ctx, ins)
        return None


def _of(statistic: Statistic, seen: Seen) -> State:
    """The state of one array; on an explicit mesh the partitioner reduces it over the devices."""
    if _compat.explicit_sharding(jax.typeof(seen.x)) is None:
        return statistic.of(seen)

    def of(x: Any, key: Any, group_sizes: Any) -> State:
        return statistic.of(Seen(x, seen.use, key, group_sizes))

    return jax.sharding.auto_axes(of, out_sharding=PartitionSpec())(
        seen.x, seen.key, seen.group_sizes
    )


def observer(ctx: Context) -> Observer:
    """The interpreter of a context, as what it is."""
    assert isinstance(ctx.interpreter, Observer)
    return ctx.interpreter


# --- equations: the mark follows structural operations and ends in products -------------------


@register(
    RULES, *ELEMENT_MOVES, jp.all_gather_p, jp.gather_p, jp.concatenate_p, _compat.stack_p,
    _compat.split_p, _compat.unstack_p, _compat.optimization_barrier_p, jp.mul_p, jp.div_p,
)  # fmt: skip
def _structural(ctx: Context, ins: list[Any]) -> list[Any]:
    primitive = ctx.eqn.primitive
    if primitive is _compat.optimization_barrier_p:
        return list(jax.lax.optimization_barrier(tuple(ins)))
    marks = [x for x in ins if is_weight(x)]
    if primitive in (jp.mul_p, jp.div_p) and not _is_scaled(ins):
        raise Unstructured("not a scalar factor")
    if primitive is jp.gather_p and not is_weight(ins[0]):
        raise Unstructured("a parameter is used as indices")
    outs = _compat.bind(ctx.eqn, [x.value if is_weight(x) else x for x in ins])
    path = ",".join(dict.fromkeys(mark.path for mark in marks))
    gathered = marks[0].gathered or (primitive is jp.gather_p and _picks(ctx))
    return [marks[0].replace(value=out, path=path, gathered=gathered) for out in outs]


def _is_scaled(ins: list[Any]) -> bool:
    """Whether a weight is multiplied with, or divided by, a number."""
    weight, factor = ins if is_weight(ins[0]) else ins[::-1]
    return not is_weight(factor) and jnp.ndim(factor) == 0 and not weight.gathered


def _picks(ctx: Context) -> bool:
    """Whether a gather takes rows by an array of indices, not one slice."""
    numbers = ctx.params["dimension_numbers"]
    return len(ctx.eqn.outvars[0].aval.shape) > len(numbers.offset_dims)


@register(RULES, jp.dot_general_p, jp.conv_general_dilated_p, _compat.ragged_dot_general_p)
def _product(ctx: Context, ins: list[Any]) -> list[Any]:
    """Of two weights the one that was looked up is the activation."""
    lhs, rhs = ins[:2]
    side = 1
    if is_weight(lhs) and (not is_weight(rhs) or (rhs.gathered and not lhs.gathered)):
        side = 0
    values = [y.value if is_weight(y) else y for y in ins]
    if is_weight(ins[side]) and (side == 1 or ctx.eqn.primitive is jp.dot_general_p):
        _with_weight(ctx, ins[side], side, values)
    return _compat.bind(ctx.eqn, values)


def _with_weight(ctx: Context, weight: Weight, side: int, values: list[Any]) -> None:
    if ctx.backward:
        return  # a cotangent is no input
    sizes = None
    if ctx.eqn.primitive is jp.dot_general_p:
        use: Operand | None = dot_operand(ctx.eqn, 1 - side, weight=not weight.gathered)
    elif ctx.eqn.primitive is jp.conv_general_dilated_p:
        use = conv_operand(ctx.eqn)
    else:
        use, sizes = ragged_operand(ctx.eqn), values[2]
    if use is None or not use.contract:
        return  # a gain or a bias: nothing is summed
    seen = Seen(values[1 - side], use, None, sizes)
    for path in weight.path.split(","):  # joined parameters have one input
        observer(ctx).record(ctx, path, weight.levels, seen, True)


def _weightless(ctx: Context, values: list[Any]) -> None:
    if ctx.backward or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in values):
        return
    found = innermost_module(ctx.names)
    module = found[0] if found else None
    own = observer(ctx)
    name = f"dot_general_{own.number(ctx, module)}"
    prefix = f"{module}/{name}" if module else name
    for side, word in enumerate(("lhs", "rhs")):
        use = dot_operand(ctx.eqn, side, weight=False)
        if use.contract:
            own.record(ctx, f"{prefix}/{word}", own.stacked, Seen(values[side], use), False)
