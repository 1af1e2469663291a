"""Random products with float64 answers, and whether a kernel's results are those.

Called by `benchmarks.gpu_check` and the tests that run on a chip. Memory is filled with NaN before
each run, so that what a kernel leaves unwritten shows, and each program runs three times, to the
same bits. `gpu_oracle_grouped` has the products of more than one weight or part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.pallas_kernels import packing, reference
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.gpu.chips import Chip
from jaxquant.pallas_kernels.problem import PACKED, STORAGE, MatmulProblem, Unsupported
from tests.pallas_kernels.tpu.cases import TABLE, Case, make

_RUNS = 3
CODES = ("int4", "int8", "int2", "int3", "table4", "float8_e4m3fn", "float8_e5m2")
# Of integers exact but for float32; of weights or products rounded to bfloat16; of fp8's own sums.
EXACT, ROUNDED, FLOAT8 = 1e-5, 2.0**-8, 2.0**-11
Run = Callable[[dict[str, Any]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to do a product.

    Attributes:
      name: e.g. the config.
      run: from the arrays of a case, but for its table, to the result.
      tolerance: of an error, relative to the sum of magnitudes.
    """

    name: str
    run: Run
    tolerance: float


def random_problem(rng: np.random.Generator, small: bool = False) -> MatmulProblem:
    """A product of any supported kind; edges of m, n and k fall anywhere."""
    codes = str(rng.choice(CODES))
    group = int(rng.choice([32, 64, 128])) if rng.random() < 0.8 else 0
    k = 128 * int(rng.integers(1, 5 if small else 33))
    if not group and rng.random() < 0.3:
        k += 32
    n = 16 * int(rng.integers(1, 9 if small else 80)) if rng.random() < 0.5 else 128
    m = int(rng.integers(1, 20 if small else 300))
    integer = codes in ("int4", "int8") and rng.random() < 0.4
    eight_bit = codes.startswith("float8") and rng.random() < 0.7
    x_dtype = "int8" if integer else codes if eight_bit else "bfloat16"
    flags = {name: bool(rng.random() < 0.25) for name in ("bias", "gate", "residual")}
    zero_point = codes in ("int4", "int8", "int3", "int2") and bool(rng.random() < 0.4)
    return MatmulProblem(
        m, k, n, codes, x_dtype, group, zero_point, x_scale=x_dtype != "bfloat16",
        out_dtype="float32", **({} if small else flags),
    )  # fmt: skip


def check(
    problem: MatmulProblem, seed: int, chip: Chip | None, variants: bool = True
) -> tuple[list[str], list[str]]:
    """What was tried, by kind; and what was wrong.

    Args:
      problem: the product.
      seed: of its operands.
      chip: where it runs; None runs XLA's route in the kernels' place.
      variants: other configs than the chosen one as well.
    """
    try:
        ways = [by_xla(problem)] if chip is None else list(by_kernels(problem, chip))
    except Unsupported as why:
        return [f"{problem.codes}: unsupported: {why}"], []
    kind = f"{problem.codes} x {problem.x_dtype}"
    return judge(
        kind, f"seed {seed}: {problem}", make(problem, seed), ways[: None if variants else 1]
    )


def judge(kind: str, what: str, case: Case, ways: Iterable[Attempt]) -> tuple[list[str], list[str]]:
    """The kind once for each attempt, and what was wrong with which."""
    done, wrong = [], []
    for attempt in ways:
        done.append(kind)
        try:
            fault = compare(case, attempt)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the fault)
            fault = f"{type(error).__name__}: {error}"[:500]
        if fault:
            wrong.append(f"{what}: {attempt.name}: {fault}")
    return done, wrong


def compare(case: Case, attempt: Attempt) -> str:
    """What is wrong with the results, or ""."""
    run = jax.jit(attempt.run)
    results = []
    for _ in range(_RUNS):
        poison = [jnp.full(case.want.size, jnp.nan, jnp.float32) for _ in range(4)]
        jax.block_until_ready(poison)
        del poison
        results.append(np.asarray(run({k: v for k, v in case.arrays.items() if k != "table"})))
    if any(not np.array_equal(results[0], other, equal_nan=True) for other in results[1:]):
        return "runs differ"
    error = np.abs(results[0].astype(np.float64) - case.want)
    bound = attempt.tolerance * (1 + case.scale_of_errors)
    bad = ~(error <= bound)  # NaN is bad
    if not bad.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    first = f"{results[0][at]}, not {case.want[at]}, at {at}"
    return f"{bad.sum()} of {bad.size} are wrong; the first is {first}"


