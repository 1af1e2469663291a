"""Editing equations in place: values, what stays the same object, what survives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as jp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxquant.passes import edit_jaxpr
from tests.passes.zoo import CASES

X = jnp.linspace(-1.0, 1.0, 8)


def everywhere(f):
    """A function that applies `f` in each kind of body, and once in no body."""

    @jax.custom_jvp
    def with_jvp(x):
        return f(x) * 1.5

    @jax.custom_vjp
    def with_vjp(x):
        return f(x)

    with_jvp.defjvp(lambda p, t: (with_jvp(*p), 3.0 * t[0]))
    with_vjp.defvjp(lambda x: (with_vjp(x), None), lambda _, ct: (5.0 * ct,))
    shared = jax.jit(lambda x: f(x) + 1)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def fn(x):
        y = shared(shared(f(x)))
        y = jax.lax.scan(lambda c, _: (f(c), None), y, None, length=2)[0]
        y = jax.lax.while_loop(
            lambda s: f(s[1]).sum() + 9 > s[0], lambda s: (s[0] + 9, f(s[1])), (0.0, y)
        )[1]
        y = jax.lax.cond(y.sum() > 0, lambda y: f(y), lambda y: f(y) * 2, y)
        y = with_vjp(with_jvp(jax.checkpoint(f)(y)))
        return jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(y)

    return fn


SINES = 12  # two of them in the body that is shared
BODIES = everywhere(jnp.sin)


def sines_to_cosines(jaxpr, outer):
    eqns = [
        edit_jaxpr.new_eqn(e.invars, e.outvars, jp.cos_p, e.params, like=e)
        if e.primitive is jp.sin_p
        else e
        for e in jaxpr.eqns
    ]
    return edit_jaxpr.replace_eqns(jaxpr, eqns)


def count(closed, primitive):
    return sum(e.primitive is primitive for j in edit_jaxpr.all_bodies(closed) for e in j.eqns)


def test_every_body_is_edited_and_runs():
    closed = jax.make_jaxpr(BODIES)(X)
    assert count(closed, jp.sin_p) == SINES
    edited = edit_jaxpr.edit(closed, sines_to_cosines)
    assert (count(edited, jp.sin_p), count(edited, jp.cos_p)) == (0, SINES)
    expected = jax.jit(everywhere(jnp.cos))(X)
    np.testing.assert_array_equal(jax.jit(jaxpr_as_fun(edited))(X)[0], expected)
    assert count(closed, jp.sin_p) == SINES  # the original is untouched


def test_nothing_changed_is_the_same_object():
    for case in CASES:
        closed = jax.make_jaxpr(case.fn)(case.params(), *case.inputs)
        assert edit_jaxpr.edit(closed, lambda jaxpr, outer: jaxpr) is closed
    edited = edit_jaxpr.edit(jax.make_jaxpr(BODIES)(X), sines_to_cosines)
    assert edit_jaxpr.edit(edited, sines_to_cosines) is edited


def test_a_shared_body_stays_shared():
    edited = edit_jaxpr.edit(jax.make_jaxpr(BODIES)(X), sines_to_cosines)
    first, second = (e for e in edited.jaxpr.eqns if e.primitive is jp.jit_p)
    assert first.params["jaxpr"] is second.params["jaxpr"]


def test_outer_names_the_equations_around():
    seen = {}

    def look(jaxpr, outer):
        seen[tuple(str(e.primitive) for e in outer)] = len(jaxpr.eqns)
        return jaxpr

    def fn(x):
        return jax.lax.scan(lambda c, _: (jax.checkpoint(jnp.sin)(c), None), x, None, length=2)[0]

    edit_jaxpr.edit(jax.make_jaxpr(fn)(X), look)
    assert list(seen.values()) == [1, 1, 1]
    assert [len(k) for k in seen] == [2, 1, 0]  # from the inside out


def test_names_lines_and_effects_survive():
    def fn(x):
        with jax.named_scope("here"):
            y = jnp.sin(x)
        jax.debug.print("{}", y)
        return checkpoint_name(y, "kept")

    closed = jax.make_jaxpr(fn)(X)
    edited = edit_jaxpr.edit(closed, sines_to_cosines)
    assert edited.effects == closed.effects != set()
    old, new = closed.jaxpr.eqns[0], edited.jaxpr.eqns[0]
    assert str(new.source_info.name_stack) == "here"
    assert new.source_info is old.source_info
    assert new.ctx is old.ctx
    assert [e.primitive for e in edited.jaxpr.eqns[1:]] == [
        e.primitive for e in closed.jaxpr.eqns[1:]
    ]


def test_apply_types_its_result_and_drop_unused_drops_only_candidates():
    closed = jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(X)

    def insert(jaxpr, outer):
        first = jaxpr.eqns[0]
        extra = edit_jaxpr.apply(jp.cos_p, first.outvars, first.params, like=first)
        assert extra.outvars[0].aval == first.outvars[0].aval
        return edit_jaxpr.replace_eqns(jaxpr, [first, extra, *jaxpr.eqns[1:]])

    longer = edit_jaxpr.edit(closed, insert).jaxpr
    assert edit_jaxpr.drop_unused(longer, frozenset({jp.sin_p})) is longer
    shorter = edit_jaxpr.drop_unused(longer, frozenset({jp.cos_p}))
    assert [e.primitive for e in shorter.eqns] == [e.primitive for e in closed.jaxpr.eqns]


def test_a_changed_type_is_an_error():
    closed = jax.make_jaxpr(lambda x: jax.jit(lambda x: jnp.sin(x) * 2 + 1)(x))(X)

    def wrong(jaxpr, outer):
        return jaxpr.replace(invars=[]) if outer else jaxpr

    with pytest.raises(ValueError, match="the body of (jit|pjit) changed its inputs"):
        edit_jaxpr.edit(closed, wrong)
