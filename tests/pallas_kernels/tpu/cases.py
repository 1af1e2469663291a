"""Random quantized matmuls with their float64 answers, and the kernel run in interpret mode."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.pallas_kernels import packing
from jaxquant.pallas_kernels.problem import E2M1, PACKED, STORAGE, MatmulProblem
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.matmul import quantized_matmul

# Exact in bfloat16.
TABLE = tuple(float(v) / 64 for v in np.round(64 * np.sinh(np.linspace(-1.2, 1.1, 16))))
_CODES = {
    "int8": np.arange(-128, 128),
    "int4": np.arange(-8, 8),
    "int3": np.arange(-4, 4),
    "int2": np.array([-3, -1, 1, 3]),
    "table4": np.arange(-8, 8),
    "float8_e4m3fn": np.arange(-8, 9),
    "float8_e5m2": np.arange(-4, 5),
}


class Case(NamedTuple):
    """Arrays by the names of `quantized_matmul`, the answer, and the weight they stand for."""

    arrays: dict[str, Any]
    want: np.ndarray
    scale_of_errors: np.ndarray
    weight: np.ndarray


def make(problem: MatmulProblem, seed: int = 0) -> Case:
    """Random operands of a problem; the answer is exact for the operands as they are."""
    p, rng = problem, np.random.default_rng(seed)
    codes = rng.choice(_CODES[p.codes], (p.k, p.n))
    table = E2M1 if p.e2m1 else TABLE
    values = np.asarray(table)[codes + 8] if p.codes == "table4" else codes.astype(np.float64)
    if p.codes in PACKED:
        stored = packing.pack(jnp.asarray(codes, jnp.int8), STORAGE[p.codes][1], 0)
    else:
        stored = jnp.asarray(codes, jnp.int8).astype(STORAGE[p.codes][0])
    arrays: dict[str, Any] = {"codes": stored}
    arrays["scale"] = rng.uniform(0.5, 2, (p.groups, p.n)).astype(np.float32)
    if p.zero_point:
        arrays["zero_point"] = rng.integers(-5, 6, (p.groups, p.n)).astype(np.int8)
    if p.codes == "table4":
        arrays["table"] = table
    if p.x_dtype == "int8":
        x = rng.integers(-127, 128, (p.m, p.k)).astype(np.int8)
    elif p.x_dtype == "int4":
        x = jnp.asarray(rng.integers(-7, 8, (p.m, p.k)), jnp.int4)
    else:
        x = jnp.asarray(rng.normal(size=(p.m, p.k)), jnp.dtype(p.x_dtype))
    arrays["x"] = x
    if p.x_scale:
        arrays["x_scale"] = rng.uniform(0.5, 2, (p.m, 1)).astype(np.float32)
    if p.bias:
        arrays["bias"] = rng.normal(size=p.n).astype(np.float32)
    for name in ("gate", "residual"):
        if getattr(p, name):
            arrays[name] = rng.normal(size=(p.m, p.n)).astype(np.float32)
    zero = np.repeat(arrays["zero_point"], p.group, 0) if p.zero_point else 0.0
    w = (values - zero) * np.repeat(arrays["scale"].astype(np.float64), p.group, 0)
    floats = np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)
    floats = floats * arrays.get("x_scale", np.ones((1, 1))).astype(np.float64)
    want, reach = floats @ w, np.abs(floats) @ np.abs(w)
    want = want + arrays.get("bias", 0.0)
    if p.gate:
        gate = arrays["gate"].astype(np.float64)
        want = want * gate / (1 + np.exp(-gate))
    return Case(arrays, want + arrays.get("residual", 0.0), reach, w)


def run(problem: MatmulProblem, config: MatmulConfig, case: Case, interpret: Any = True) -> Any:
    """The kernel, interpreted on CPU."""
    arrays = dict(case.arrays)
    table = arrays.pop("table", None)

    def fn(arrays: dict[str, jax.Array]) -> jax.Array:
        return quantized_matmul(
            **arrays, problem=problem, config=config, table=table, interpret=interpret
        )

    return jax.jit(fn)(arrays)


def assert_close(got: Any, case: Case, config: MatmulConfig) -> None:
    """Errors against the sum of magnitudes: float32 sums, or bfloat16 weights scaled before."""
    assert got.shape == case.want.shape
    tolerance = 2.0**-8 if config.scale == "before" else 1e-5
    error = np.abs(np.asarray(got, np.float64) - case.want)
    assert (error <= tolerance * (1 + case.scale_of_errors)).all(), error.max()
