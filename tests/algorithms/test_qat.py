"""`jq.qat` on Linen, NNX and functions: what ptq gives, training that helps, learned steps."""

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
from jaxquant.core.qtensor import is_qtensor
from jaxquant.models import shipped

X = jax.random.normal(jax.random.key(0), (64, 16))
Y = jnp.sin(X @ jax.random.normal(jax.random.key(1), (16, 4)))
W2 = jq.Recipe("w2", (jq.Rule(weight=jq.WeightScheme("int2", granularity="channel")),))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(32, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(4, name="down")(x)


@pytest.fixture(scope="module")
def trained():
    return shipped.load(), shipped.held_out(2, 32)["english"][0]


# With a scale a channel the sums are of integers and the same bit by bit; else they are rounded.
@pytest.mark.parametrize(
    ("recipe", "limit"),
    [("w8a8", 0), ("w4a8", 0), ("w4a4", 1e-4), ("w4a16_g64", 1e-4)],
)
def test_the_trained_model_computes_what_ptq_gives(trained, recipe, limit):
    (model, variables), tokens = trained
    decorated = jq.quantize(recipe)(model)
    q = jq.ptq(decorated, variables, tokens)
    expected = jax.jit(decorated.apply)(q, tokens)
    out = jax.jit(jq.qat(decorated).apply)(variables, tokens)
    np.testing.assert_allclose(out, expected, rtol=0, atol=limit)
    assert np.abs(out - jax.jit(model.apply)(variables, tokens)).max() > 0.1  # it is quantized


def fit(loss, params, steps=60, rate=0.05):
    """Gradient descent with momentum; the loss at the end."""
    step = jax.jit(jax.grad(loss))
    speed = jax.tree.map(jnp.zeros_like, params)
    for _ in range(steps):
        speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, step(params))
        params = jax.tree.map(lambda p, v: p - rate * v, params, speed)
    return params


def mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]


PARAMS = {
    "a": jax.random.normal(jax.random.key(2), (16, 32)) / 4,
    "b": jnp.zeros(32),
    "c": jax.random.normal(jax.random.key(3), (32, 4)) / 6,
}


@pytest.fixture(scope="module")
def fitted():
    return fit(lambda p: jnp.mean((mlp(p, X) - Y) ** 2), PARAMS)


def loss_of(recipe, params, **kwargs):
    model = jq.quantize(recipe)(mlp)
    return float(jnp.mean((model(jq.ptq(model, params, X, **kwargs), X) - Y) ** 2))


def test_training_lowers_the_loss_of_the_quantized_model(fitted):
    fake = jq.qat(mlp, W2)
    tuned = fit(lambda p: jnp.mean((fake(p, X) - Y) ** 2), fitted, rate=0.02)
    before, after = loss_of(W2, fitted), loss_of(W2, tuned)
    assert after < 0.65 * before
    # What was trained is what ptq gives: the loss of the fake-quantized model is that of ptq's.
    np.testing.assert_allclose(after, jnp.mean((fake(tuned, X) - Y) ** 2), rtol=1e-5)


def test_learned_steps(fitted):
    recipe = jq.Recipe("w2", (jq.Rule(weight=jq.WeightScheme("int2", granularity="channel"),
                                      act=jq.ActScheme("int8", mode="static")),))  # fmt: skip
    fake = jq.qat(mlp, recipe)
    steps = fake.init_steps(fitted, calibration=[X])
    assert {p: {n: s.shape for n, s in own.items()} for p, own in steps.items()} == {
        "a": {"weight": (1, 32), "input": (1, 1)}, "c": {"weight": (1, 4), "input": (1, 1)}
    }  # fmt: skip
    model = jq.quantize(recipe)(mlp)
    q = jq.ptq(model, fitted, calibration=[X])
    np.testing.assert_allclose(fake(fitted, X, steps=steps), model(q, X), rtol=1e-4, atol=1e-5)

    def loss(both):
        return jnp.mean((fake(both[0], X, steps=both[1]) - Y) ** 2)

    tuned, learned = fit(loss, (fitted, steps), rate=0.02)
    assert np.abs(learned["a"]["weight"] / steps["a"]["weight"] - 1).max() > 0.01
    assert learned["c"]["input"] != steps["c"]["input"]
    after = jq.ptq(model, tuned, X, steps=learned)
    np.testing.assert_array_equal(after["a"].scale, learned["a"]["weight"])
    np.testing.assert_array_equal(after["c"].input_scale, learned["c"]["input"])
    np.testing.assert_allclose(model(after, X), fake(tuned, X, steps=learned), rtol=1e-4, atol=1e-5)
    error = float(jnp.mean((model(after, X) - Y) ** 2))
    assert error < 0.5 * float(jnp.mean((model(q, X) - Y) ** 2))


