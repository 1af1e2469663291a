"""Random products of rows grouped by expert, and of LLM.int8(), with float64 answers.

Called by `benchmarks.gpu_check`; see `gpu_oracle`, whose judgement it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu_oracle import CODES, EXACT, Attempt, Run, judge, tolerance_of
from jaxquant.pallas_kernels.gpu.chips import Chip
from jaxquant.pallas_kernels.gpu.llm_int8 import (
    choose_outlier_config,
    llm_int8_matmul,
    split_outliers,
)
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem, Unsupported
from tests.pallas_kernels.gpu import llm_int8_cases, ragged_cases
from tests.pallas_kernels.tpu.cases import Case

# x and the weight are rounded to int8 as the answer is; but a tie may go the other way.
_TIES = 1e-4


def random_ragged(
    rng: np.random.Generator, small: bool = False
) -> tuple[MatmulProblem, tuple[int, ...]]:
    """A product of all rows with one expert, and the rows of each; some have none."""
    codes = str(rng.choice(CODES))
    k = 128 * int(rng.integers(1, 3 if small else 17))
    experts = int(rng.integers(1, 4 if small else 17))
    m = int(rng.integers(1, 20 if small else 400))
    x_dtype = "int8" if codes in ("int4", "int8") and rng.random() < 0.4 else "bfloat16"
    product = MatmulProblem(
        m, k, 16 * int(rng.integers(1, 5 if small else 65)), codes, x_dtype,
        int(rng.choice([0, 32, 64, 128])),
        zero_point=codes in ("int4", "int8", "int3", "int2") and bool(rng.random() < 0.4),
        x_scale=x_dtype == "int8", out_dtype="float32",
    )  # fmt: skip
    ends = np.sort(rng.integers(0, m + 1, experts))  # rows behind the last are nobody's
    return product, tuple(int(size) for size in np.diff(ends, prepend=0))


def check_ragged(
    product: MatmulProblem, sizes: tuple[int, ...], seed: int, chip: Chip | None
) -> tuple[list[str], list[str]]:
    """As `gpu_oracle.check`, for rows grouped by expert."""
    case = ragged_cases.make(product, sizes, seed)
    kind = f"experts: {product.codes} x {product.x_dtype}"
    try:
        ways = [_ragged_by_xla(case)] if chip is None else list(_ragged(product, case, chip))
    except Unsupported as why:
        return [f"{kind}: unsupported: {why}"], []
    return judge(kind, f"seed {seed}: {product}, rows {sizes}", case, ways)


def _ragged(product: MatmulProblem, case: Case, chip: Chip) -> Iterator[Attempt]:
    """The chosen config and variants: other tiles, more parts of k, fewer stages."""
    from jaxquant.pallas_kernels.gpu.config import GpuConfig, shared_bytes
    from jaxquant.pallas_kernels.gpu.ragged import choose_ragged_config, ragged_matmul

    problem = RaggedProblem(product, len(case.weight))
    config = choose_ragged_config(problem, chip)
    table = case.arrays.get("table")

    def run(config: GpuConfig) -> Run:
        return lambda arrays: ragged_matmul(**arrays, problem=problem, config=config, table=table)

    changes: list[dict[str, Any]] = [{}, {"bm": 8}, {"split_k": 2}, {"split_k": 1}, {"stages": 2}]
    for variant in dict.fromkeys(dataclasses.replace(config, **change) for change in changes):
        if shared_bytes(product, variant) <= chip.shared_bytes:
            tolerance = tolerance_of(product, variant.scale, variant.operand)
            yield Attempt(str(variant), run(variant), tolerance)


def _ragged_by_xla(case: Case) -> Attempt:
    """lax.ragged_dot on the weights in float32."""
    weights = jnp.asarray(case.weight, jnp.float32)

    def fn(arrays: dict[str, Any]) -> jax.Array:
        x = jnp.asarray(arrays["x"]).astype(jnp.float32) * arrays.get("x_scale", jnp.float32(1))
        return lax.ragged_dot(x, weights, arrays["group_sizes"])

    return Attempt("xla", fn, EXACT)


def check_llm_int8(seed: int, chip: Chip | None) -> tuple[list[str], list[str]]:
    """As `gpu_oracle.check`, for LLM.int8()'s two products; edges fall anywhere."""
    rng, small = np.random.default_rng(seed), chip is None
    m = int(rng.integers(1, 20 if small else 300))
    k = 64 * int(rng.integers(2, 5 if small else 65))
    n = 8 * int(rng.integers(1, 9 if small else 130))
    capacity = 64 * int(rng.integers(1, 3))
    count = int(rng.integers(0, min(k, capacity + 10)))
    given = llm_int8_cases.arguments(m, k, n, rng.permutation(k)[:count].tolist(), capacity)
    want, reach = llm_int8_cases.expected(given)
    case = Case(given, want, reach, np.zeros(0))
    what = f"seed {seed}: LLM.int8(): {m} x {k} x {n}, {count} outliers of {capacity}"
    try:
        run = two_parts if chip is None else one_launch(m, k, n, chip, capacity, "float32")
    except Unsupported as why:
        return [f"LLM.int8(): unsupported: {why}"], []
    return judge("LLM.int8()", what, case, [Attempt("its config", run, _TIES)])


def one_launch(m: int, k: int, n: int, chip: Chip, capacity: int, out_dtype: str) -> Run:
    """The kernel, with the chosen config."""
    config = choose_outlier_config(m, k, n, chip, capacity, out_dtype)
    return lambda arrays: llm_int8_matmul(**arrays, config=config, out_dtype=out_dtype)


def two_parts(arrays: dict[str, Any]) -> jax.Array:
    """XLA's two products and their sum, in float32."""
    codes, indices = arrays["codes"], arrays["indices"]
    split = split_outliers(arrays["x"], indices, arrays["mask"])
    dims = (((1,), (1,)), ((), ()))
    whole = lax.dot_general(split.codes, codes, dims, preferred_element_type=jnp.int32)
    # XLA on CPU has no product of bfloat16 with float32 sums.
    floats = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    some = lax.dot_general(
        split.outliers.astype(floats),
        jnp.take(codes, indices, axis=1).astype(floats),
        dims,
        preferred_element_type=jnp.float32,
    )
    return (whole.astype(jnp.float32) * split.scale + some) * arrays["scale"]
