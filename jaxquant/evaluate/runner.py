"""Runs one candidate (the float model, or one recipe) and compiles it once per signature.

For: :mod:`jaxquant.evaluate.compare`, for both quality and latency, so that nothing is compiled
twice and compile time is known apart from run time. A runner owns its compiled programs; two
runners share no trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.evaluate.batches import Call, join
from jaxquant.evaluate.latency import timed


@dataclasses.dataclass(frozen=True)
class CompileTime:
    """Seconds spent before the first run of one signature."""

    trace_s: float
    compile_s: float


class Runner:
    """Calls ``fn(tree, *args, **kwargs)`` through programs compiled ahead of time.

    Attributes:
      fn: what is called.
      name: how errors and the report call it.
      tree: the parameters, float or with QTensor leaves. NumPy arrays are put on the device once:
        else every call would do it, and its time would be the model's.
      compile_times: one entry per signature, in the order met.
    """

    def __init__(self, name: str, fn: Callable[..., Any], tree: Any):
        self.name = name
        self.tree = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, tree
        )
        self.compile_times: list[CompileTime] = []
        self.fn = fn
        self._programs: dict[Any, Any] = {}

    def bind(self, call: Call) -> Callable[[], Any]:
        """The call of a batch without arguments; compiles for its signature if need be."""
        arrays, key = call.split()
        arrays = [jnp.asarray(a) for a in arrays]
        signature = (key, tuple((jax.typeof(a), a.sharding) for a in arrays))
        try:
            program = self._programs.get(signature)
        except TypeError as error:
            raise TypeError(
                "arguments of a batch that are no arrays are static and must be hashable"
            ) from error
        if program is None:
            program = self._programs[signature] = self._compile(key, arrays)
        return lambda: program(self.tree, arrays)

    def __call__(self, call: Call) -> Any:
        """Runs one batch and returns the model's outputs."""
        return self.bind(call)()

    def _compile(self, key: Any, arrays: list[jax.Array]) -> Any:
        def run(tree: Any, arrays: list[jax.Array]) -> Any:
            args, kwargs = join(key, arrays)
            return self.fn(tree, *args, **kwargs)

        program = jax.jit(run)
        lowered, trace_s = timed(lambda: program.lower(self.tree, arrays))
        _, compile_s = timed(lowered.compile)
        self.compile_times.append(CompileTime(trace_s, compile_s))
        # Called through jit, which finds what was compiled: jax 0.10's ahead-of-time call refuses
        # committed int4 arrays (restored ones) on CPU over a layout flag that both sides ignore.
        return program
