"""Orthogonal matrices that spread outliers, as Kronecker products of small ones.

Hadamard matrices have entries of one magnitude, so every output channel is an equally weighted sum
of all inputs. They exist for powers of two and, by Paley's constructions, for many other multiples
of four; what is left of a size gets a random orthogonal matrix. Random signs (Ashkboos et al. 2024,
"QuaRot", arXiv:2404.00456) make structured inputs random. Called by the pass `Rotate`; the
matrices of `hadamard` are those that quantized weights name (`jaxquant.core.turns`), so they must
never change.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray

# A power of two is cut into factors of at most this: two products of [n, 64] instead of 12 passes.
_LARGEST = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (A1 kron A2 kron ...); a row vector x becomes x Q.

    Attributes:
      factors: orthogonal float64 matrices A1, A2, ..., the first one major.
      signs: float64 ``[size]`` of ones and minus ones.
    """

    factors: tuple[Array, ...]
    signs: Array

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.signs)

    def matrix(self) -> Array:
        """Q as a float64 matrix."""
        return self.signs[:, None] * functools.reduce(np.kron, self.factors)

    def apply(self, x: jax.Array, axis: int, inner: int = 1, inverse: bool = False) -> jax.Array:
        """Multiplies an axis, or a part of it, by Q.

        Args:
          x: an array.
          axis: the axis; its length is a multiple of ``size * inner``.
          inner: distance of neighbours of the rotated part along the axis.
          inverse: multiply by the transpose of Q instead.

        Returns:
          The shape and dtype of ``x``. Computed in float32 at least, at full precision.
        """
        shape, dtype = x.shape, x.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        lead = (*shape[:axis], shape[axis] // (self.size * inner))
        trail = (inner, *shape[axis + 1 :])
        sizes = [len(a) for a in self.factors]
        y = x.astype(wide).reshape(math.prod(lead), self.size, math.prod(trail))
        signs = jnp.asarray(self.signs, wide)[:, None]
        y = y if inverse else y * signs
        y = y.reshape(y.shape[0], *sizes, y.shape[-1])
        for number, factor in enumerate(self.factors, 1):
            turn = jnp.asarray(factor.T if inverse else factor, wide)
            y = jnp.moveaxis(
                jnp.tensordot(y, turn, ((number,), (0,)), precision="highest"), -1, number
            )
        y = y.reshape(y.shape[0], self.size, y.shape[-1])
        y = y * signs if inverse else y
        return y.reshape(shape).astype(dtype)


def random_hadamard(size: int, seed: int) -> Rotation:
    """A Hadamard matrix with random signs, or as near to one as the size allows.

    Args:
      size: at least 1. A size 2^k * m, m odd: if 2^j * m is an order that Paley's constructions
        give (12, 20, 24, 28, ...), all entries have the magnitude size^-1/2; otherwise the factor m
        is a random orthogonal matrix.
      seed: of the signs and of that matrix.
    """
    rng = np.random.default_rng(seed)
    base = _odd_factor(size)
    if base is None:
        base = random_orthogonal(_odd(size), seed)
    factors = ([] if len(base) == 1 else [base]) + _powers(size // len(base))
    return Rotation(tuple(factors) or (np.eye(1),), rng.choice([-1.0, 1.0], size))


@functools.lru_cache(maxsize=64)
def hadamard(size: int) -> Rotation:
    """The Hadamard matrix of a size, without random signs: it follows from the size alone.

    Raises:
      ValueError: none is known here for this size.
    """
    base = _odd_factor(size)
    if size < 1 or base is None:
        raise ValueError(f"no Hadamard matrix of {size} rows is known here")
    factors = ([] if len(base) == 1 else [base]) + _powers(size // len(base))
    return Rotation(tuple(factors) or (base,), np.ones(size))


def largest_hadamard(size: int) -> int:
    """The largest divisor of a size of which `hadamard` knows a matrix; 1 if there is no other."""
    divisors = (d for d in range(size, 0, -1) if size % d == 0)
    return next(d for d in divisors if _odd_factor(d) is not None)


def fixing_ones(size: int, seed: int) -> Rotation:
    """A random rotation that leaves the vector of ones, and so the mean of channels, as it is."""
    ones = np.full(size, size**-0.5)
    axis = ones - np.eye(size)[0]
    norm = axis @ axis
    mirror = np.eye(size) - (2 / norm) * np.outer(axis, axis) if norm > 0 else np.eye(size)
    turn = np.eye(size)
    turn[1:, 1:] = random_orthogonal(size - 1, seed)
    return Rotation((mirror @ turn @ mirror,), np.ones(size))


def random_orthogonal(size: int, seed: int) -> Array:
    """A matrix drawn uniformly from the orthogonal group (QR of a normal matrix)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def _odd(size: int) -> int:
    return size // (size & -size)


def _odd_factor(size: int) -> Array | None:
    """The Hadamard matrix that holds the odd factor of a size; None if there is none."""
    odd = _odd(size)
    if odd == 1:
        return np.eye(1)
    orders = [odd * 2**j for j in range(2, 6) if size % (odd * 2**j) == 0]
    return next((m for m in map(_paley, orders) if m is not None), None)


def _powers(size: int) -> list[Array]:
    """Factors of a power of two."""
    factors = []
    while size > 1:
        n = min(size, _LARGEST)
        factors.append(_sylvester(n))
        size //= n
    return factors


def _sylvester(size: int) -> Array:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h * size**-0.5


def _paley(order: int) -> Array | None:
    """A Hadamard matrix of this order by one of Paley's constructions over prime fields."""
    if _is_prime(order - 1) and order % 4 == 0:
        q = order - 1
        s = np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), _jacobsthal(q)]])
        h = np.eye(order) + s
    elif order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        q = order // 2 - 1
        c = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), _jacobsthal(q)]])
        h = np.kron(c, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    else:
        return None
    return h * order**-0.5


def _jacobsthal(q: int) -> Array:
    squares = {x * x % q for x in range(1, q)}
    values = np.array([0] + [1 if x in squares else -1 for x in range(1, q)], np.float64)
    return values[(np.arange(q)[:, None] - np.arange(q)) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