def tolerance_of(problem: MatmulProblem, scale: str, operand: str) -> float:
    """What a kernel's rounding may come to, by when it scales and in what it multiplies."""
    if scale == "before" or problem.codes == "table4":
        return ROUNDED
    return FLOAT8 if "float8" in operand else EXACT


def by_kernels(problem: MatmulProblem, chip: Chip) -> Iterator[Attempt]:
    """The kernel as dispatch would run it, and with variants of the config."""
    from jaxquant.pallas_kernels.gpu.config import GpuConfig, shared_bytes
    from jaxquant.pallas_kernels.gpu.heuristics import choose_config
    from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul

    config = choose_config(problem, chip)
    table = TABLE if problem.codes == "table4" else None

    def run(config: GpuConfig) -> Run:
        def fn(arrays: dict[str, Any]) -> jax.Array:
            own = {**arrays, "codes": arrays["codes"].T}
            return quantized_matmul(**own, problem=problem, config=config, table=table)

        return fn

    tolerance = tolerance_of(problem, config.scale, config.operand)
    changes: list[dict[str, Any]] = [{}, {"split_k": 2}, {"split_k": 1}, {"stages": 2}]
    for variant in dict.fromkeys(dataclasses.replace(config, **change) for change in changes):
        if shared_bytes(problem, variant) <= chip.shared_bytes:
            yield Attempt(str(variant), run(variant), tolerance)


def by_xla(problem: MatmulProblem) -> Attempt:
    """XLA's route on the same arrays, without epilogues."""

    def fn(arrays: dict[str, Any]) -> jax.Array:
        codes = arrays["codes"]
        if problem.codes in PACKED:
            codes = packing.unpack(codes, STORAGE[problem.codes][1], 0, problem.k)
        if problem.codes == "table4":
            codes = jnp.asarray(TABLE, jnp.float32)[codes.astype(jnp.int32) + 8]
        x = jnp.asarray(arrays["x"]).astype(jnp.float32)
        return reference.dot_general(
            x * arrays.get("x_scale", jnp.float32(1)), codes, jnp.asarray(arrays["scale"]),
            arrays.get("zero_point"), dimension_numbers=(((1,), (0,)), ((), ())),
        )  # fmt: skip

    return Attempt("xla", fn, EXACT)


def check_rows(dtype: str, k: int) -> list[str]:
    """The quantization of activations in one launch: scales to the bit, codes but for ties."""
    from jaxquant.pallas_kernels.gpu.quantize_rows import quantize_rows

    what, wrong = f"quantize_rows: {dtype}, k = {k}", []
    x = jax.random.normal(jax.random.key(k), (33, k), jnp.bfloat16)
    x = x.at[3].set(0).at[5, k // 2].set(jnp.nan)
    codes, scale = jax.jit(functools.partial(quantize_rows, dtype=dtype))(x)
    act = ActQuant(dtype, (1,))
    want, want_scale = jax.jit(functools.partial(quantize_activation, act=act))(x)
    if not np.isnan(scale[5, 0]):
        wrong.append(f"{what}: a NaN is lost")
    pair = [np.delete(np.asarray(c, np.float32), 5, 0) for c in (scale, want_scale)]
    if not np.array_equal(*pair):
        wrong.append(f"{what}: scales")
    pair = [np.delete(np.asarray(c, np.float32), 5, 0) for c in (codes, want)]
    step = 1.0 if dtype == "int8" else 2.0**-2 * np.maximum(np.abs(pair[1]), 2.0**-6)
    if not (np.abs(pair[0] - pair[1]) <= step).all() or (pair[0] != pair[1]).mean() > 1e-3:
        wrong.append(f"{what}: codes")
    return wrong