def test_the_gradient_of_a_step_is_that_of_lsq():
    w = jax.random.normal(jax.random.key(4), (16, 4))
    fake = jq.qat(lambda p, x: x @ p["w"], jq.Recipe(
        "w4", (jq.Rule(weight=jq.WeightScheme("int4", granularity="channel")),)))  # fmt: skip
    steps = {"w": {"weight": jnp.full((1, 4), 0.2)}}
    grad = jax.grad(lambda s: fake({"w": w}, X, steps=s).sum())(steps)["w"]["weight"]
    y = np.asarray(w, np.float64) / 0.2
    inside = np.abs(y) <= 7.5
    slope = np.where(inside, np.clip(np.round(y), -7, 7) - y, np.sign(y) * 7)
    by_weight = np.asarray(X, np.float64).sum(0)[:, None] * slope
    np.testing.assert_allclose(grad[0], by_weight.sum(0) / np.sqrt(16 * 7), rtol=1e-3, atol=1e-4)
    assert not inside.all()


def test_linen_with_state_and_random_numbers():
    model = jq.quantize("w8a8")(Model())
    variables = model.init(jax.random.key(1), X)
    fake = jq.qat(model)
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(7)}}
    q = jq.ptq(model, variables, X)
    out, new = jax.jit(lambda v: fake.apply(v, X, **options))(variables)
    expected, state = model.apply(q, X, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        new["batch_stats"]["norm"]["mean"], state["batch_stats"]["norm"]["mean"], rtol=1e-4,
        atol=1e-5,
    )  # fmt: skip
    grad = jax.grad(lambda v: (fake.apply({**variables, "params": v}, X) ** 2).sum())(
        variables["params"]
    )
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grad))
    np.testing.assert_array_equal(model.apply(variables, X), Model().apply(variables, X))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(32, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


@pytest.mark.parametrize("jit", [False, True])
def test_nnx_in_its_own_training_step(jit):
    net = Net(nnx.Rngs(0))
    before = np.asarray(net.norm.mean[...])

    def step(net):
        def loss(net):
            return jnp.mean((jq.qat(net, "w8a8")(X) - Y) ** 2)

        return nnx.value_and_grad(loss)(net)

    count = int(net.drop.rngs.count[...])
    value, grads = (nnx.jit(step) if jit else step)(net)
    assert np.isfinite(value)
    assert np.abs(grads["up"]["kernel"][...]).max() > 0
    assert not np.allclose(net.norm.mean[...], before)  # the statistics were updated
    assert int(net.drop.rngs.count[...]) == count + 1
    assert type(net) is Net
    net.eval()
    q = jq.ptq(jq.quantize("w8a8")(net), X)
    np.testing.assert_allclose(jq.qat(net, "w8a8")(X), q(X), rtol=1e-4, atol=1e-5)


def test_eight_devices(fitted):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "t"))
    fake = jq.qat(mlp, "w4a8")
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    params = {
        "a": place(fitted["a"], None, "t"), "b": place(fitted["b"], "t"),
        "c": place(fitted["c"], "t"),
    }  # fmt: skip
    loss = jax.jit(jax.value_and_grad(lambda p, x: jnp.mean(fake(p, x) ** 2)))
    value, grads = loss(params, place(X, "d"))
    expected, plain = loss(fitted, X)
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    for name, grad in plain.items():
        np.testing.assert_allclose(grads[name], grad, rtol=0.02, atol=1e-3)
    assert grads["a"].sharding.is_equivalent_to(params["a"].sharding, 2)


