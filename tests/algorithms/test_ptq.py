"""`ptq` on Linen, NNX and functions: values, stacked layers, shards, dry runs, calibration."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.core.qtensor import QTensor, is_qtensor
from jaxquant.passes.count import count

X = jax.random.normal(jax.random.key(0), (4, 16))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(32)(nn.RMSNorm()(x))
        return x + nn.Dense(16, use_bias=False)(nn.gelu(h)), None


class Stack(nn.Module):
    layers: int = 3

    @nn.compact
    def __call__(self, x, *, double=False):
        block = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = block(name="layers")(x)
        return 2 * x if double else x


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.b = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.norm(self.a(x))))


def leaves_of(tree):
    return jax.tree.leaves(tree, is_leaf=is_qtensor)


def dequantized(tree):
    return jax.tree.map(lambda x: x.dequantize() if is_qtensor(x) else x, tree, is_leaf=is_qtensor)


@pytest.fixture(scope="module")
def stack():
    model = Stack()
    return model, model.init(jax.random.key(1), X)


def test_stacked_layers_have_their_own_scales(stack):
    model, variables = stack
    q = jq.ptq(jq.quantize("w8a16")(model), variables, X)
    kernel = variables["params"]["layers"]["Dense_0"]["kernel"]
    qkernel = q["params"]["layers"]["Dense_0"]["kernel"]
    assert qkernel.scale.shape == (3, 1, 32)
    expected = jnp.max(jnp.abs(kernel), axis=1, keepdims=True) / 127
    np.testing.assert_allclose(qkernel.scale, expected, rtol=1e-6)
    np.testing.assert_array_equal(qkernel.codes, jnp.round(kernel / expected).astype("int8"))


def test_everything_else_is_the_object_it_was(stack):
    model, variables = stack
    q = jq.ptq(jq.quantize("w4a16_g32")(model), variables, X, recipe="w8a16")
    layers, before = q["params"]["layers"], variables["params"]["layers"]
    assert layers["RMSNorm_0"]["scale"] is before["RMSNorm_0"]["scale"]
    assert layers["Dense_0"]["bias"] is before["Dense_0"]["bias"]
    assert layers["Dense_0"]["kernel"].qtype.name == "int8"  # recipe= beats the decorator's


@pytest.mark.parametrize("recipe", ["w8a8", "w8a16", "w4a16", "w2a16", "fp8", "nf4"])
def test_quantized_model_equals_dequantize_then_float(stack, recipe):
    model, variables = stack
    small = jq.Recipe(
        recipe,
        tuple(
            r if r.weight is None or r.weight.granularity != "group" else _group16(r)
            for r in jq.get_recipe(recipe).rules
        ),
    )
    decorated = jq.quantize(small)(model)
    q = jq.ptq(decorated, variables, X)
    out, expected = decorated.apply(q, X), model.apply(dequantized(q), X)
    quantizes_inputs = any(is_qtensor(w) and w.act is not None for w in leaves_of(q))
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert error < (0.05 if quantizes_inputs else 1e-5)
    assert error > 0 or not quantizes_inputs


def _group16(rule):
    weight = dataclasses.replace(rule.weight, group_size=16)
    return dataclasses.replace(rule, weight=weight)


def test_nnx_returns_a_new_model():
    model = jq.quantize("w8a16")(NnxMlp)(nnx.Rngs(0))
    before = model.a.kernel[...]
    quantized = jq.ptq(model, X)
    assert isinstance(quantized.a.kernel.get_value(), QTensor)
    assert not isinstance(quantized.a.bias.get_value(), QTensor)
    assert model.a.kernel[...] is before
    np.testing.assert_allclose(quantized(X), model(X), atol=0.03)


def test_function():
    @jq.quantize("w8a16")
    def fn(params, x):
        return jnp.einsum("bk,nk->bn", x, params["w"]) + params["b"]

    params = {"w": jax.random.normal(jax.random.key(2), (8, 16)), "b": jnp.ones(8)}
    q = jq.ptq(fn, params, X)
    assert q["w"].scale.shape == (8, 1)
    assert q["b"] is params["b"]
    np.testing.assert_allclose(fn(q, X), fn(dequantized(q), X), rtol=1e-5, atol=1e-5)


def test_shapes_only_tell_sizes(stack):
    model, variables = stack
    decorated = jq.quantize("w4a16_g32")(model)
    recipe = jq.Recipe("g16", tuple(map(_group16, jq.get_recipe("w4a16_g32").rules[-1:])))
    shapes = jax.eval_shape(lambda: variables)
    dry = jq.ptq(decorated, shapes, X, recipe=recipe)
    real = jq.ptq(decorated, variables, X, recipe=recipe)
    assert jax.tree.structure(dry) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(dry), jax.tree.leaves(real), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert [leaf.nbytes for leaf in leaves_of(dry) if is_qtensor(leaf)] == [
        leaf.nbytes for leaf in leaves_of(real) if is_qtensor(leaf)
    ]


@pytest.mark.parametrize("spec", [P(None, "t"), P("t", None), P("t")])
def test_sharded_weights_stay_sharded(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "t"))
    sharding = NamedSharding(mesh, spec)

    @jq.quantize("w8a16")
    def fn(params, x):
        return x @ params["w"]

    w = jax.random.normal(jax.random.key(3), (16, 32))
    plain = jq.ptq(fn, {"w": w}, X)["w"]
    q = jq.ptq(fn, {"w": jax.device_put(w, sharding)}, X)["w"]
    assert q.codes.sharding.is_equivalent_to(sharding, 2)
    assert len(q.scale.sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, q, plain)
    np.testing.assert_allclose(jax.jit(fn)({"w": q}, X), fn({"w": plain}, X), rtol=2e-5, atol=1e-5)
    dry = jq.ptq(fn, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)}, X)["w"]
    for a, b in zip(jax.tree.leaves(dry), jax.tree.leaves(q), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, 2)


def test_static_ranges_from_calibration(stack):
    model, variables = stack
    decorated = jq.quantize("w8a8_static")(model)
    batches = [X, (3 * X,), {"x": X / 2}]
    q = jq.ptq(decorated, variables, calibration=batches)
    first = q["params"]["layers"]["Dense_0"]["kernel"]
    assert first.input_scale.shape == (3, 1, 1)
    assert first.act.mode == "static"
    normed = nn.RMSNorm().apply(
        {"params": {"scale": variables["params"]["layers"]["RMSNorm_0"]["scale"][0]}}, X
    )
    amax = np.max([np.max(np.abs(normed))])  # an RMS norm does not see the factor 3
    np.testing.assert_allclose(first.input_scale[0, 0, 0], amax / 127, rtol=1e-4)
    out, expected = decorated.apply(q, X), model.apply(variables, X)
    assert 0 < np.linalg.norm(out - expected) / np.linalg.norm(expected) < 0.05


def test_keyword_arguments_are_part_of_every_batch(stack):
    model, variables = stack
    decorated = jq.quantize("w8a8_static")(model)
    q = jq.ptq(decorated, variables, calibration=iter([X]), double=True)
    np.testing.assert_array_equal(
        decorated.apply(q, X, double=True), 2 * decorated.apply(q, X, double=False)
    )


def test_a_weight_of_a_loop_over_time_has_one_static_scale():
    @jq.quantize("w8a8_static")
    def fn(params, x):
        def step(c, _):
            return jnp.tanh(c @ params["w"]) * 2, None

        return jax.lax.scan(step, x, None, length=3)[0]

    params = {"w": jnp.eye(16) * 3}
    q = jq.ptq(fn, params, calibration=[X / 100])
    assert q["w"].input_scale.shape == (1, 1)
    c, seen = X / 100, []
    for _ in range(3):
        seen.append(float(jnp.max(jnp.abs(c))))
        c = jnp.tanh(c @ params["w"]) * 2
    np.testing.assert_allclose(q["w"].input_scale[0, 0], max(seen) / 127, rtol=1e-5)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm(name="norm")(x)
        q, k, v = (nn.DenseGeneral((2, 8), use_bias=False, name=n)(h) for n in "qkv")
        mixed = jnp.tanh(q * k) + v
        return x + nn.DenseGeneral(16, axis=(-2, -1), use_bias=False, name="out")(mixed)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(Attention(name="layers"), x, None)[0]


@pytest.mark.parametrize("act_range", ["absmax", "percentile"])
def test_query_key_and_value_have_one_static_scale(act_range, tmp_path):
    """They quantize once and become one equation, also from a checkpoint; the same bits."""
    act = jq.ActScheme(mode="static", range=act_range)
    recipe = jq.Recipe("static", (jq.Rule("**", weight=jq.WeightScheme("int8"), act=act),))
    model = jq.quantize(recipe)(Layers())
    variables = model.init(jax.random.key(0), X)
    q = jq.ptq(model, variables, calibration=[X, X / 3])
    layer = q["params"]["layers"]
    groups = {name: layer[name]["kernel"].input_group for name in (*"qkv", "out")}
    assert groups == dict.fromkeys("qkv", "../../q/kernel") | {"out": None}
    jq.save(tmp_path / "q", q)
    for tree in (q, jq.restore(tmp_path / "q")):
        compiled = jq.compile(model, tree, X)
        counts = count(compiled.jaxpr)
        assert (counts.launches, counts.quantizations) == (3 * 2, 3 * 2)
        assert counts.primitives["quantized_dots"] == 3
        first = jq.compile(model, tree, X, passes=lambda steps: steps[:1])
        assert count(first.jaxpr).quantizations == 3 * 4
        np.testing.assert_array_equal(compiled(tree, X), first(tree, X))
    dry = jq.ptq(model, jax.eval_shape(lambda: variables), X)
    assert jax.tree.structure(dry) == jax.tree.structure(q)


def test_trained_steps_that_differ_are_of_no_group():
    @jq.quantize("w8a8_static")
    def fn(p, x):
        return x @ p["a"], x @ p["b"], x @ p["c"]

    params = {name: jnp.eye(16) for name in "abc"}
    steps = jq.qat(fn).init_steps(params, X, learned=False, calibration=[X])
    steps["a"]["input"] = steps["a"]["input"] * 2
    q = jq.ptq(fn, params, X, steps=steps)
    assert [q[name].input_group for name in "abc"] == [None, "../b", "../b"]


def test_groups_of_two_trees_are_two():
    """Trees that were calibrated apart keep their scales in one program; layers can be stacked."""

    def layer(p, x):
        return jnp.tanh(x @ p["a"]) + x @ p["b"]

    def both(p, q, x):
        return layer(p, x) + layer(q, 100 * x)

    params = {name: jax.random.normal(jax.random.key(k), (16, 16)) for k, name in enumerate("ab")}
    model = jq.quantize("w8a8_static")(layer)
    p, q = (jq.ptq(model, params, c * X, calibration=[c * X]) for c in (1, 100))
    assert p["a"].input_group == p["b"].input_group == "../a"
    want = jax.jit(lambda p, q, x: model(p, x) + model(q, 100 * x))(p, q, X)
    np.testing.assert_allclose(jq.transform(both)(p, q, X), want, rtol=1e-5, atol=1e-4)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), p, q)
    for got, tree in zip(jax.vmap(model, (0, None))(stacked, X), (p, q), strict=True):
        np.testing.assert_allclose(got, model(tree, X), rtol=1e-5, atol=1e-5)
    layers = jq.quantize("w8a8_static")(lambda ps, x: layer(ps[1], layer(ps[0], x)))
    own = jq.ptq(layers, [params, params], X, calibration=[X])
    assert jax.tree.structure(own[0]) == jax.tree.structure(own[1]) == jax.tree.structure(p)


def test_strict_lists_what_would_stay_float():
    @jq.quantize("w8a16")
    def fn(params, x):
        h = x @ params["w"] + jnp.tanh(params["v"]).sum()
        return (h @ params["v"])[:, :2] @ params["tiny"]

    key = jax.random.key(0)
    params = {
        "w": jax.random.normal(key, (16, 16)),
        "v": jax.random.normal(key, (16, 16)),
        "tiny": jnp.ones((2, 2), jnp.bfloat16),  # codes and scales would take more
    }
    with pytest.raises(jq.StrictError, match=r"v .*: dequantized.*(\n.*)*tiny \(\w+\): float"):
        jq.ptq(fn, params, X, strict=True)
    skip = jq.get_recipe("w8a16").with_rules(jq.Rule("v", skip=True), jq.Rule("tiny", skip=True))
    q = jq.ptq(fn, params, X, recipe=skip, strict=True)
    assert [k for k, v in q.items() if is_qtensor(v)] == ["w"]
    assert jq.explain(fn, params, X, recipe=skip, strict=True).totals["ops"]["quantized"] == 1


def test_errors(stack):
    model, variables = stack
    decorated = jq.quantize("w8a8_static")(model)
    with pytest.raises(ValueError, match="calibration is empty"):
        jq.ptq(decorated, variables, X)
    q = jq.ptq(jq.quantize("w8a8")(model), variables, X)
    with pytest.raises(ValueError, match="is a QTensor already"):
        jq.ptq(decorated, q, X)
    with pytest.raises(TypeError, match="not decorated"):
        jq.ptq(model, variables, X)
    with pytest.raises(TypeError, match="calibration batch 1"):
        jq.ptq(decorated, variables, calibration=[X, 3])
    with pytest.raises(TypeError, match=r"calibration is an array .* give \[array\] for one batch"):
        jq.ptq(decorated, variables, calibration=X)
    with pytest.raises(TypeError, match="calibration is a dict"):
        jq.ptq(decorated, variables, calibration={"x": X})
    with pytest.raises(ValueError, match="calibration holds no batch"):
        jq.ptq(decorated, variables, calibration=[])
    with pytest.raises(ValueError, match="quantizes none of the 1 parameters .* first argument"):
        jq.ptq(jq.quantize(lambda x, p: x[0] @ p["w"]), X, {"w": jnp.ones((16, 8))})
    skipped = jq.ptq(decorated, variables, X, recipe=jq.Recipe("none", (jq.Rule(skip=True),)))
    leaves = zip(jax.tree.leaves(skipped), jax.tree.leaves(variables), strict=True)
    assert all(a is b for a, b in leaves)
    with pytest.raises(ValueError, match="not finite"):
        jq.ptq(decorated, variables, calibration=[X.at[0, 0].set(jnp.nan)])
    bad = jax.tree.map(lambda x: x, variables)
    bad["params"]["layers"]["Dense_0"]["kernel"] = (
        bad["params"]["layers"]["Dense_0"]["kernel"].at[0, 0, 0].set(jnp.inf)
    )
    with pytest.raises(ValueError, match="layers/Dense_0/kernel.*1 Inf"):
        jq.ptq(jq.quantize("w8a8")(model), bad, X)


@pytest.mark.parametrize("act_range", ["absmax", "percentile"])
def test_an_input_that_calibration_never_saw_is_said(act_range):
    act = jq.ActScheme(mode="static", range=act_range)
    recipe = jq.Recipe("static", (jq.Rule("**", weight=jq.WeightScheme("int8"), act=act),))

    @jq.quantize(recipe)
    def model(p, x):
        x = x @ p["always"]
        return jax.lax.cond(x[0, 0] > 1e6, lambda x: x @ p["never"], lambda x: x, x)

    p = {name: jax.random.normal(jax.random.key(0), (8, 8)) for name in ("always", "never")}
    x = jax.random.normal(jax.random.key(1), (4, 8))
    with pytest.warns(UserWarning, match=r"in front of 'never': the static scale .* is 1\.0"):
        q = jq.ptq(model, p, x, calibration=[x], progress=False)
    assert q["never"].input_scale == 1 and 0 < q["always"].input_scale < 0.1
