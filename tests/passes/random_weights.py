"""Random ways from parameters to an operand: the first part of the random programs.

A way is made backwards: from the shape that an operation wants to the parameters it could have come
from. `Builder` draws, and keeps what was drawn: the shapes of the parameters, and which of them an
operation meets that has no quantized form. Used by `random_layers`, `random_programs`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")
Shape = tuple[int, ...]
Params = dict[str, Any]
Get = Callable[[Params], Any]  # an operand, made of the parameters

SIZES = (1, 2, 3, 4, 6, 8)
LARGEST = 1500  # elements of a parameter


class Draw(Protocol):
    """Where the choices come from: hypothesis, or a seeded generator."""

    def __call__(self, options: Sequence[T]) -> T:
        """One of the options."""


@dataclasses.dataclass
class Builder:
    """What was drawn so far.

    Attributes:
      draw: source of choices.
      dtype: dtype of parameters and activations.
      shapes: shape of each parameter.
      opaque: parameters that some operation without a quantized form meets.
      rounding: the coarsest rounding to a narrower dtype on the way of a weight.
      differentiable: whether reverse mode goes through everything so far.
      custom: whether there is a custom derivative rule so far.
      maps: how many vmaps are around what is drawn.
      takes_gradients: whether there is a gradient inside.
    """

    draw: Draw
    dtype: str
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
    opaque: set[str] = dataclasses.field(default_factory=set)
    rounding: float = 0.0
    differentiable: bool = True
    custom: bool = False
    maps: int = 0
    takes_gradients: bool = False

    def maybe(self, percent: int) -> bool:
        """True in about that many of a hundred draws."""
        return self.draw(range(100)) >= 100 - percent

    def parameter(self, shape: Shape) -> str:
        """A new parameter."""
        name = f"w{len(self.shapes)}"
        self.shapes[name] = shape
        return name

    def cast(self, value: Any) -> Any:
        """The array in the program's dtype."""
        return jnp.asarray(value, self.dtype)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand, the parameters that it is made of, and whether they are arrays by then."""

    names: tuple[str, ...]
    get: Get
    opaque: bool = False


def operand(b: Builder, shape: Shape, moves: int = 2) -> Operand:
    """An operand of this shape after up to ``moves`` operations on its parameters."""
    if moves == 0 or b.maybe(35):
        return _leaf(b, shape)
    fitting = [make for make in MOVES if make is not _again]
    made = b.draw(fitting)(b, shape, moves - 1)
    return made if made is not None else operand(b, shape, moves - 1)


def _leaf(b: Builder, shape: Shape) -> Operand:
    """A new parameter, or one that is used already: in this form, or transposed."""
    again = _again(b, shape) if b.maybe(25) else None
    if again is not None:
        return again
    name = b.parameter(shape)
    return Operand((name,), lambda p: p[name])


def _again(b: Builder, shape: Shape) -> Operand | None:
    same = [n for n, s in b.shapes.items() if len(s) == 2 and sorted(s) == sorted(shape)]
    if not same or len(shape) != 2:
        return None
    name = b.draw(same)
    if b.shapes[name] == shape:
        return Operand((name,), lambda p: p[name])
    return Operand((name,), lambda p: p[name].T)


def _moved(inner: Operand, fn: Callable[[Any], Any]) -> Operand:
    return Operand(inner.names, lambda p: fn(inner.get(p)), inner.opaque)


def _fits(shape: Shape) -> bool:
    return math.prod(shape) <= LARGEST and len(shape) <= 5


def _transpose(b: Builder, shape: Shape, moves: int) -> Operand | None:
    if len(shape) < 2:
        return None
    order = list(range(len(shape)))
    i = b.draw(order)
    order.insert(b.draw(order), order.pop(i))
    source = [0] * len(shape)
    for new, old in enumerate(order):
        source[old] = shape[new]
    return _moved(operand(b, tuple(source), moves), lambda w: jnp.transpose(w, order))


def _merge(b: Builder, shape: Shape, moves: int) -> Operand | None:
    """The parameter has an axis in two."""
    cuts = [(d, k) for d, n in enumerate(shape) for k in range(2, n) if n % k == 0]
    if not cuts:
        return None
    d, k = b.draw(cuts)
    source = (*shape[:d], k, shape[d] // k, *shape[d + 1 :])
    return _moved(operand(b, source, moves), lambda w: w.reshape(shape))


def _split(b: Builder, shape: Shape, moves: int) -> Operand | None:
    """The parameter has two axes in one."""
    if len(shape) < 2:
        return None
    d = b.draw(range(len(shape) - 1))
    source = (*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :])
    return _moved(operand(b, source, moves), lambda w: w.reshape(shape))


def _slice(b: Builder, shape: Shape, moves: int) -> Operand | None:
    if not shape:
        return None
    d, how = b.draw(range(len(shape))), b.draw(("range", "stride", "dynamic", "split"))
    n = shape[d]
    before, after = b.draw((0, n, 2)), b.draw((0, 2, n))
    longer = {"range": before + n + after, "stride": 2 * n, "dynamic": 2 * n, "split": 2 * n}[how]
    source = (*shape[:d], longer, *shape[d + 1 :])
    if not _fits(source):
        return None

    def cut(p: Params, w: Any) -> Any:
        if how == "range":
            return lax.slice_in_dim(w, before, before + n, axis=d)
        if how == "stride":
            return lax.slice_in_dim(w, 0, 2 * n, 2, axis=d)
        if how == "dynamic":
            return lax.dynamic_slice_in_dim(w, p["index"], n, axis=d)
        return jnp.split(w, 2, axis=d)[1]

    inner = operand(b, source, moves)
    return Operand(inner.names, lambda p: cut(p, inner.get(p)), inner.opaque)


def _layer(b: Builder, shape: Shape, moves: int) -> Operand | None:
    """One of several layers."""
    axis, count = b.draw(range(len(shape) + 1)), b.draw((2, 3))
    source = (*shape[:axis], count, *shape[axis:])
    if not _fits(source):
        return None
    how = b.draw(("number", "traced", "take", "dynamic"))

    def pick(p: Params, w: Any) -> Any:
        if how == "number":
            return lax.index_in_dim(w, 1, axis, keepdims=False)
        if how == "traced":
            return w[(slice(None),) * axis + (p["index"],)]
        if how == "take":
            return jnp.take(w, p["index"], axis=axis)
        return lax.dynamic_index_in_dim(w, p["index"], axis, keepdims=False)

    inner = operand(b, source, moves)
    return Operand(inner.names, lambda p: pick(p, inner.get(p)), inner.opaque)


def _concatenate(b: Builder, shape: Shape, moves: int) -> Operand | None:
    dims = [d for d, n in enumerate(shape) if n > 1]
    if not dims:
        return None
    d = b.draw(dims)
    first = b.draw(range(1, shape[d]))
    parts = [
        operand(b, (*shape[:d], n, *shape[d + 1 :]), moves - 1 if moves else 0)
        for n in (first, shape[d] - first)
    ]
    return _joined(b, parts, lambda ws: jnp.concatenate(ws, d))


def _stack(b: Builder, shape: Shape, moves: int) -> Operand | None:
    dims = [d for d, n in enumerate(shape) if n in (2, 3)]
    if not dims:
        return None
    d = b.draw(dims)
    source = (*shape[:d], *shape[d + 1 :])
    parts = [operand(b, source, 0) for _ in range(shape[d])]
    return _joined(b, parts, lambda ws: jnp.stack(ws, d))


def _joined(b: Builder, parts: Sequence[Operand], join: Callable[[list[Any]], Any]) -> Operand:
    """All of them become arrays if one of them is."""
    names = tuple(n for part in parts for n in part.names)
    opaque = any(part.opaque for part in parts)
    if opaque:
        b.opaque.update(names)
    return Operand(names, lambda p: join([part.get(p) for part in parts]), opaque)


def _broadcast(b: Builder, shape: Shape, moves: int) -> Operand | None:
    if len(shape) < 2:
        return None
    d = b.draw(range(len(shape)))
    source, rest = (*shape[:d], *shape[d + 1 :]), [i for i in range(len(shape)) if i != d]
    return _moved(operand(b, source, moves), lambda w: lax.broadcast_in_dim(w, shape, rest))


def _squeeze(b: Builder, shape: Shape, moves: int) -> Operand | None:
    d = b.draw(range(len(shape) + 1))
    source = (*shape[:d], 1, *shape[d:])
    return _moved(operand(b, source, moves), lambda w: jnp.squeeze(w, d))


def _convert(b: Builder, shape: Shape, moves: int) -> Operand | None:
    narrow = b.draw(("float32", "bfloat16")) if b.dtype == "float64" else "bfloat16"
    b.rounding = max(b.rounding, float(jnp.finfo(narrow).eps))
    return _moved(operand(b, shape, moves), lambda w: w.astype(narrow).astype(b.dtype))


def _unchanged(b: Builder, shape: Shape, moves: int) -> Operand | None:
    fn = b.draw(
        (
            lax.stop_gradient,
            lambda w: checkpoint_name(w, "weight"),
            lax.optimization_barrier,
            jnp.copy,
            jax.jit(lambda w: w * 1),
            jax.checkpoint(lambda w: lax.rev(w, (0,)) if w.ndim else w),
            lambda w: w * np.float32(0.5),
            lambda w: w / 3,
        )
    )
    return _moved(operand(b, shape, moves), fn)


def _scaled(b: Builder, shape: Shape, moves: int) -> Operand | None:
    inner = operand(b, shape, moves)
    return Operand(inner.names, lambda p: inner.get(p) * p["factor"], inner.opaque)


def _opaque(b: Builder, shape: Shape, moves: int) -> Operand | None:
    """An operation that has no quantized form."""
    if b.maybe(20):
        return None
    inner = operand(b, shape, moves)
    b.opaque.update(inner.names)
    fn = b.draw(
        (
            jnp.tanh,
            lambda w: w + b.cast(0.1),
            lambda w: jnp.maximum(w, 0),
            lambda w: w * w,
            lambda w: jnp.sort(w, axis=-1) if w.ndim else w + 1,
            lambda w: jnp.where(w > 0, w, 0),
            lambda w: lax.cond(w.ravel()[0] > 0, lambda v: v, lambda v: v * 2, w),
            lambda w: lax.fori_loop(0, 2, lambda i, v: v * 2, w),
        )
    )
    return Operand(inner.names, lambda p: fn(inner.get(p)), opaque=True)


MOVES = (
    _transpose, _merge, _split, _slice, _slice, _layer, _concatenate, _stack, _broadcast, _squeeze,
    _convert, _unchanged, _scaled, _opaque, _again,
)  # fmt: skip
