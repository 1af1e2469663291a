"""Times of one product by many configs, on the GPU at hand.

Called by `benchmarks.gpu_tune`. Configs are compiled several at a time, then timed one after the
other; each time goes to a journal, so that a config that hangs or takes its process with it is not
tried again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_products import (
    FORMATS,
    LLM_INT8,
    Case,
    function_of,
    inputs,
    llm_int8,
    time_case,
)
from benchmarks.gpu_supervise import Journal, key_of, leave_if_broken
from benchmarks.gpu_timing import Timer, program
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.gpu.llm_int8 import integer_problem
from jaxquant.pallas_kernels.problem import E2M1, MatmulProblem, RaggedProblem

_COMPILERS = 8  # configs that are compiled at a time
# A config whose result differs by more than this from XLA's, relative to the largest, is dropped.
_TOLERANCE = 2.0**-6


def problem_of(case: Case) -> MatmulProblem:
    """The case as a kernel is asked for it; of all rows, if they are grouped by expert."""
    if case.form == LLM_INT8:
        return integer_problem(case.m, case.k, case.n, "bfloat16")
    form = FORMATS[case.form]
    qtype = get_qtype(form.qtype)
    codes = qtype.name if qtype.packed else "table4" if qtype.table else qtype.storage
    act = None if form.act is None else form.act.replace("float8_e4m3", "float8_e4m3fn")
    return MatmulProblem(
        case.m, case.k, case.n, codes, act or "bfloat16", form.group or 0, form.zero_point,
        x_scale=act is not None, e2m1=qtype.table == E2M1,
    )  # fmt: skip


class Clock:
    """Times of one product, in a journal: what is in it is not timed again."""

    def __init__(self, case: Case, journal: Journal, timer: Timer) -> None:
        self.case, self.journal, self._timer = case, journal, timer

    @functools.cached_property
    def _sets(self) -> list[tuple[Any, ...]]:
        return inputs(self.case, "cuda")

    @functools.cached_property
    def _expected(self) -> np.ndarray:
        """XLA's result for the first weight."""
        fn = function_of(dataclasses.replace(self.case, route="xla"))
        return np.asarray(jax.jit(fn)(*self._sets[0]), np.float32)

    def xla(self) -> float:
        """Device time of XLA's route.

        Raises:
          RuntimeError: it does not run.
        """
        case = dataclasses.replace(self.case, route="xla")

        def timed() -> dict[str, Any]:
            result = time_case(case, self._timer, "cuda")
            us = None if result.timing is None else result.timing.device
            return {"us": us, "note": result.note}

        found = self.journal.once(key_of(xla=dataclasses.asdict(case)), timed)
        if found.get("us") is None:
            raise RuntimeError(f"XLA's route was not timed: {found}")
        return found["us"]

    def of(self, configs: Sequence[GpuConfig]) -> list[float | None]:
        """Device time by each config; None where it does not compile, is wrong, or killed all."""
        case = dataclasses.asdict(self.case)
        keys = [key_of(case=case, config=dataclasses.asdict(config)) for config in configs]
        new = [(k, c) for k, c in zip(keys, configs, strict=True) if k not in self.journal.results]
        if new:
            _ = self._sets  # before several threads want it
        with ThreadPoolExecutor(_COMPILERS) as pool:
            # All are compiled before any is timed: compiling takes the processor from launches.
            programs = list(pool.map(lambda item: self._compile(item[1]), new))
        for (key, _), compiled in zip(new, programs, strict=True):
            self.journal.once(key, lambda compiled=compiled: self._time(compiled))
        found = [self.journal.results[key] for key in keys]
        return [one if isinstance(one, float) else None for one in found]

    def _compile(self, config: GpuConfig) -> tuple[Any, Any] | str:
        """One call, and the program that is timed; or why there is none."""
        try:
            fn = function_by(self.case, config)
            once = jax.jit(fn).lower(*self._sets[0]).compile()
            return once, jax.jit(program(fn)).lower(self._sets).compile()
        except Exception as error:  # noqa: BLE001  (a candidate that the compiler refuses is none)
            return f"{type(error).__name__}: {error}"[:200]

    def _time(self, compiled: tuple[Any, Any] | str) -> float | str:
        if isinstance(compiled, str):
            return compiled
        once, every = compiled
        try:
            got, want = np.asarray(once(*self._sets[0]), np.float32), self._expected
            if not np.abs(got - want).max() <= _TOLERANCE * np.abs(want).max():
                return "wrong"
            timing = self._timer(every, (self._sets,), len(self._sets))
        except Exception as error:  # noqa: BLE001  (a candidate that does not run is none)
            leave_if_broken()
            return f"{type(error).__name__}: {error}"[:200]
        return "not timed" if timing is None else timing.device


def function_by(case: Case, config: GpuConfig) -> Any:
    """The kernel by this config, from a set of `inputs`."""
    if case.form == LLM_INT8:
        return functools.partial(llm_int8, config=config)
    return functools.partial(multiply, case=case, config=config)


def multiply(
    x: jax.Array, w: QTensor, *sizes: jax.Array, case: Case, config: GpuConfig
) -> jax.Array:
    """The kernel, with the quantization of x where the format has one."""
    from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul
    from jaxquant.pallas_kernels.gpu.ragged import ragged_matmul

    problem, x_scale = problem_of(case), None
    if FORMATS[case.form].act is not None:
        x, x_scale = quantize_activation(x, ActQuant(problem.x_dtype, (1,)))
    arrays = x, w.codes.mT, w.scale, w.zero_point
    given = {"config": config, "x_scale": x_scale, "table": w.qtype.table}
    if case.experts:
        grouped = RaggedProblem(problem, case.experts)
        return ragged_matmul(*arrays, group_sizes=sizes[0], problem=grouped, **given)
    return quantized_matmul(*arrays, problem=problem, **given)
