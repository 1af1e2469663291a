"""Random calls, loops and branches around layers: the control flow of the random programs.

A wrapper draws an inner layer with a `Builder` and returns the layer around it. Parameters that a
scan slices or that vmap maps get one more axis. Used by `random_programs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback

from tests.passes.random_layers import Made, resized
from tests.passes.random_weights import LARGEST, Builder, Params, Shape

Inner = Callable[[Builder, Shape], Made]
SEEN: list[Any] = []  # what the callbacks of the programs were given


def _inner(b: Builder, shape: Shape, make: Inner) -> tuple[Any, Shape, list[str]]:
    """A layer, and the names of the parameters that it alone brought."""
    before = set(b.shapes)
    fn, out = make(b, shape)
    return fn, out, [name for name in b.shapes if name not in before]


def _some(b: Builder, names: list[str], count: int) -> dict[str, int]:
    """Some of the parameters, with the place of an axis of ``count`` that each of them gets."""
    chosen = {}
    for name in names:
        shape = b.shapes[name]
        size = count
        for n in shape:
            size *= n
        if size <= LARGEST and len(shape) < 5 and b.maybe(60):
            axis = 0 if b.maybe(70) else b.draw(range(len(shape) + 1))
            b.shapes[name] = (*shape[:axis], count, *shape[axis:])
            chosen[name] = axis
    return chosen


def scan(b: Builder, shape: Shape, make: Inner) -> Made:
    """Weights as constants, stacked, or handed on by the carry."""
    fn, _, names = _inner(b, shape, make)
    length = b.draw((2, 3))
    stacked = _some(b, names, length)
    carried = [n for n in names if n not in stacked and b.maybe(20)]
    hands_on, unroll, reverse = b.maybe(15), b.draw((1, 1, 2)), b.maybe(20)

    def layer(p: Params, x: Any) -> Any:
        def body(carry: Any, xs: Any) -> Any:
            own, x = carry
            y = jnp.tanh(resized(fn({**p, **own, **xs}, x), shape))
            return (own, y), (xs if hands_on else None, y.sum())

        xs = {n: jnp.moveaxis(p[n], axis, 0) for n, axis in stacked.items()}
        init = ({n: p[n] for n in carried}, x)
        (_, x), (_, sums) = lax.scan(body, init, xs, length, reverse=reverse, unroll=unroll)
        return x + sums.sum()

    return layer, shape


def loop(b: Builder, shape: Shape, make: Inner) -> Made:
    """A while loop, or a fori_loop."""
    b.differentiable = False
    fn, _, names = _inner(b, shape, make)
    counted, in_condition = b.maybe(50), b.maybe(20)
    carried = [n for n in names if b.maybe(20)]

    def layer(p: Params, x: Any) -> Any:
        def step(x: Any) -> Any:
            return jnp.tanh(resized(fn(p, x), shape))

        if counted:
            return lax.fori_loop(0, 2 + p["index"] * 0, lambda _, x: step(x), x)

        def cond(state: Any) -> Any:
            i, own, x = state
            more = i < 2
            if in_condition:
                more &= ~jnp.isnan(fn({**p, **own}, x).sum())
            return more

        def body(state: Any) -> Any:
            i, own, x = state
            return i + 1, own, jnp.tanh(resized(fn({**p, **own}, x), shape))

        return lax.while_loop(cond, body, (0, {n: p[n] for n in carried}, x))[2]

    return layer, shape


def cond(b: Builder, shape: Shape, make: Inner) -> Made:
    """Two or three branches."""
    fn, out, _ = _inner(b, shape, make)
    other, _, _ = _inner(b, shape, make)
    switch = b.maybe(40)

    def layer(p: Params, x: Any) -> Any:
        first = lambda x: fn(p, x)  # noqa: E731
        second = lambda x: resized(other(p, x), out)  # noqa: E731
        if switch:
            return lax.switch(p["index"], [second, first, second], x)
        return lax.cond(p["index"] > 0, first, second, x)

    return layer, out


def call(b: Builder, shape: Shape, make: Inner) -> Made:
    """jit or remat, with the weights as arguments or closed over."""
    fn, out, names = _inner(b, shape, make)
    policy = b.draw(
        (None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable)
    )
    wrap = b.draw(
        (
            jax.jit,
            functools.partial(jax.jit, donate_argnums=1),
            functools.partial(jax.checkpoint, policy=policy),
            jax.checkpoint,
            lambda f: jax.jit(jax.checkpoint(f)),
        )
    )
    closes, twice = b.maybe(40), b.maybe(20)

    def layer(p: Params, x: Any) -> Any:
        rest = {n: v for n, v in p.items() if n not in names}
        own = {n: p[n] for n in names}
        if closes:
            wrapped = wrap(lambda _, x: fn(p, x))
        else:
            wrapped = wrap(lambda own, x: fn({**rest, **own}, x))
        y = wrapped({} if closes else own, x * 1)
        return y + wrapped({} if closes else own, x * 2) if twice else y

    return layer, out


def custom(b: Builder, shape: Shape, make: Inner) -> Made:
    """A custom_jvp or custom_vjp, whose rule is not the derivative."""
    b.custom = True
    fn, out, names = _inner(b, shape, make)
    forward = b.maybe(50)

    def layer(p: Params, x: Any) -> Any:
        own, rest = {n: p[n] for n in names}, {n: v for n, v in p.items() if n not in names}

        def run(own: Params, x: Any) -> Any:
            return fn({**rest, **own}, x)

        if forward:
            with_rule: Any = jax.custom_jvp(run)

            @with_rule.defjvp
            def _(primals: Any, tangents: Any) -> Any:
                y, t = jax.jvp(lambda x: run(primals[0], x), primals[1:], tangents[1:])
                return y, 2 * t

        else:
            with_rule = jax.custom_vjp(run)

            def bwd(residuals: Any, ct: Any) -> Any:
                own, x = residuals
                (x_bar,) = jax.vjp(lambda x: run(own, x), x)[1](ct)
                return jax.tree.map(jnp.zeros_like, own), 3 * x_bar

            with_rule.defvjp(lambda own, x: (run(own, x), (own, x)), bwd)
        return with_rule(own, x)

    return layer, out


def mapped(b: Builder, shape: Shape, make: Inner) -> Made:
    """Vmap or lax.map over the activation, over weights, or over both."""
    if len(shape) < 2:
        return call(b, shape, make)
    b.maps += 1
    fn, out, names = _inner(b, shape[1:], make)
    b.maps -= 1
    with_map = b.maybe(30)
    stacked = {} if with_map else _some(b, names, shape[0])
    weights_only = bool(stacked) and b.maybe(30)

    def layer(p: Params, x: Any) -> Any:
        def one(own: Params, x: Any) -> Any:
            return fn({**p, **own}, x)

        if with_map:
            return lax.map(functools.partial(one, {}), x)
        own = {n: p[n] for n in stacked}
        if weights_only:
            return jax.vmap(one, (stacked, None))(own, x[0])
        return jax.vmap(one, (stacked, 0))(own, x)

    return layer, (shape[0], *out)


def gradient(b: Builder, shape: Shape, make: Inner) -> Made:
    """The gradient with respect to the activation, taken inside the program."""
    differentiable, was_custom = b.differentiable, b.custom
    b.differentiable, b.custom = True, False
    fn, _, _ = _inner(b, shape, make)
    usable = b.differentiable and not b.custom
    b.takes_gradients |= usable
    b.differentiable, b.custom = differentiable and b.differentiable, was_custom or b.custom

    def layer(p: Params, x: Any) -> Any:
        if not usable:
            return resized(fn(p, x), shape)
        return jax.grad(lambda x: jnp.sum(jnp.sin(fn(p, x))))(x)

    return layer, shape


def noted(b: Builder, shape: Shape, make: Inner) -> Made:
    """A callback, and a named scope."""
    fn, out, _ = _inner(b, shape, make)
    b.differentiable = False
    ordered, prints = b.maybe(30), b.maybe(50)

    def layer(p: Params, x: Any) -> Any:
        with jax.named_scope("noted"):
            y = fn(p, x)
        if prints:
            jax.debug.callback(SEEN.append, y.sum())
        else:
            io_callback(SEEN.append, None, x.sum(), ordered=ordered)
        return y

    return layer, out


WRAPPERS = (scan, scan, loop, cond, call, call, custom, mapped, mapped, gradient)
