"""What random programs found, as small programs: each was wrong once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.recipe import ActScheme, Recipe, Rule, WeightScheme
from jaxquant.core.structure import scale_by
from jaxquant.frontends.function import transform
from jaxquant.passes.assign_recipe import assign_recipe
from jaxquant.passes.find_weights import find_weights
from jaxquant.passes.make_plan import make_plan
from jaxquant.passes.param_blocks import GroupSizeError
from jaxquant.passes.program import trace
from jaxquant.passes.rewrite import StrictError
from tests.passes.test_survives import equations
from tests.passes.zoo import quantize_axes


def planned(fn, params, *args, weight=None, act=None):
    rule = Rule(weight=weight or WeightScheme("int8"), act=act, optional=True)
    program = trace(fn, params, args)
    found = assign_recipe(find_weights(program), program.parameters, Recipe("test", (rule,)))
    return found, make_plan(program, found)


def random(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


X = random(0, 5, 8)
SQUARE = {"w": random(1, 8, 8)}


@pytest.mark.parametrize("through", ["plain", "jit", "scan", "remat", "custom_vjp"])
def test_cotangents_are_not_rounded(through):
    """In a gradient that the function takes itself, only the forward products quantize inputs."""

    def layer(w, x):
        return jnp.tanh(x @ w)

    rule = jax.custom_vjp(layer)
    rule.defvjp(lambda w, x: (layer(w, x), w), lambda w, g: (0 * w, g @ w.T))
    forms = {
        "plain": layer,
        "jit": jax.jit(layer),
        "scan": lambda w, x: jax.lax.scan(lambda c, _: (layer(w, c), None), x, None, length=1)[0],
        "remat": jax.checkpoint(layer),
        "custom_vjp": rule,
    }

    def energy(p, x):
        return jnp.sum(forms[through](p["w"], x) ** 2)

    q = {"w": quantize_axes(SQUARE["w"], (0,)).replace(act=ActScheme())}
    force = lambda p, x: jax.grad(lambda x: energy(p, x))(x)  # noqa: E731
    jaxpr = jax.make_jaxpr(transform(force))(q, X)
    schemes = [e.params["act"] for e in equations(jaxpr)
               if e.primitive.name == "quantized_dot_general"]  # fmt: skip
    assert schemes.count(None) == 1
    # What remat computes again is the forward product, and is rounded as it was.
    assert len(schemes) == (3 if through == "remat" else 2)
    if through != "custom_vjp":  # from outside, the user's rule gets a dequantized weight
        outside = jax.grad(lambda x: transform(energy)(q, x))(X)
        np.testing.assert_allclose(transform(force)(q, X), outside, atol=1e-5)


def test_plans_show_no_input_scheme_for_what_is_backward():
    force = lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"])))(x)  # noqa: E731
    found, plan = planned(force, SQUARE, X, act=ActScheme())
    assert [use.backward for use in found.uses] == [False, True]
    assert [row.act for row in plan.where(param="w")] == ["int8 per token", ""]


def test_the_forward_product_decides_where_scales_go():
    """Also where the backward one is larger, and where only a slice is multiplied."""

    def force(p, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"][:, ::2])))(x)

    found, _ = planned(force, {"w": random(1, 8, 64)}, X)
    assert found.params["w"].block_shape == (8, 1)


def test_a_layer_picked_by_an_index_is_dequantized_aloud():
    """It was taken for a lookup, whose rows are floats by right."""

    def fn(p, x, i):
        return x @ p["w"][i] + jnp.tanh(p["w"][i]).sum()

    params, i = {"w": random(1, 3, 8, 8)}, jnp.array(1)
    q = {"w": quantize_axes(params["w"], (1,))}
    _, plan = planned(fn, params, X, i)
    rows = {(row.kind, row.status) for row in plan.where(param="w")}
    assert rows == {("dot", "quantized"), ("other", "dequantized")}
    with pytest.raises(StrictError, match="tanh"):
        transform(fn, strict=True)(q, X, i)


def test_a_product_that_lost_its_codes_on_the_way_is_not_called_quantized():
    """A kernel joined with one that stays float: the product of both is a float one."""
    params = {"w": random(1, 8, 8), "row": random(2, 1, 8)}

    def fn(p, x):
        return x @ p["w"][:, :7] @ jnp.concatenate([p["w"].T[:6], p["row"]], 0)

    found, plan = planned(fn, params, X)
    assert found.params["row"].scheme is None or found.params["row"].block_shape
    skip = Recipe("test", (Rule("row", skip=True), Rule(weight=WeightScheme("int8"))))
    program = trace(fn, params, (X,))
    plan = make_plan(program, assign_recipe(find_weights(program), program.parameters, skip))
    rows = [(row.status, row.reason) for row in plan.where(param="w")]
    assert [status for status, _ in rows] == ["quantized", "dequantized"]
    assert "joined with values that are not quantized" in rows[1][1]


def test_rows_of_one_value_stay_float():
    """They were an IndexError where the recipe has groups."""
    params = {"table": random(0, 10, 1), "w": random(1, 8, 8)}
    fn = lambda p, x, ids: x @ p["w"] + p["table"][ids]  # noqa: E731
    ids = jnp.array([1, 2, 3, 4, 5])
    for scheme in (WeightScheme("int8", group_size=4), WeightScheme("int8")):
        found, _ = planned(fn, params, X, ids, weight=scheme)
        assert found.params["table"].scheme is None
        assert "single values" in found.params["table"].reason


def test_an_axis_that_no_group_fits_is_named():
    """It was an IndexError on the way to the message."""
    fn = lambda p, x: x @ p["w"].reshape(2, 16, 8)[1, ::2]  # noqa: E731
    with pytest.raises(GroupSizeError, match="that do: none.*granularity='channel'"):
        planned(fn, {"w": random(0, 32, 8)}, X, weight=WeightScheme("int8", group_size=4))


def test_scalar_factors_of_float64_weights_keep_their_precision():
    with jax.enable_x64(True):
        w = quantize_axes(jnp.asarray(SQUARE["w"], jnp.float64), (0,))
        scaled = scale_by(w, jnp.float64(1) / 3).dequantize()
        np.testing.assert_allclose(scaled, np.asarray(w.dequantize()) / 3, rtol=1e-15)


def decoded(p, x, steps):
    """A loop that ends after so many steps; its state is of several dtypes."""

    def step(state):
        i, x, key = state
        return i + 1, jnp.tanh(x @ p["w"]), jax.random.fold_in(key, i)

    i, x, key = jax.lax.while_loop(lambda s: s[0] < steps, step, (0, x, jax.random.key(0)))
    return i, x, jax.random.normal(key)


def test_a_mapped_loop_ends_for_each_when_its_own_condition_does():
    """Under vmap the equation has a condition for each; `lax.while_loop` refused that."""
    steps = jnp.array([0, 3, 1, 2, 7])
    fn = lambda p, xs, steps: jax.vmap(decoded, (None, 0, 0))(p, xs, steps)  # noqa: E731
    q = {"w": quantize_axes(SQUARE["w"], (0,))}
    got = transform(fn)(q, X, steps)
    one = [decoded({"w": q["w"].dequantize()}, x, n) for x, n in zip(X, steps)]
    jax.tree.map(lambda g, *w: np.testing.assert_allclose(g, np.stack(w), atol=1e-5), got, *one)
    np.testing.assert_array_equal(got[0], steps)
    jaxpr = jax.make_jaxpr(transform(fn))(q, X, steps)
    names = [e.primitive.name for e in equations(jaxpr)]
    assert names.count("while") == names.count("quantized_dot_general") == 1
    # Several maps: conditions of two axes.
    twice = lambda p, xs, steps: jax.vmap(fn, (None, 0, None))(p, xs, steps)  # noqa: E731
    again = transform(twice)(q, jnp.stack([X, 2 * X]), steps)
    np.testing.assert_allclose(again[1][0], got[1], atol=1e-6)


def test_calibration_of_a_mapped_loop():
    from jaxquant.algorithms.ptq import ptq
    from jaxquant.frontends import quantize

    steps = jnp.array([0, 3, 1, 2, 7])
    fn = lambda p, xs, steps: jax.vmap(decoded, (None, 0, 0))(p, xs, steps)[1]  # noqa: E731
    static = Rule(weight=WeightScheme("int8"), act=ActScheme(mode="static"))
    decorated = quantize(Recipe("static", (static,)))(fn)
    q = ptq(decorated, SQUARE, X, steps, calibration=[(X, steps)], progress=False)
    reach = float(q["w"].input_scale.item()) * 127
    assert np.abs(X[1:]).max() <= reach <= np.abs(X).max() * 1.001
    np.testing.assert_allclose(decorated(q, X, steps)[0], X[0])
