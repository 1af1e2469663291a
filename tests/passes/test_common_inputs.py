"""common_inputs: which weights read the very same values, whatever stands between."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.passes.common_inputs import common_inputs
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.program import trace

X = jnp.ones((2, 6, 16))


def weights(names="abc", *lead):
    return {name: jnp.ones((*lead, 16, 16)) for name in names}


def groups(fn, params, *args):
    program = trace(fn, params, args)
    return common_inputs(program, find_weights(program))


def moved(p, x):
    return (
        x @ p["a"],
        x.reshape(12, 16) @ p["b"],
        jnp.einsum("tbd,dn->btn", x.swapaxes(0, 1), p["c"]),
    )


def called(p, x):
    f = jax.jit(lambda w, x: jnp.sin(x @ w) * 2)
    return (
        f(p["a"], x),
        jax.checkpoint(f)(p["b"], x),
        lax.cond(x.sum() > 0, f, lambda w, x: x, p["c"], x),
    )


def scanned(p, x):
    def step(c, p):
        return jnp.tanh(c @ p["a"]) * (c @ p["b"]) + c @ p["c"], None

    return lax.scan(step, x, p)[0]


def constant_of_loops(p, x):
    c, _ = lax.scan(lambda c, _: (c + jnp.tanh(x @ p["a"]), None), x, None, length=3)
    d = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + x @ p["b"]), (0, x))[1]
    return c, d, x @ p["c"]


def each_widens(p, x):
    x = x.astype(jnp.bfloat16)
    return [x.astype(jnp.float32) @ p[name] for name in "abc"]


@pytest.mark.parametrize(
    ("fn", "lead"),
    [(moved, ()), (called, ()), (scanned, (3,)), (constant_of_loops, ()), (each_widens, ())],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_all_three_are_of_one_input(fn, lead):
    assert [sorted(group) for group in groups(fn, weights("abc", *lead), X)] == [["a", "b", "c"]]


def narrowed(p, x):
    half = x.astype(jnp.bfloat16)
    return x @ p["a"], half.astype(jnp.float32) @ p["b"]


def repeated(p, x):
    """The same largest value; but each value occurs three times in one, which percentiles see."""
    return x @ p["a"], jnp.broadcast_to(x, (3, *x.shape)) @ p["b"]


def one_is_used_again(p, x):
    y = x @ p["a"]
    return y @ p["a"] + x @ p["b"]


def different_iterations(p, x):
    """A carry and its start are not the same value."""
    return lax.scan(lambda c, _: (jnp.tanh(c @ p["a"]), None), x, None, length=3)[0], x @ p["b"]


def different_layers(p, x):
    return functools.reduce(lambda x, name: jnp.tanh(x @ p[name]), "ab", x)


@pytest.mark.parametrize(
    "fn",
    [narrowed, repeated, one_is_used_again, different_iterations, different_layers],
    ids=lambda fn: fn.__name__,
)
def test_not_of_one_input(fn):
    assert groups(fn, weights("ab"), X) == []


def test_a_gradient_inside_counts_forward_only():
    def fn(p, x):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["a"]) + jnp.sin(x @ p["b"])))(x)

    assert groups(fn, weights("ab"), X) == [["a", "b"]]


def test_random_keys_are_moved_too():
    def fn(p, x):
        keys = jax.random.split(jax.random.key(0), 4).reshape(2, 2)
        return x @ p["a"] + jax.random.normal(keys[0, 1], x.shape) @ p["b"]

    assert groups(fn, weights("ab"), X) == []
