"""Random operations between an activation and weights, and on activations alone.

Each function draws a layer for an activation of a given shape and returns it with the shape of its
result. A product asks `activation` for its input, which is where the oracle of w8a8 quantizes it.
Used by `random_programs`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.passes.random_weights import SIZES, Builder, Operand, Params, Shape, operand

Layer = Callable[[Params, Any], Any]
Made = tuple[Layer, Shape]

_QUANTIZED: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "quantized", default=frozenset()
)


@contextlib.contextmanager
def quantized_activations(paths: Iterable[str]) -> Iterator[None]:
    """While open, products of these parameters round their input as int8 does."""
    token = _QUANTIZED.set(frozenset(paths))
    try:
        yield
    finally:
        _QUANTIZED.reset(token)


def activation(weight: Operand, x: Any, axes: Sequence[int]) -> Any:
    """What a product gets for its input: in the oracle, int8 codes times scale per token.

    Not where the weight has become an array on its way. The gradient is straight through.
    """
    if weight.opaque or not _QUANTIZED.get().issuperset(weight.names):
        return x
    greatest = jnp.maximum(jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True), 2.0**-100)
    scale = greatest * (1 / 127)
    rounded = jnp.round(x * (127 / greatest)) * scale
    return x + lax.stop_gradient(rounded - x)


def resized(x: Any, shape: Shape) -> Any:
    """Any activation in any shape: cut, or repeated."""
    return x if x.shape == shape else jnp.resize(x, shape)


def _damp(y: Any, terms: int) -> Any:
    return y * jnp.asarray(1 / math.sqrt(max(terms, 1)), y.dtype)


def dot(b: Builder, shape: Shape) -> Made:
    """A dot_general or einsum with any axes contracted, batched and free, on any side."""
    dims = list(range(len(shape)))
    contract = [dims.pop(-1 if b.maybe(60) else b.draw(range(len(dims))))]
    if dims and b.maybe(30):
        contract.append(dims.pop(b.draw(range(len(dims)))))
    batch = [dims.pop(b.draw(range(len(dims))))] if dims and b.maybe(30) else []
    free = [b.draw(SIZES) for _ in range(b.draw((0, 1, 1, 1, 2)))]
    sizes = [*(shape[d] for d in contract), *(shape[d] for d in batch), *free]
    order = list(range(len(sizes)))
    for _ in range(b.draw((0, 0, 1, 2))):
        order.insert(b.draw(order), order.pop(b.draw(range(len(order)))))
    weight = operand(b, tuple(sizes[i] for i in order))
    own = [order.index(i) for i in range(len(sizes))]
    w_contract, w_batch = own[: len(contract)], own[len(contract) : len(contract) + len(batch)]
    left, einsum = b.maybe(30), b.maybe(50)
    terms = math.prod(shape[d] for d in contract)
    letters = string.ascii_lowercase
    x_letters = letters[: len(shape)]
    w_letters = [""] * len(sizes)
    for i, place in enumerate(own):
        known = [*contract, *batch]
        w_letters[place] = x_letters[known[i]] if i < len(known) else letters[len(shape) + i]
    result = [c for c in (*x_letters, *w_letters) if c not in {x_letters[d] for d in contract}]
    out = "".join(dict.fromkeys(result))
    if einsum and out and b.maybe(50):
        out = out[::-1]
    spec = f"{''.join(w_letters)},{x_letters}" if left else f"{x_letters},{''.join(w_letters)}"

    def layer(p: Params, x: Any) -> Any:
        w = weight.get(p)
        x = activation(weight, x, contract)
        pair = (w, x) if left else (x, w)
        if einsum:
            return _damp(jnp.einsum(f"{spec}->{out}", *pair), terms)
        numbers = (contract, w_contract), (batch, w_batch)
        if left:
            numbers = (w_contract, contract), (w_batch, batch)
        return _damp(lax.dot_general(*pair, dimension_numbers=numbers), terms)

    size = {**dict(zip(x_letters, shape)), **dict(zip(w_letters, (sizes[i] for i in order)))}
    if einsum:
        return layer, tuple(size[c] for c in out)
    b_out = [shape[d] for d in batch]
    x_free = [shape[d] for d in dims]
    w_free = [sizes[i] for i in order if i >= len(contract) + len(batch)]
    return layer, (*b_out, *w_free, *x_free) if left else (*b_out, *x_free, *w_free)


def matmul(b: Builder, shape: Shape) -> Made:
    """x @ w, as models have it."""
    n = b.draw(SIZES)
    weight = operand(b, (shape[-1], n), moves=3)

    def layer(p: Params, x: Any) -> Any:
        x = activation(weight, x, (-1,))
        return _damp(x @ weight.get(p), shape[-1])

    return layer, (*shape[:-1], n)


_LAYOUTS = {
    1: (("NHC", "HIO", "NHC"), ("NCH", "OIH", "NCH")),
    2: (("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")),
}


def conv(b: Builder, shape: Shape) -> Made:
    """A convolution over one or two axes."""
    rank = b.draw((1, 1, 2))
    layout = b.draw(_LAYOUTS[rank])
    groups = b.draw((1, 1, 2))
    channels, features = b.draw((2, 4)), 2 * b.draw((1, 2))
    window = [b.draw((1, 2, 3)) for _ in range(rank)]
    space = dict(zip("HW", (5, 4)))
    x_shape = tuple({"N": 2, "C": channels, **space}[c] for c in layout[0])
    sizes = {"O": features, "I": channels // groups, **dict(zip("HW", window))}
    weight = operand(b, tuple(sizes[c] for c in layout[1]))
    options = {
        "window_strides": [b.draw((1, 1, 2)) for _ in range(rank)],
        "padding": b.draw(("SAME", "VALID", [(1, 0)] * rank)),
        "rhs_dilation": [b.draw((1, 1, 2)) for _ in range(rank)],
        "lhs_dilation": [b.draw((1, 1, 2)) for _ in range(rank)],
    }
    if options["padding"] == "VALID":
        options["rhs_dilation"] = [1] * rank
    if isinstance(options["padding"], str):
        options["lhs_dilation"] = [1] * rank
    terms = math.prod(window) * channels // groups

    def run(w: Any, x: Any) -> Any:
        out = lax.conv_general_dilated(
            x, w, dimension_numbers=layout, feature_group_count=groups, **options
        )
        return _damp(out, terms)

    def layer(p: Params, x: Any) -> Any:
        return run(weight.get(p), resized(x, x_shape))

    w_struct = jax.ShapeDtypeStruct(tuple(sizes[c] for c in layout[1]), b.dtype)
    out = jax.eval_shape(run, w_struct, jax.ShapeDtypeStruct(x_shape, b.dtype))
    return layer, out.shape


def ragged(b: Builder, shape: Shape) -> Made:
    """Rows grouped by expert."""
    if b.maps:
        return matmul(b, shape)  # JAX's own ragged dot is not mapped in general
    k, n = b.draw((2, 4, 8)), b.draw(SIZES)
    weight = operand(b, (3, k, n))
    sizes = b.draw(((2, 1, 3), (0, 6, 0), (1, 2, 1)))

    def layer(p: Params, x: Any) -> Any:
        return _damp(
            lax.ragged_dot(resized(x, (6, k)), weight.get(p), jnp.asarray(sizes, jnp.int32)), k
        )

    return layer, (6, n)


def lookup(b: Builder, shape: Shape) -> Made:
    """Rows of a table, added to the activation; perhaps attended by the same table."""
    rows, width = b.draw((3, 6)), b.draw((2, 4, 8))
    axis, mode = b.draw((0, 0, 1)), b.draw((None, "clip", "fill"))
    table_shape = (rows, width) if axis == 0 else (width, rows)
    table = operand(b, table_shape, moves=1)
    attends = axis == 0 and b.maybe(40)

    def layer(p: Params, x: Any) -> Any:
        picked = jnp.take(table.get(p), p["ids"] % rows, axis=axis, mode=mode)
        x = x + resized(picked * b.cast(2.0), shape)
        if attends:
            x = resized(x, (3, width))
            x = activation(table, x, (1,))
            return _damp(x @ table.get(p).T, width)
        return x

    return layer, (3, rows) if attends else shape


def experts(b: Builder, shape: Shape) -> Made:
    """A weight for each row, picked by its index."""
    k, n = b.draw((2, 4)), b.draw(SIZES)
    weight = operand(b, (3, k, n), moves=1)

    def layer(p: Params, x: Any) -> Any:
        x = resized(x, (len(p["ids"]), k))
        x = activation(weight, x, (1,))
        return _damp(jnp.einsum("mk,mkn->mn", x, weight.get(p)[p["ids"] % 3]), k)

    return layer, (4, n)


def gain(b: Builder, shape: Shape) -> Made:
    """A norm's gain or a bias: a vector that stays float."""
    vector = operand(b, shape[-1:], moves=0)
    b.opaque.update(vector.names)
    if b.maybe(50):
        return (lambda p, x: x * vector.get(p)), shape
    return (lambda p, x: x + vector.get(p)), shape


