"""What must survive the rewrite: effects, shardings, scopes, names that remat saves, donations."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.frontends.function import transform
from tests.passes.random_programs import primitives_of
from tests.passes.zoo import quantize_axes

W = jax.random.normal(jax.random.key(0), (8, 8)) / 3
X = jax.random.normal(jax.random.key(1), (5, 8))
Q = {"w": quantize_axes(W, (0,))}
FLOATS = {"w": Q["w"].dequantize()}


def equations(jaxpr):
    """All equations of a jaxpr and of its sub-jaxprs."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    yield from equations(sub)


def rewritten(fn, *args):
    return jax.make_jaxpr(transform(fn))(Q, *(args or (X,)))


def debug_layer(note):
    def layer(p, x):
        y = jnp.tanh(x @ p["w"])
        jax.debug.callback(note, y[0, 0])
        return y

    return layer


def io_layer(note, ordered):
    def layer(p, x):
        y = jnp.tanh(x @ p["w"])
        seen = io_callback(lambda v: note(v) or v, jax.typeof(y[0, 0]), y[0, 0], ordered=ordered)
        return y + 0 * seen

    return layer


def scanned(layer, p, x):
    return lax.scan(lambda c, _: (layer(p, c), None), x, None, length=3)[0]


def looped(layer, p, x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, layer(p, s[1])), (0, x))[1]


def branched(layer, p, x):
    return lax.cond(x[0, 0] < 100, lambda x: layer(p, x), lambda x: x, x)


def jitted(layer, p, x):
    return jax.jit(layer)(p, x)


def rematted(layer, p, x):
    return jax.checkpoint(layer)(p, x)


def with_jvp(layer, p, x):
    call = jax.custom_jvp(layer)
    call.defjvp(lambda ps, ts: (layer(*ps), ts[1]))
    return call(p, x)


def with_vjp(layer, p, x):
    call = jax.custom_vjp(layer)
    call.defvjp(lambda p, x: (layer(p, x), p), lambda p, g: (jax.tree.map(jnp.zeros_like, p), g))
    return call(p, x)


def mapped(layer, p, x):
    return lax.map(lambda row: layer(p, row[None])[0], x)


PLACES = [lambda layer, p, x: layer(p, x), scanned, looped, branched, jitted, rematted, with_jvp,
          with_vjp, mapped]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["debug", "io", "ordered"])
def test_effects(place, kind):
    seen: list[float] = []
    note = lambda v: seen.append(float(v))  # noqa: E731
    layer = debug_layer(note) if kind == "debug" else io_layer(note, kind == "ordered")
    fn = functools.partial(place, layer)
    before, after = jax.make_jaxpr(fn)(FLOATS, X), rewritten(fn)
    assert sorted(map(str, after.effects)) == sorted(map(str, before.effects))
    callback = "debug_callback" if kind == "debug" else "io_callback"
    assert primitives_of(after).count(callback) == primitives_of(before).count(callback) == 1
    assert "quantized_dot_general" in primitives_of(after)
    runs = []
    for tree, run in ((FLOATS, jax.jit(fn)), (Q, transform(fn))):
        seen.clear()
        jax.block_until_ready(run(tree, X))
        jax.effects_barrier()
        runs.append(list(seen) if kind == "ordered" else sorted(seen))
    assert runs[0] and len(runs[0]) == len(runs[1])
    np.testing.assert_allclose(runs[1], runs[0], atol=1e-5)


def test_a_function_for_its_effect_alone_still_runs():
    seen: list[float] = []
    transform(lambda p: jax.debug.callback(lambda v: seen.append(float(v)), p["w"].sum()))(Q)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [FLOATS["w"].sum()], rtol=1e-5)


@pytest.mark.parametrize("place", [PLACES[0], scanned, branched, jitted, rematted])
def test_sharding_constraints(place):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, columns = NamedSharding(mesh, P("d")), NamedSharding(mesh, P(None, "t"))

    def layer(p, x):
        w = lax.with_sharding_constraint(p["w"], columns)
        y = lax.with_sharding_constraint(x @ w, rows)
        return jnp.tanh(y)

    x = jnp.concatenate([X, X[:3]])
    fn = functools.partial(place, layer)
    after = rewritten(fn, x)
    kept = [str(e.params["sharding"].spec) for e in equations(after)
            if e.primitive.name == "sharding_constraint"]  # fmt: skip
    # One for the product, as before; the weight's is one for its codes and one for its scale.
    assert sorted(kept) == sorted(map(str, [rows.spec, columns.spec, columns.spec]))
    out = transform(fn)(Q, x)
    np.testing.assert_allclose(out, fn(FLOATS, x), atol=1e-5)
    lowered = jax.jit(transform(fn)).lower(Q, x).as_text()
    assert len(re.findall(r"sdy.sharding_constraint|@Sharding", lowered)) >= 3


