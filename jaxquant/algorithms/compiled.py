"""`jq.compile`: the pipeline run once, and what came of it in the hand.

A decorated model compiles itself when it is called. `compile` is for whoever wants to see and keep
the result: the plan, the program after the last pass, the lowered computation, its cost; or to put
passes of their own into the pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxquant.algorithms.planning import stored_plan
from jaxquant.core import _compat
from jaxquant.core.primitives.kernels import planned_for
from jaxquant.core.qtensor import is_qtensor
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.adapter import ModelAdapter
from jaxquant.frontends.marks import recipe_of
from jaxquant.pallas_kernels.dispatch import Implementation, Place, check_implementation
from jaxquant.passes.cost import Cost, traffic
from jaxquant.passes.pass_manager import Pass, PassManager, Record, Verify
from jaxquant.passes.pipeline import evaluate, quantizing_passes
from jaxquant.passes.plan import Plan
from jaxquant.passes.program import Program, is_traceable, trace

Passes = Callable[[tuple[Pass, ...]], Sequence[Pass]]


def compile(
    model: Any,
    *args: Any,
    strict: bool = False,
    implementation: Implementation | None = None,
    passes: Passes | None = None,
    verify: Verify | None = None,
    place: Place | None = None,
    **kwargs: Any,
) -> Compiled:
    """Runs the pipeline on one call of a model or function.

    Args:
      model: a Linen or NNX module instance, or a function; decorated or not.
      *args: Linen: the variables, then the model's own arguments. Function: its parameters, then
        its other arguments. NNX: the call's arguments only. Leaves may be arrays, `QTensor`s or
        `jax.ShapeDtypeStruct`s; what the leaves are decides what is quantized (see `ptq`).
      strict: raise `StrictError` where a weight would be dequantized.
      implementation: of all quantized products: "xla" or "pallas" to force one, which is an error
        where it does not fit; None for the best on the platform.
      passes: gets the passes of the pipeline in order and returns those to run, with others put
        anywhere between, before or after them. They start from the float program.
      verify: what is checked after each pass (see `PassManager`).
      place: where the program will run: what `records` and `plan` say is for there. None for
        devices of the default kind, as many as the arrays' shardings say. What runs is settled
        when it is lowered, for the device.
      **kwargs: keyword arguments of the call.

    Returns:
      A `Compiled`: callable with arguments of the same kind, also inside `jax.jit`.

    Raises:
      StrictError: see ``strict``.
      PassError, VerificationError: a pass cannot run where it stands, or broke the program.
    """
    if recipe_of(model) is None:
        model = quantize()(model)
    options = {
        "strict": strict,
        "implementation": check_implementation(implementation),
        "place": place,
    }
    compiled = Compiled(describe(model), options, passes, verify)
    compiled._first = compiled._variant(*compiled._given(args, kwargs))
    return compiled


class Compiled:
    """A model's call after the pipeline; made by `compile`.

    Calling it runs the quantized program. A call of another signature (shapes, dtypes, structure,
    values of arguments that are not arrays) runs the pipeline for that one; equal signatures never
    trace again. The attributes speak of the call that `compile` was given. Updates of an NNX
    module's state, such as of running means, are not written back.

    Attributes:
      records: a `Record` for each pass: its time, the equations after it, what it said.
    """

    _first: _Variant

    def __init__(
        self,
        adapter: ModelAdapter,
        options: dict[str, Any],
        passes: Passes | None,
        verify: Verify | None,
    ) -> None:
        self._adapter, self._options = adapter, options
        self._passes, self._verify = passes, verify
        self._variants: dict[Hashable, _Variant] = {}

    @property
    def records(self) -> tuple[Record, ...]:
        """What the pass manager saw of each pass."""
        return self._first.records

    @property
    def program(self) -> Program:
        """The program after the last pass."""
        return self._first.program

    @property
    def jaxpr(self) -> Any:
        """The closed jaxpr after the last pass."""
        return self._first.program.jaxpr

    @functools.cached_property
    def plan(self) -> Plan:
        """What becomes of every operation at the place that was given, and why.

        Of single products: what later passes make one launch of, `records` say.
        """
        first = self._first
        with planned_for(self._options["place"]):
            return stored_plan(first.float_program, first.arguments, self._adapter.notes)

    def cost(self) -> Cost:
        """Bytes moved and operations, of the float program and of the quantized one."""
        return Cost(_traffic(self._first.float_program), _traffic(self._first.program))

    def lower(self) -> jax.stages.Lowered:
        """The program lowered for the default backend; ``.compile()`` gives an executable."""
        return self._first.call.lower(self._first.leaves)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program on arrays."""
        given, kwargs = self._given(args, kwargs)
        return self._variant(given, kwargs).run(given, kwargs)

    def _given(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the pure function: the tree comes first."""
        if self._adapter.kind == "nnx":
            return (self._adapter.pure()[1], *args), kwargs
        return args, kwargs

    def _variant(self, given: tuple[Any, ...], kwargs: dict[str, Any]) -> _Variant:
        key = _signature(given, kwargs)
        if key not in self._variants:
            self._variants[key] = self._make(given, kwargs)
        return self._variants[key]

    def _make(self, given: tuple[Any, ...], kwargs: dict[str, Any]) -> _Variant:
        tree, *rest = given
        fn, _ = self._adapter.pure(tree)
        program = trace(fn, tree, rest, kwargs, self._adapter.param_paths(tree))
        arguments = program.flatten(tree, *rest, **kwargs)
        weights = {i: value for i, value in enumerate(arguments) if is_qtensor(value)}
        steps: Sequence[Pass] = quantizing_passes(weights, **self._options)
        if self._passes is not None:
            steps = tuple(self._passes(tuple(steps)))
        manager = PassManager(steps, verify=self._verify, title=self._adapter.name)
        after = manager.run(program)
        abstract = jax.tree.map(_abstract, arguments)
        leaves = jax.tree.leaves(abstract)
        return _Variant(program, after, manager.records, abstract, leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class _Variant:
    """One signature of a compiled call; arguments are abstract, so that no array is kept alive."""

    float_program: Program
    program: Program
    records: tuple[Record, ...]
    arguments: list[Any]
    leaves: list[Any]

    @functools.cached_property
    def call(self) -> Any:
        """The program as a jitted function of its flat inputs."""
        return jax.jit(functools.partial(evaluate, self.program))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluates on arrays; QTensors that are handed through are those of the call."""
        arguments = self.float_program.flatten(*args, **kwargs)
        arrays = self.call(self.program.flatten(*args, **kwargs))
        return self.program.outputs.assemble(self.program.outputs.leaves(arrays, arguments))


def _traffic(program: Program) -> Any:
    return traffic(program.jaxpr, [known.path is not None for known in program.inputs])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    concrete = isinstance(leaf, jax.Array) and not _compat.is_tracer(leaf)
    sharding = leaf.sharding if concrete and isinstance(leaf.sharding, NamedSharding) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _signature(args: Any, kwargs: Any) -> Hashable:
    """What a trace depends on: structure, types, and the values of what is not an array."""
    leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
    kinds = (_type(leaf) if is_traceable(leaf) else (type(leaf), leaf) for leaf in leaves)
    key = (tree, tuple(kinds))
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(
            "compile: an argument that is not an array cannot be hashed, so calls cannot be told "
            f"apart: {error}"
        ) from error
    return key


def _type(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, False, None, frozenset()
    aval = jax.typeof(leaf)
    sharding = _compat.explicit_sharding(aval)
    return aval.shape, aval.dtype, aval.weak_type, sharding, getattr(aval, "vma", frozenset())