def plain(b: Builder, shape: Shape) -> Made:
    """An operation on the activation alone."""
    new = shape
    if b.maybe(50):
        size = math.prod(shape)
        k = b.draw([k for k in (1, 2, 3, 4) if size % k == 0])
        new = (k, size // k) if b.maybe(50) else (size // k, k)
    fn = b.draw(
        (
            jnp.tanh,
            lambda x: jnp.flip(x, 0),
            lambda x: jnp.cumsum(x, 0) * b.cast(0.5),
            lambda x: lax.associative_scan(jnp.add, x, axis=0) * b.cast(0.5),
            lambda x: jnp.where(x > 0, x, x * b.cast(0.1)),
            lambda x: jnp.sort(x, axis=-1),
        )
    )
    return (lambda p, x: fn(x).reshape(new)), new


def between(b: Builder, shape: Shape) -> Made:
    """A product of two activations."""

    def layer(p: Params, x: Any) -> Any:
        rows = x.reshape(-1, shape[-1])
        return _damp(rows @ rows.T, 4 * shape[-1]) @ rows

    return layer, (math.prod(shape[:-1]), shape[-1])


LAYERS = (
    dot, dot, dot, dot, dot, matmul, matmul, matmul, conv, ragged, lookup, experts, gain, plain,
    plain, between,
)  # fmt: skip
