"""`InsertScales`: a float program becomes a quantized one.

The inputs that are `QTensor`s are replaced by their parts, codes and scales, and the operations
that meet them by quantized primitives; `rewrite.Rewriter` does the work, by evaluating the float
jaxpr and tracing that. Called by `jaxquant.transform` and `jaxquant.compile`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from jax.tree_util import tree_flatten, tree_leaves, tree_structure, tree_unflatten

from jaxquant.core import _compat
from jaxquant.core.names import group_first, path_string
from jaxquant.core.qtensor import QTensor, is_qtensor
from jaxquant.core.recipe import Rule
from jaxquant.passes import dumping
from jaxquant.passes.events import Event
from jaxquant.passes.forwarding import forwarded_inputs
from jaxquant.passes.interpreter import Weight, is_weight
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Input, Outputs, Program
from jaxquant.passes.rewrite import Rewriter


@dataclasses.dataclass(frozen=True, eq=False)
class InsertScales(Pass):
    """Puts codes and scales in the place of weights.

    Attributes:
      weights: for some of the program's inputs the `QTensor` that comes in their place, by number.
        Only structure and types matter: parts may be arrays, tracers or abstract values.
      strict: raise `StrictError` where a weight would be dequantized instead.
      on_event: called with every decision.
    """

    weights: Mapping[int, QTensor] = dataclasses.field(repr=False)
    strict: bool = False
    on_event: Callable[[Event], None] | None = dataclasses.field(default=None, repr=False)

    name: ClassVar[str] = "insert_scales"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    ensures: ClassVar[frozenset[str]] = frozenset({"quantized"})
    retraces: ClassVar[bool] = True
    keeps_outputs: ClassVar[bool] = False

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`.

        Raises:
          ValueError: a weight does not have the shape of the input it comes for.
          StrictError: see ``strict``.
        """
        jaxpr, consts = _compat.open_jaxpr(program.jaxpr)
        inputs = self._inputs(program, jaxpr)
        events: list[Event] = []
        listener = self._listener(events)
        rewriter = Rewriter(on_event=listener, strict=self.strict, op_rules=self._op_rules())
        leaves, tree = tree_flatten(inputs)
        handed = _handed_through(jaxpr, inputs)

        def evaluate(*leaves: Any) -> list[Any]:
            outs = rewriter.run(jaxpr, consts, _with_common_scales(tree_unflatten(tree, leaves)))
            kept = [out for i, out in enumerate(outs) if i not in handed]
            return [rewriter.returned(out) if is_weight(out) else out for out in kept]

        closed = jax.make_jaxpr(evaluate)(*leaves)
        after = program.with_jaxpr(
            closed,
            inputs=tuple(_described(program.inputs, inputs)),
            outputs=_outputs(program.outputs, len(jaxpr.outvars), handed),
            flatten=_flatten(program, inputs),
            stage="quantized",
        )
        return PassResult(after, tuple(map(_sentence, events)))

    def _inputs(self, program: Program, jaxpr: Any) -> list[Any]:
        """`Weight`s of abstract values, and abstract values for all other inputs."""
        inputs: list[Any] = [var.aval for var in jaxpr.invars]
        for i, weight in self.weights.items():
            if weight.shape != inputs[i].shape:
                raise ValueError(
                    f"weights[{i}] stands for {list(weight.shape)}, but that input of the program "
                    f"is {list(inputs[i].shape)}"
                )
            inputs[i] = Weight(jax.tree.map(_abstract, weight), program.inputs[i].path or "")
        return inputs

    def _op_rules(self) -> tuple[Rule, ...]:
        """The rules for attention products that the weights carry."""
        rules: dict[Rule, None] = {}
        for weight in self.weights.values():
            rules.update(dict.fromkeys(weight.op_rules))
        return tuple(rules)

    def _listener(self, events: list[Event]) -> Callable[[Event], None] | None:
        # Describing a lowering costs time: only where somebody reads it.
        if self.on_event is None and dumping.wanted() is None:
            return None

        def listen(event: Event) -> None:
            events.append(event)
            if self.on_event is not None:
                self.on_event(event)

        return listen


def _with_common_scales(inputs: list[Any]) -> list[Any]:
    """The inputs, with one input scale and factor for all weights of a `QTensor.input_group`."""
    weights = {value.path: value.value for value in inputs if is_weight(value)}
    result = list(inputs)
    for i, value in enumerate(inputs):
        if is_weight(value) and (group := value.value.input_group) is not None:
            first = weights.get(group_first(value.path, group), value.value)
            own: dict[str, Any] = {"input_group": None}
            for part in ("input_scale", "input_factor"):
                mine, theirs = getattr(value.value, part), getattr(first, part)
                # Trees may be mixed: what is there may be of no group, or of another one.
                alike = mine is not None and theirs is not None
                if alike and first.input_group == group and jax.typeof(theirs) == jax.typeof(mine):
                    own[part] = theirs
            result[i] = value.replace(value=value.value.replace(**own))
    return result


def _abstract(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)


def _handed_through(jaxpr: Any, inputs: list[Any]) -> dict[int, int]:
    """Outputs that are a quantized input, untouched: output and input numbers."""
    return {
        i: source
        for i, source in enumerate(forwarded_inputs(jaxpr))
        if source is not None and is_weight(inputs[source])
    }


def _described(before: tuple[Input, ...], inputs: list[Any]) -> list[Input]:
    described: list[Input] = []
    for known, value in zip(before, inputs, strict=True):
        if not is_weight(value):
            described.append(known)
            continue
        keyed, _ = jax.tree_util.tree_flatten_with_path(value.value)
        described += [Input(value.path, path_string(path)) for path, _ in keyed]
    return described


def _outputs(before: Outputs, count: int, handed: dict[int, int]) -> Outputs:
    """The outputs without those that are arguments handed through."""
    static = {i for i, _ in before.static}
    positions = [i for i in range(count + len(static)) if i not in static]
    arguments = tuple((positions[i], source) for i, source in handed.items())
    return dataclasses.replace(before, arguments=arguments)


def _flatten(program: Program, inputs: list[Any]) -> Callable[..., list[Any]]:
    structures: dict[int, Any] = {
        i: tree_structure(x.value) for i, x in enumerate(inputs) if is_weight(x)
    }

    def flatten(*args: Any, **kwargs: Any) -> list[Any]:
        values = program.flatten(*args, **kwargs)
        for i, value in enumerate(values):
            if i not in structures and is_qtensor(value):
                raise ValueError(
                    f"argument {program.inputs[i].path or i} is a QTensor, but was a float array "
                    "when the program was made"
                )
            if i in structures and tree_structure(value) != structures[i]:
                raise ValueError(
                    f"parameter {program.inputs[i].path or i!r} differs from the one the program "
                    f"was made for: {value}"
                )
        return tree_leaves(values)

    return flatten


def _sentence(event: Event) -> str:
    what = event.path or "/".join(event.names)
    return f"{what}: {event.primitive} -> {event.lowering or event.action} ({event.reason})"