def scoped(p, x):
    with jax.named_scope("outer"):
        x = jnp.tanh(x)
        with jax.named_scope("product"):
            x = x @ p["w"]
        return jnp.sin(x)


@pytest.mark.parametrize("place", [PLACES[0], scanned, branched, jitted, rematted, looped])
def test_named_scopes(place):
    fn = functools.partial(place, scoped)
    scopes = {}
    for eqn in equations(rewritten(fn)):
        scopes.setdefault(eqn.primitive.name, str(eqn.source_info.name_stack))
    assert scopes["quantized_dot_general"].endswith("outer/product")
    assert scopes["tanh"].endswith("outer")
    assert scopes["sin"].endswith("outer")
    text = jax.jit(transform(fn)).lower(Q, X).as_text(debug_info=True)
    assert "outer/product/dot_general" in text
    assert "outer/sin" in text


def test_source_lines_are_the_users():
    (eqn,) = (e for e in equations(rewritten(scoped)) if e.primitive.name.startswith("quantized"))
    assert "test_survives.py" in jax.make_jaxpr(transform(scoped))(Q, X).pretty_print(
        source_info=True
    )
    assert eqn.source_info.traceback is not None


@pytest.mark.parametrize(
    ("policy", "again"),
    [
        (jax.checkpoint_policies.save_only_these_names("product"), 1),
        (jax.checkpoint_policies.save_only_these_names("other"), 2),
        (jax.checkpoint_policies.save_anything_except_these_names("product"), 0),
        (jax.checkpoint_policies.dots_saveable, 0),
        (jax.checkpoint_policies.nothing_saveable, 2),
    ],
)
def test_checkpoint_names_decide_what_remat_saves(policy, again):
    """Two products forward, two backward, and those of the forward that are not saved."""

    def layer(p, x):
        return jnp.sin(jnp.sin(checkpoint_name(x @ p["w"], "product")) @ p["w"])

    fn = jax.checkpoint(layer, policy=policy)
    after = rewritten(fn)
    assert "name" in primitives_of(after)

    def products(fn, tree, name):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: fn(tree, x).sum()))(X)
        return primitives_of(jaxpr).count(name)

    assert products(fn, FLOATS, "dot_general") == 4 + again
    assert products(transform(fn), Q, "quantized_dot_general") == 4 + again


def test_offloaded_names_keep_their_policy():
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["product"], names_which_can_be_offloaded=[],
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip
    fn = jax.checkpoint(lambda p, x: jnp.sin(checkpoint_name(x @ p["w"], "product")), policy=policy)
    got = jax.grad(lambda x: transform(fn)(Q, x).sum())(X)
    np.testing.assert_allclose(got, jax.grad(lambda x: fn(FLOATS, x).sum())(X), atol=1e-5)


@pytest.mark.parametrize("size", ["small", "large"])
def test_donated_buffers(size):
    """A body that would be inlined is kept as a call where it has donations."""

    def step(p, x, state):
        y = x @ p["w"]
        for _ in range(1 if size == "small" else 10):
            state = jnp.sin(state) + y
        return y, state

    inner = jax.jit(step, donate_argnums=(2,))
    state = jnp.ones_like(X)
    after = jax.make_jaxpr(transform(lambda p, x, s: inner(p, x, s)))(Q, X, state)
    (call,) = (e for e in equations(after) if e.params.get("name") == "step")
    donated, shapes = call.params["donated_invars"], [v.aval.shape for v in call.invars]
    assert donated.count(True) == 1
    assert shapes[donated.index(True)] == state.shape
    outer = jax.jit(transform(step), donate_argnums=(2,))
    text = outer.lower(Q, X, state).as_text()
    assert text.count("tf.aliasing_output") == 1
    held = jnp.ones_like(X)
    y, _ = outer(Q, X, held)
    assert held.is_deleted()
    np.testing.assert_allclose(y, X @ FLOATS["w"], atol=1e-5)


def test_metadata_of_the_compiler():
    from jax.experimental.xla_metadata import set_xla_metadata

    def fn(p, x):
        with set_xla_metadata(group="one"):
            return jnp.tanh(x @ p["w"])

    text = jax.jit(transform(fn)).lower(Q, X).as_text()
    assert 'group = "one"' in text