def test_an_explicit_mesh():
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    w = jax.random.normal(jax.random.key(5), (16, 32))
    fake = jq.qat(lambda p, x: x @ p["w"], "w8a8")
    expected = fake({"w": w}, X)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, NamedSharding(mesh, P(None, "t")))}
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        out = jax.jit(fake)(params, x)
        grad = jax.jit(jax.grad(lambda p: fake(p, x).sum()))(params)["w"]
    assert out.sharding.spec == P("d", "t")
    assert grad.sharding.spec == P(None, "t")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_attention_products_follow_a_rule_that_names_them():
    recipe = jq.get_recipe("w8a8").with_rules(jq.Rule(op="attention", act=jq.ActScheme("int8")))
    model = jq.quantize(recipe)(nn.MultiHeadDotProductAttention(num_heads=2))
    x = X[:12].reshape(2, 6, 16)
    variables = model.init(jax.random.key(0), x)
    out = jq.qat(model).apply(variables, x)
    q = jq.ptq(model, variables, x)
    np.testing.assert_allclose(out, model.apply(q, x), rtol=1e-5, atol=1e-5)
    assert np.abs(out - jq.qat(model, "w8a8").apply(variables, x)).max() > 1e-4


def test_joined_weights_have_static_input_scales_of_their_own():
    def fn(p, x):
        return jnp.einsum("mk,ikn->imn", x, jnp.stack([p["a"], p["b"]])) + 0 * ((3 * x) @ p["a"])

    params = {n: jax.random.normal(jax.random.key(i), (16, 6)) for i, n in enumerate("ab")}
    model = jq.quantize("w8a8_static")(fn)
    q = jq.ptq(model, params, calibration=[X])
    assert q["a"].input_scale != q["b"].input_scale
    fake = jq.qat(model)
    steps = fake.init_steps(params, calibration=[X], learned=False)
    assert [list(own) for own in steps.values()] == [["input"], ["input"]]
    out = fake(params, X, steps=steps)
    np.testing.assert_allclose(out, model(q, X), rtol=1e-5, atol=1e-5)


def test_no_cache_is_poisoned(fitted):
    """One jitted function meets the float model, the fake-quantized one and the quantized one."""
    model = jq.quantize("w8a8")(mlp)
    fake, q = jq.qat(model), jq.ptq(model, fitted, X)
    plain, faked = jax.jit(model), jax.jit(fake)
    first = plain(fitted, X), faked(fitted, X), plain(q, X)
    again = plain(fitted, X), faked(fitted, X), plain(q, X)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(first[0], mlp(fitted, X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first[1], first[2], rtol=1e-5, atol=1e-5)
    assert np.abs(first[0] - first[1]).max() > 1e-4


def test_errors(fitted):
    fake = jq.qat(mlp, "w8a8")
    model = jq.quantize("w8a8")(mlp)
    q = jq.ptq(model, fitted, X)
    assert any(map(is_qtensor, q.values()))
    with pytest.raises(ValueError, match="quantized already: call the model itself"):
        fake(q, X)
    with pytest.raises(TypeError, match="no Linen module"):
        fake.apply(fitted, X)
    linen = jq.qat(Model())
    with pytest.raises(TypeError, match="use qmodel.apply"):
        linen({}, X)
    with pytest.raises(ValueError, match=r"static .*; calibrate first: steps = "):
        jq.qat(mlp, "w8a8_static")(fitted, X)
    with pytest.raises(ValueError, match="calibration is empty"):
        jq.qat(mlp, "w8a8_static").init_steps(fitted, X)
    double = jq.Recipe("dq", (jq.Rule(weight=jq.WeightScheme("int4", symmetric=False)),))
    with pytest.raises(ValueError, match="'a': a step size is learned for symmetric schemes"):
        jq.qat(mlp, double).init_steps(fitted, X)
    with pytest.raises(ValueError, match="steps: 'b' is not quantized"):
        jq.ptq(model, fitted, X, steps={"b": {"weight": X}})
