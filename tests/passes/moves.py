"""Random chains of operations that move elements, for provenance and structure alike."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxquant.core import structure
from jaxquant.passes import axes


def factorisations(n):
    """All ordered ways to write n as a product of one to three sizes, ones included."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    threes = [(a, b, n // a // b) for a in divisors for b in divisors if n // a % b == 0]
    return [*threes, (n,), (1, n), (n, 1)]


@st.composite
def moves(draw):
    """A parameter's shape, and a chain of operations as (name, arguments)."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3)))
    chain, now = [], shape
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["transpose", "reshape", "split", "slice", "broadcast"]))
        if kind == "transpose":
            arg = tuple(draw(st.permutations(range(len(now)))))
            new = tuple(now[p] for p in arg)
        elif kind == "reshape":
            arg = new = draw(st.sampled_from(factorisations(int(np.prod(now)))))
        elif kind == "split":
            dim = draw(st.integers(0, len(now) - 1))
            parts = draw(st.sampled_from(factorisations(now[dim])))
            arg = new = (*now[:dim], *parts, *now[dim + 1 :])
        elif kind == "slice":
            dim = draw(st.integers(0, len(now) - 1))
            start = draw(st.integers(0, now[dim] - 1))
            arg = (dim, start, draw(st.integers(start + 1, now[dim])))
            new = (*now[:dim], arg[2] - start, *now[dim + 1 :])
        else:
            dim = draw(st.integers(0, len(now)))
            new = (*now[:dim], draw(st.sampled_from([1, 2])), *now[dim:])
            arg = (new, tuple(d for d in range(len(new)) if d != dim))
        if len(new) > 5 or np.prod(new) > 2000:
            break
        chain.append((kind, arg))
        now = new
    return shape, chain


def follow(origin, shape, chain):
    """The origin and shape after the chain, by `jaxquant.passes.axes`."""
    for kind, arg in chain:
        if kind == "transpose":
            origin, shape = axes.transpose(origin, arg), tuple(shape[p] for p in arg)
        elif kind in ("reshape", "split"):
            origin, shape = axes.reshape(origin, shape, arg), arg
        elif kind == "slice":
            dim, start, limit = arg
            origin = axes.slice_dim(origin, dim, shape[dim], start, limit, 1)
            shape = (*shape[:dim], limit - start, *shape[dim + 1 :])
        else:
            origin, shape = axes.broadcast_in_dim(origin, shape, *arg), arg[0]
    return origin, shape


def execute(x, chain):
    """The chain on a plain array."""
    for kind, arg in chain:
        if kind == "transpose":
            x = x.transpose(arg)
        elif kind in ("reshape", "split"):
            x = x.reshape(arg)
        elif kind == "slice":
            dim, start, limit = arg
            x = x[(slice(None),) * dim + (slice(start, limit),)]
        else:
            new, dims = arg
            (added,) = set(range(len(new))) - set(dims)
            x = np.broadcast_to(np.expand_dims(x, added), new)
    return x


def restructure(w, chain):
    """The chain on a QTensor, by `jaxquant.core.structure`."""
    for kind, arg in chain:
        if kind == "transpose":
            w = structure.transpose(w, arg)
        elif kind in ("reshape", "split"):
            w = structure.reshape(w, arg)
        elif kind == "slice":
            dim, start, limit = arg
            starts, limits = [0] * w.ndim, list(w.shape)
            starts[dim], limits[dim] = start, limit
            w = structure.slice(w, starts, limits, None)
        else:
            w = structure.broadcast_in_dim(w, *arg)
    return w


def numbered(shape):
    """Codes that tell elements apart as far as int8 can."""
    return jnp.arange(int(np.prod(shape)), dtype=jnp.int32).reshape(shape) % 251 - 125
