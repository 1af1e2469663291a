"""What is handed through calls, loops and branches, and what only looks like it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.passes.forwarding import forwarded_inputs

W, X = jnp.ones((3, 4)), jnp.arange(12.0).reshape(3, 4)


@jax.custom_vjp
def _custom(w, x):
    return w, w * x


_custom.defvjp(lambda w, x: (_custom(w, x), None), lambda _, g: g)


def _scanned(w, x):
    def step(carry, x):
        kept, count = carry
        row, scale = x
        return (kept, count + 1.0), (row, row * scale)

    (kept, count), (rows, scaled) = lax.scan(step, (w[0], 0.0), (w, x), reverse=True)
    return rows, scaled, kept, count


def _swapped(w, x):
    (a, b), _ = lax.scan(lambda c, _: ((c[1], c[0]), None), (w, x), length=3)
    return a, b


def _while(w, x):
    return lax.while_loop(lambda c: c[2] < 3, lambda c: (c[0], c[1] + c[0], c[2] + 1), (w, x, 0))


CASES = {
    "nothing": (lambda w, x: (w * 1.0, x), [None, 1]),
    "jit": (lambda w, x: jax.jit(lambda w, x: (w, x + w))(w, x), [0, None]),
    "remat": (lambda w, x: jax.checkpoint(lambda w, x: (x @ w.T, w))(w, x), [None, 0]),
    "nested": (lambda w, x: jax.jit(jax.checkpoint(lambda x, w: (w, x)))(x, w), [0, 1]),
    "custom_vjp": (_custom, [0, None]),
    "scan": (_scanned, [0, None, None, None]),
    "swapped carries": (_swapped, [None, None]),
    "while": (_while, [0, None, None]),
    "cond": (lambda w, x: lax.cond(x[0, 0] > 0, lambda w, x: (w, x), lambda w, x: (w, w), w, x),
             [0, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forwarding(name):
    fn, expected = CASES[name]
    assert forwarded_inputs(jax.make_jaxpr(fn)(W, X).jaxpr) == expected
