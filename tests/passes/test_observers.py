"""Calibration statistics against values computed by hand, through every kind of sub-jaxpr."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.passes.histogram import Histogram, percentile_of_histogram
from jaxquant.passes.observers import insert_observers
from jaxquant.passes.program import trace
from jaxquant.passes.statistics import AbsMax
from tests.passes.zoo import tanh_layers

X = jax.random.normal(jax.random.key(0), (5, 8))
W = jax.random.normal(jax.random.key(1), (8, 8)) / 2
STACK = jax.random.normal(jax.random.key(2), (3, 8, 8)) / 2


def observe(fn, params, *args, statistic=None):
    program = trace(fn, params, args)
    observed = insert_observers(program, {name: statistic or AbsMax() for name in params})
    flat = program.flatten(params, *args)
    found = jax.jit(observed)(*flat)
    eager = observed(*flat)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, eager)
    return found


def amax(*values):
    return np.max([np.max(np.abs(v)) for v in values])


def test_plain_product_and_transformed_weight():
    found = observe(
        lambda p, x: jnp.einsum("nk,mk->nm", p["w"].T.astype("bfloat16"), x), {"w": W}, X
    )
    np.testing.assert_allclose(found["w"], amax(X))


def test_two_uses_are_merged():
    found = observe(lambda p, x: (3 * x) @ p["w"] + x @ p["w"], {"w": W}, X)
    np.testing.assert_allclose(found["w"], 3 * amax(X), rtol=1e-6)


def test_stacked_layers_keep_their_own():
    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    expected = [amax(x) for x in tanh_layers(X, STACK)]
    np.testing.assert_allclose(observe(fn, {"w": STACK}, X)["w"], expected, rtol=1e-5)


def test_constant_of_a_scan_is_merged():
    def fn(p, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3)[0]

    expected = amax(*tanh_layers(X, [W, W, W]))
    np.testing.assert_allclose(observe(fn, {"w": W}, X)["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("statistic", [AbsMax(), Histogram()], ids=lambda s: s.name)
def test_a_scan_of_no_steps_sees_nothing(statistic):
    def fn(p, x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=0)[0] @ p["w"]

    found, want = (
        observe(fn, {"w": W}, X, statistic=statistic)["w"] for fn in (fn, lambda p, x: x @ p["w"])
    )
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_nested_scans_and_a_constant_beside_stacked_layers():
    stacks = jax.random.normal(jax.random.key(3), (2, 3, 8, 8)) / 2

    def inner(p, c, w):
        return jnp.tanh(c @ w) + 0 * (c @ p["v"]), None

    def fn(p, x):
        def outer(c, ws):
            return lax.scan(functools.partial(inner, p), c, ws)

        return lax.scan(outer, x, p["w"])[0]

    found = observe(fn, {"w": stacks, "v": W}, X)
    expected = [amax(x) for x in tanh_layers(X, stacks.reshape(6, 8, 8))]
    np.testing.assert_allclose(found["w"], np.reshape(expected, (2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found["v"], np.max(expected), rtol=1e-5)


def test_while_cond_remat_jit_and_custom_rules():
    @jax.custom_vjp
    def layer(w, x):
        return jnp.tanh(x @ w)

    layer.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda r, ct: r)

    def fn(p, x):
        x = lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x)
        )[1]
        x = lax.cond(x.sum() > -1e9, lambda x: x @ p["a"], lambda x: (9 * x) @ p["b"], x)
        return jax.checkpoint(lambda x: jax.jit(lambda x: layer(p["c"], jax.nn.silu(x)))(x))(x)

    params = dict.fromkeys("wabc", W)
    found = observe(fn, params, X)
    inputs = tanh_layers(X, [W, W, W])
    last = jnp.tanh(inputs[-1] @ W)
    np.testing.assert_allclose(found["w"], amax(*inputs), rtol=1e-5)
    np.testing.assert_allclose(found["a"], amax(last), rtol=1e-5)
    assert found["b"] == 0  # that branch did not run
    np.testing.assert_allclose(found["c"], amax(jax.nn.silu(last @ W)), rtol=1e-5)


def test_histogram_percentile_within_a_bin():
    x = jax.random.normal(jax.random.key(5), (100, 8)).at[3, 2].set(50.0)
    found = observe(lambda p, x: x @ p["w"], {"w": W}, x, statistic=Histogram())["w"]
    assert float(found.sum()) == x.size
    for percentile in (10.0, 50.0, 99.0, 100.0):
        exact = np.percentile(np.abs(x), percentile, method="inverted_cdf")
        got = float(percentile_of_histogram(found, percentile))
        assert exact * (1 - 1e-5) <= got <= exact * 2 ** (1.01 / 64)


def test_sharded_batch_equals_unsharded():
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    x = jax.random.normal(jax.random.key(6), (16, 8))
    sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    np.testing.assert_array_equal(
        observe(fn, {"w": W}, sharded)["w"], observe(fn, {"w": W}, x)["w"]
    )


def test_inside_shard_map_the_devices_are_merged():
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    x = jax.random.normal(jax.random.key(7), (16, 8))

    def fn(p, x):
        def local(w, x):
            return jnp.tanh(x @ w)

        return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(p["w"], x)

    np.testing.assert_allclose(observe(fn, {"w": W}, x)["w"], amax(x))
    found = observe(fn, {"w": W}, x, statistic=Histogram())["w"]
    assert float(found.sum()) == x.size


def test_unknown_parameter_is_an_error():
    program = trace(lambda p, x: x @ p["w"], {"w": W}, (X,))
    with pytest.raises(ValueError, match="not parameters of the program: nope"):
        insert_observers(program, {"nope": AbsMax()})
