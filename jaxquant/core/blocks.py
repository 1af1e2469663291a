"""Blocks: how an array is cut into the rectangles that share a scale.

Called by QTensor, encode, scales and the ranges of `jaxquant.algorithms.ranges`. A block shape
has one size per axis: 1 for a scale an index, the whole length for one scale along the axis,
anything between for groups. Nothing here knows of qtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def divisors(n: int) -> list[int]:
    """The divisors of n >= 1, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def check_block_shape(
    shape: Sequence[int], block_shape: Sequence[int], name: str = "array"
) -> tuple[int, ...]:
    """The block shape as a tuple, if it divides `shape`.

    Raises:
      ValueError: other rank, or an axis that does not divide; the message names the parameter,
        the axis and both sizes, and lists the axis' divisors.
    """
    if len(shape) != len(block_shape):
        raise ValueError(
            f"{name}: block shape {tuple(block_shape)} needs one size for each axis of"
            f" {tuple(shape)}"
        )
    for axis, (n, b) in enumerate(zip(shape, block_shape, strict=True)):
        if n and (b < 1 or n % b):
            raise ValueError(
                f"{name}: axis {axis} of length {n} (shape {tuple(shape)}) does not divide into"
                f" groups of {b}; its divisors are {', '.join(map(str, divisors(n)))}"
            )
    return tuple(block_shape)


def scale_shape(shape: Sequence[int], block_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the array that has one value a block."""
    return tuple(n // b if n else 1 for n, b in zip(shape, block_shape, strict=True))


def split_blocks(x: jax.Array, per_block: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """Reshapes so that every block spans axes of its own.

    Args:
      x: array of shape [n0, n1, ...].
      per_block: shape of the array with one value a block, [s0, s1, ...].

    Returns:
      x with each axis of 1 < s < n reshaped to two (s, n / s), and the axes a block spans.
    """
    split: list[int] = []
    spans: list[int] = []
    for n, s in zip(x.shape, per_block, strict=True):
        if s == n:
            split.append(n)
        elif s == 1:
            spans.append(len(split))
            split.append(n)
        else:
            spans.append(len(split) + 1)
            split += [s, n // s]
    return x.reshape(split), tuple(spans)


def reduce_blocks(
    x: jax.Array, block_shape: Sequence[int], reduce: Callable[..., jax.Array]
) -> jax.Array:
    """One value a block.

    Args:
      x: any array.
      block_shape: sizes that divide x's.
      reduce: a reduction called as reduce(y, axis=axes), such as jnp.max.

    Returns:
      Array of shape `scale_shape(x.shape, block_shape)`.
    """
    per_block = scale_shape(x.shape, block_shape)
    split, spans = split_blocks(x, per_block)
    return reduce(split, axis=spans).reshape(per_block)


def map_blocks(fn: Callable[..., jax.Array], x: jax.Array, *per_block: jax.Array) -> jax.Array:
    """Applies an elementwise function to x and the values of its blocks.

    Splitting x, rather than spreading the values, lets XLA fuse the whole.

    Args:
      fn: called with x and every `per_block` in shapes that broadcast; elementwise.
      x: any array.
      *per_block: arrays of one shape, with one value a block.

    Returns:
      Array of x's shape.
    """
    split, spans = split_blocks(x, per_block[0].shape)
    kept = [1 if i in spans else n for i, n in enumerate(split.shape)]
    return fn(split, *(p.reshape(kept) for p in per_block)).reshape(x.shape)


def map_slices(
    fn: Callable[[jax.Array], Any], x: jax.Array, block_shape: Sequence[int], most: int
) -> Any:
    """Computes one value a block slice by slice, so that temporaries stay small.

    Args:
      fn: from a slice of x that holds whole blocks to a tree of arrays with one value a block.
      x: any array; not sharded along the axis with the most blocks, which is the one sliced.
      block_shape: sizes that divide x's.
      most: number of elements that a slice should not exceed (where blocks are that small).

    Returns:
      What fn gives for all of x.
    """
    per_block = scale_shape(x.shape, block_shape)
    axis = max(range(x.ndim), key=lambda i: per_block[i], default=0)
    wanted = -(-x.size // most)
    if wanted <= 1 or not x.ndim:
        return fn(x)
    count = next((d for d in divisors(per_block[axis]) if d >= wanted), per_block[axis])
    step = per_block[axis] // count

    width = step * block_shape[axis]

    def body(i: jax.Array, results: Any) -> Any:
        found = fn(jax.lax.dynamic_slice_in_dim(x, i * width, width, axis))
        return jax.tree.map(
            lambda result, part: jax.lax.dynamic_update_slice_in_dim(result, part, i * step, axis),
            results,
            found,
        )

    shapes = jax.eval_shape(fn, jax.lax.slice_in_dim(x, 0, width, axis=axis))
    empty = jax.tree.map(lambda s: jnp.zeros(per_block, s.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, empty)


def broadcast_blocks(part: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Spreads one value a block over `shape`; axes of size 1 stay 1 (broadcasting does the rest).

    Args:
      part: array whose sizes divide those of `shape`, axis by axis.
      shape: logical shape.

    Returns:
      Array that broadcasts against `shape`.
    """
    for axis in reversed(range(len(shape))):
        if part.shape[axis] not in (1, shape[axis]):
            part = jnp.repeat(part, shape[axis] // part.shape[axis], axis=axis)
    return part
