"""Products for LLM.int8() with their float64 answers, given which columns are outliers.

Used by `test_llm_int8` and, on a chip, by `benchmarks.gpu_check`; any jax can import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.pallas_kernels.gpu.llm_int8 import CAPACITY_UNIT, find_outliers, split_outliers


def activations(m: int, k: int, outliers: Any, seed: int = 0) -> Any:
    """Magnitudes below 3, and 8 or more in at least one row of each outlier column."""
    r = np.random.default_rng(seed)
    x = np.clip(r.normal(size=(m, k)), -3, 3)
    x[0, outliers] = 8.0 + np.arange(len(outliers))
    return jnp.asarray(x, jnp.bfloat16)


def weight(n: int, k: int, seed: int = 1) -> tuple[Any, Any]:
    """Codes [n, k] and scales [1, n]."""
    r = np.random.default_rng(seed)
    codes = jnp.asarray(r.integers(-127, 128, (n, k)), jnp.int8)
    return codes, jnp.asarray(r.uniform(0.5, 2.0, (1, n)), jnp.float32)


def wide(array: Any) -> np.ndarray:
    """In float64."""
    return np.asarray(array).astype(np.float64)


def reference_split(x: Any, columns: Any) -> tuple[np.ndarray, np.ndarray]:
    """x without these columns, and its rows' scales, in float64."""
    rest = wide(x)
    rest[:, columns] = 0.0
    scale = np.abs(rest).max(axis=1, keepdims=True) / 127
    scale[scale == 0] = 1.0
    return rest, scale


def arguments(
    m: int = 4,
    k: int = 128,
    n: int = 64,
    outliers: Sequence[int] = (3, 9),
    capacity: int = CAPACITY_UNIT,
) -> dict[str, Any]:
    """What `llm_int8_matmul` takes."""
    x = activations(m, k, list(outliers))
    found = find_outliers(x, capacity=capacity)
    codes, scale = weight(n, k)
    return {
        "x": x,
        "codes": codes,
        "scale": scale,
        "indices": found.indices,
        "mask": found.mask,
    }


def expected(given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The answer from x and the weight alone, but for how ties of codes are broken; and its reach.

    The reach is the sum of the terms' magnitudes: what errors of sums are relative to.
    """
    x, w = wide(given["x"]), wide(given["codes"]) * wide(given["scale"]).T
    columns = np.asarray(given["indices"])[np.asarray(given["mask"])]
    rest, scale = reference_split(given["x"], columns)
    codes = wide(split_outliers(given["x"], given["indices"], given["mask"]).codes)
    assert np.abs(codes - rest / scale).max() <= 0.5 + 1e-4
    parts = [(codes * scale, w), (x[:, columns], w[:, columns])]
    want = sum(a @ b.T for a, b in parts)
    return want, sum(np.abs(a) @ np.abs(b).T for a, b in parts)
