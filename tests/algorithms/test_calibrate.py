"""`jq.calibrate` on Flax models and functions; what `explain` predicts of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq

X = jax.random.normal(jax.random.key(0), (8, 16))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, double=False):
        x = nn.relu(nn.Dense(12, name="up")(x))
        return nn.Dense(4, name="down")(x) * (2 if double else 1)


@pytest.fixture(scope="module")
def model():
    linen = Model()
    return linen, linen.init(jax.random.key(1), X)


def test_linen_over_batches_of_every_form(model):
    linen, variables = model
    batches = [X, (2 * X,), {"x": X[:3]}]
    found = jq.calibrate(
        linen, variables, calibration=iter(batches), statistics=["absmax", "hessian"], double=True
    )
    assert list(found) == ["up/kernel", "down/kernel"] or set(found) == {"up/kernel", "down/kernel"}
    seen = np.concatenate([X, 2 * X, X[:3]]).astype(np.float64)
    np.testing.assert_allclose(found["up/kernel"]["absmax"], np.abs(seen).max())
    np.testing.assert_allclose(
        found["up/kernel"]["hessian"], 2 / len(seen) * seen.T @ seen, rtol=1e-4, atol=1e-5
    )
    assert found["down/kernel"]["hessian"].shape == (12, 12)
    text = repr(found)
    assert "2 operands" in text
    assert "up/kernel" in text
    assert "16x16" in text


def test_what_explain_predicts_is_what_it_takes(model):
    linen, variables = model
    rules = {"**": ["percentile", "moving_minmax"], "up/*": ["hessian", "reservoir"]}
    plan = jq.explain(linen, variables, X, observers=rules)
    found = jq.calibrate(linen, variables, calibration=[X, X[:2]], statistics=rules)
    assert plan.observer_bytes == found.nbytes
    assert plan.observer_bytes == sum(row["bytes"] for row in plan.to_json()["observers"])
    shapes = {(s.path, s.statistic): s.shape for s in plan.observers if s.path}
    for path, values in found.items():
        for name, value in values.items():
            assert shapes[path, name] == value.shape
    assert "calibration keeps" in str(plan)
    assert jq.explain(linen, variables, X).observers == ()


def test_function_and_nnx_and_the_call_as_the_only_batch(model):
    linen, variables = model
    params = variables["params"]

    def fn(p, x):
        return jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]

    one = jq.calibrate(fn, params, X, statistics="channel_mean")
    np.testing.assert_allclose(
        one["up/kernel"]["channel_mean"], np.abs(X).mean(0), rtol=1e-6
    )
    net = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    two = jq.calibrate(net, calibration=[X, 3 * X])
    np.testing.assert_allclose(two["kernel"]["absmax"], 3 * np.abs(X).max())


def test_a_batch_over_eight_devices(model):
    linen, variables = model
    mesh = Mesh(np.array(jax.devices()), ("d",))
    batches = [jax.device_put(b, NamedSharding(mesh, P("d"))) for b in (X, X / 2)]
    rules = ["absmax", "hessian", "channel_mean", "reservoir", "moving_minmax"]
    # The state moves to the mesh with the first batch, so its first buffers cannot be reused.
    with jax.default_device(jax.devices()[0]):
        found = jq.calibrate(linen, variables, calibration=batches, statistics=rules)
    plain = jq.calibrate(linen, variables, calibration=[X, X / 2], statistics=rules)
    for path, values in plain.items():
        for name, value in values.items():
            np.testing.assert_allclose(found[path][name], value, rtol=1e-5, atol=1e-5)


def test_an_explicit_mesh():
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    w = jax.random.normal(jax.random.key(2), (16, 4))
    rules = ["channel_mean", "hessian", "reservoir", "moving_minmax"]
    plain = jq.calibrate(fn, {"w": w}, X, statistics=rules)["w"]
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, NamedSharding(mesh, P(None, "t")))}
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        found = jq.calibrate(fn, params, x, statistics=rules)["w"]
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


def test_errors(model):
    linen, variables = model
    with pytest.raises(ValueError, match="calibration is empty"):
        jq.calibrate(linen, variables)
    with pytest.raises(ValueError, match="not both"):
        jq.calibrate(linen, variables, X, calibration=[X])
    for value in (jnp.nan, jnp.inf):
        for statistic in ("absmax", "percentile", "reservoir", "hessian"):
            with pytest.raises(ValueError, match="1 of the values that are multiplied with 'up/ke"):
                jq.calibrate(
                    linen, variables, X.at[3, 2].set(value), statistics={"up/*": statistic}
                )
    with pytest.raises(ValueError, match="'\\*\\*/bias' matches no weight operation"):
        jq.calibrate(linen, variables, X, statistics={"**/bias": "absmax"})
    with pytest.raises(ValueError, match="'\\*\\*/bias' matches no weight operation"):
        jq.explain(linen, variables, X, observers={"**/bias": "absmax"})
    q = jq.ptq(jq.quantize("w8a16")(linen), variables, X)
    with pytest.raises(ValueError, match="quantized already"):
        jq.calibrate(linen, q, X)

    def scores(p, x):
        h = x @ p["w"]
        return jax.nn.softmax(h @ h.T) @ h

    rule = jq.Observe("**", "channel_absmax", op="weightless")
    with pytest.raises(ValueError, match="has shape .* in this batch and"):
        jq.calibrate(scores, {"w": jnp.eye(16)}, calibration=[X, X[:3]], statistics=rule)


def test_a_bad_layer_is_named():
    def fn(p, x):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]

    params = {"w": jnp.stack([jnp.eye(16), jnp.full((16, 16), 1e38), jnp.eye(16)])}
    with pytest.raises(ValueError, match="multiplied with 'w' are not finite, first in layer 2"):
        jq.calibrate(fn, params, 1e3 + 0 * X)


def test_batches_that_do_not_reach_an_operation(model):
    def fn(p, x, deep=True):
        x = x @ p["a"]
        return x @ p["b"] if deep else x

    params = {"a": jnp.eye(16), "b": jnp.eye(16)}
    found = jq.calibrate(fn, params, calibration=[{"x": X, "deep": False}, (2 * X,), (X,)])
    np.testing.assert_allclose(found["a"]["absmax"], 2 * np.abs(X).max())
    np.testing.assert_allclose(found["b"]["absmax"], 2 * np.abs(X).max())
