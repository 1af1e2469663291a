"""Random dot_general problems and their answers in float64 numpy, for every dot test."""

from __future__ import annotations

import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st


class Problem(NamedTuple):
    """One product, with the operands as numpy arrays."""

    x: np.ndarray
    values: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    dimension_numbers: Any
    weight_side: str
    x_contract: tuple[int, ...]


@st.composite
def problems(draw: Any, zero_points: bool = True, limit: int = 7) -> Problem:
    """Any dimension numbers, any blocks on any axis of the weight."""
    sizes = st.sampled_from([1, 2, 3, 4, 6, 8])
    batch = draw(st.lists(sizes, max_size=2))
    contract = draw(st.lists(st.sampled_from([2, 4, 8, 16]), min_size=1, max_size=2))
    x_free = draw(st.lists(sizes, max_size=2))
    w_free = draw(st.lists(sizes, max_size=2))
    side = draw(st.sampled_from(["rhs", "lhs"]))
    x_order = draw(st.permutations(range(len(batch) + len(contract) + len(x_free))))
    w_order = draw(st.permutations(range(len(batch) + len(contract) + len(w_free))))
    x_sizes, w_sizes = batch + contract + x_free, batch + contract + w_free
    # Axis i of the canonical order (batch, contract, free) lies at position order.index(i).
    x_at, w_at = (
        list(map(x_order.index, range(len(x_sizes)))),
        list(map(w_order.index, range(len(w_sizes)))),
    )
    nb, nc = len(batch), len(contract)
    pairs = (
        (tuple(x_at[nb : nb + nc]), tuple(w_at[nb : nb + nc])),
        (tuple(x_at[:nb]), tuple(w_at[:nb])),
    )
    if side == "lhs":
        pairs = tuple((b, a) for a, b in pairs)
    w_shape = [w_sizes[i] for i in w_order]
    scale_shape = [
        draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in w_shape
    ]
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    scale = rng.uniform(0.5, 2.0, scale_shape).astype(np.float32)
    zero_point = None
    kind = draw(st.sampled_from(["none", "int", "float"])) if zero_points else "none"
    if kind == "int":
        zero_point = rng.integers(-limit, limit + 1, scale_shape).astype(np.int8)
    elif kind == "float":
        zero_point = rng.uniform(-limit, limit, scale_shape).astype(np.float32)
    return Problem(
        rng.normal(size=[x_sizes[i] for i in x_order]).astype(np.float32),
        rng.integers(-limit, limit + 1, w_shape).astype(np.int8),
        scale,
        zero_point,
        pairs,
        side,
        tuple(x_at[nb : nb + nc]),
    )  # fmt: skip


def spread(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A blockwise part over the whole shape, float64."""
    for axis, size in enumerate(shape):
        part = np.repeat(part.astype(np.float64), size // part.shape[axis], axis)
    return part


def weight(values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None) -> np.ndarray:
    """(values - zero_point) * scale in float64."""
    floats = np.asarray(values).astype(np.float64)
    if zero_point is not None:
        floats = floats - spread(np.asarray(zero_point), floats.shape)
    return floats * spread(np.asarray(scale), floats.shape)


def dot(lhs: np.ndarray, rhs: np.ndarray, dimension_numbers: Any) -> np.ndarray:
    """lax.dot_general of float64 arrays, by einsum."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    names = iter(string.ascii_letters)
    left = [next(names) for _ in range(lhs.ndim)]
    right = [next(names) for _ in range(rhs.ndim)]
    for a, b in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        right[b] = left[a]
    out = [left[a] for a in lhs_batch]
    out += [n for i, n in enumerate(left) if i not in lhs_batch and i not in lhs_contract]
    out += [n for i, n in enumerate(right) if i not in rhs_batch and i not in rhs_contract]
    spec = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
    return np.einsum(spec, lhs.astype(np.float64), rhs.astype(np.float64))


def product(x: np.ndarray, w: np.ndarray, problem: Problem) -> np.ndarray:
    """The float64 product of an activation with a weight on the problem's side."""
    sides = (x, w) if problem.weight_side == "rhs" else (w, x)
    return dot(*sides, problem.dimension_numbers)


def assert_close(got: jax.Array, want: np.ndarray, tolerance: float = 2e-5) -> None:
    """Equal up to `tolerance` of the largest magnitude; shapes equal."""
    assert got.shape == want.shape
    got = np.asarray(got.astype(jnp.float32), np.float64)
    reach = max(float(np.abs(want).max(initial=0.0)), 1e-6)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * reach)
