"""Transforms that a recipe names: what ptq does, what explain says of it, and what a file keeps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.algorithms.transforms.apply import transform_model
from jaxquant.core.recipe import Recipe
from jaxquant.models import linen as linen_model
from jaxquant.passes.count import count
from jaxquant.passes.fold_transforms import FoldError
from tests.passes.fold_zoo import DECODER, Encoder, gated_decoder, gated_params

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)
W8A8 = jq.get_recipe("w8a8")
SMOOTH = W8A8.with_transforms(jq.Smooth(unfoldable="multiply"))
ROTATE = W8A8.with_transforms(jq.Rotate(unfoldable="multiply"))
BOTH = W8A8.with_transforms(jq.Smooth(unfoldable="multiply"), jq.Rotate(unfoldable="multiply"))


def mlp(p, x):
    """Layers that nothing can be folded into: two readers of one input, then one behind a gelu."""

    def layer(x, p):
        y = jax.nn.gelu(x @ p["a"]) * jax.nn.gelu(x @ p["b"])
        return jnp.tanh(x + y @ p["c"]), None

    return jax.lax.scan(layer, x, p)[0]


def mlp_params(layers=3, d=8, f=24, seed=0):
    shapes = {"a": (layers, d, f), "b": (layers, d, f), "c": (layers, f, d)}
    keys = jax.random.split(jax.random.key(seed), 3)
    return {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def inputs(rows=5, d=8, seed=3, outlier=8.0):
    """Rows in which one channel is large."""
    x = jax.random.normal(jax.random.key(seed), (rows, d))
    return x.at[:, 2].mul(outlier)


def quantized(recipe, fn=mlp, params=None, x=None, **options):
    x = inputs() if x is None else x
    model = jq.quantize(recipe)(fn)
    return model, jq.ptq(model, params or mlp_params(), calibration=[x], progress=False, **options)


def error(model, tree, fn, params, x):
    return float(jnp.abs(model(tree, x) - fn(params, x)).mean())


# --- folded --------------------------------------------------------------------------------------


def test_a_recipe_that_smooths_is_smooth_and_then_ptq():
    model = linen_model.Decoder(DECODER)
    variables = model.init(jax.random.key(0), TOKENS)
    plain = jq.quantize("w8a8")(model)
    one = jq.ptq(plain, variables, calibration=[TOKENS], recipe="w8a8_smooth", progress=False)
    smoothed = jq.smooth(model, variables, calibration=[TOKENS])
    two = jq.ptq(plain, smoothed, TOKENS, progress=False)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    untouched = jq.ptq(plain, variables, TOKENS, progress=False)
    gain = lambda tree: tree["params"]["layers"]["mlp_norm"]["scale"]  # noqa: E731
    assert np.abs(gain(one) / gain(untouched) - 1).max() > 0.05


def test_a_rotation_by_parameters_is_rotate_and_then_ptq():
    params = gated_params()
    recipe = W8A8.with_transforms(jq.Rotate())
    _, one = quantized(recipe, gated_decoder, params, TOKENS)
    model = jq.quantize("w8a8")(gated_decoder)
    two = jq.ptq(model, jq.rotate(gated_decoder, params, TOKENS), TOKENS, progress=False)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(one[name].input_turn is None for name in "abcdwz")


# --- explicit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [SMOOTH, ROTATE, BOTH], ids=["smooth", "rotate", "both"])
def test_what_cannot_be_folded_is_stored_with_the_weight(recipe, tmp_path):
    params, x = mlp_params(), inputs()
    model, tree = quantized(recipe, params=params)
    plain, baseline = quantized(W8A8, params=params)
    for name in "abc":
        w = tree[name]
        assert w.input_factor.shape == (3 if recipe is not ROTATE else 1, params[name].shape[1], 1)
        assert (w.input_turn is not None) == (recipe is not SMOOTH)
        assert w.scale.shape == baseline[name].scale.shape
    other = inputs(seed=7)
    before = error(plain, baseline, mlp, params, other)
    assert error(model, tree, mlp, params, other) < 0.9 * before
    # what it stands for is the weight, and the float function on that is the quantized one's
    floats = jq.dequantize(tree)
    for name in "abc":
        np.testing.assert_allclose(floats[name], params[name], atol=0.1)
    a16 = without_act(tree)
    np.testing.assert_allclose(model(a16, x), mlp(floats, x), rtol=1e-4, atol=1e-5)
    # a file keeps it: no template, no recipe, no data
    jq.save(tmp_path / "q", tree, recipe=recipe)
    restored = jq.restore(tmp_path / "q")
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    np.testing.assert_array_equal(jq.quantize()(mlp)(restored, x), model(tree, x))
    assert jq.inspect(tmp_path / "q").recipe == recipe


@pytest.mark.parametrize("recipe", [SMOOTH, BOTH], ids=["smooth", "both"])
def test_it_runs_under_every_transformation(recipe):
    params, x = mlp_params(), inputs()
    model, tree = quantized(recipe, params=params)
    want = model(tree, x)
    np.testing.assert_allclose(jax.jit(model)(tree, x), want, rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(model, (None, 0))(tree, x[:, None])
    np.testing.assert_allclose(mapped[:, 0], want, rtol=1e-4, atol=1e-4)
    # weights with a leading axis of their own are mapped too
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), tree)
    both = jax.vmap(model)(stacked, jnp.stack([x, x]))
    np.testing.assert_allclose(both[1], want, rtol=1e-4, atol=1e-4)
    floats = jq.dequantize(tree)
    a16 = without_act(tree)
    got = jax.grad(lambda x: model(a16, x).sum())(x)
    np.testing.assert_allclose(
        got, jax.grad(lambda x: mlp(floats, x).sum())(x), rtol=1e-3, atol=1e-5
    )
    rematerialised = jax.grad(lambda x: jax.checkpoint(model)(a16, x).sum())(x)
    np.testing.assert_allclose(rematerialised, got, rtol=1e-4, atol=1e-6)


def without_act(tree):
    return {name: w.replace(act=None) for name, w in tree.items()}


@pytest.mark.parametrize("split", [1, 2])
def test_it_runs_sharded(split):
    params, x = mlp_params(), inputs()
    model, tree = quantized(BOTH, params=params)
    want = model(without_act(tree), x)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"a": [None] * 3, "b": [None] * 3, "c": [None] * 3}
    specs["a"][split] = specs["b"][split] = specs["c"][3 - split] = "d"
    placed = {
        name: jax.device_put(params[name], NamedSharding(mesh, PartitionSpec(*specs[name])))
        for name in "abc"
    }
    again = jq.ptq(model, placed, calibration=[x], progress=False)
    assert again["a"].codes.sharding.spec == PartitionSpec(*specs["a"])
    got = jax.jit(model)(jq.with_shardings(without_act(again)), x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_it_runs_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    params, x = {"w": mlp_params(layers=1)["a"][0]}, inputs(rows=4)

    def columns(p, x):
        return jax.nn.gelu(x @ p["w"])

    def rows(p, x):
        out = NamedSharding(mesh, PartitionSpec("d", None))
        return jnp.dot(x, p["w"], out_sharding=out)

    for fn, x_spec, spec in (
        (columns, ("d", None), (None, None)),
        (rows, (None, "d"), ("d", None)),
    ):
        for recipe in (SMOOTH, BOTH):
            _, tree = quantized(recipe, columns, params, x)
            tree = without_act(tree)
            with jax.set_mesh(mesh):
                w = jax.tree.map(lambda a: jax.device_put(a, PartitionSpec(None, None)), tree)
                w = {"w": jax.tree.map(
                    lambda a, s=spec: jax.sharding.reshard(
                        a, PartitionSpec(*(n if a.shape[i] > 1 else None for i, n in enumerate(s)))
                    ), w["w"],
                )}  # fmt: skip
                placed = jax.device_put(x, PartitionSpec(*x_spec))
                got = jq.transform(fn)(w, placed)
            want = x @ tree["w"].dequantize()
            want = jax.nn.gelu(want) if fn is columns else want
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_inside_shard_map_factors_are_split_with_the_weight():
    params, x = mlp_params(layers=1), inputs(rows=4)

    def local(p, x):
        hidden = jax.nn.gelu(x @ p["a"][0]) * jax.nn.gelu(x @ p["b"][0])
        return jax.lax.psum(hidden @ p["c"][0], "d")

    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    parts = {
        "a": PartitionSpec(None, None, "d"), "b": PartitionSpec(None, None, "d"),
        "c": PartitionSpec(None, "d", None),
    }  # fmt: skip
    split = jax.shard_map(
        local, mesh=mesh, in_specs=(parts, PartitionSpec()), out_specs=PartitionSpec()
    )

    def whole(p, x):
        return (jax.nn.gelu(x @ p["a"][0]) * jax.nn.gelu(x @ p["b"][0])) @ p["c"][0]

    for recipe in (SMOOTH, BOTH):  # a turned axis of which each device has a part: dequantized
        _, tree = quantized(recipe, whole, params, x)
        want = whole(jq.dequantize(tree), x)
        a16 = jax.device_put(without_act(tree), NamedSharding(mesh, PartitionSpec()))
        np.testing.assert_allclose(jax.jit(jq.transform(split))(a16, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [SMOOTH, ROTATE], ids=["smooth", "rotate"])
def test_readers_of_one_input_transform_and_quantize_it_once(recipe):
    model, tree = quantized(recipe)
    assert tree["a"].input_group is not None
    assert tree["a"].input_group == tree["b"].input_group
    compiled = jq.compile(model, tree, inputs())
    counts = count(compiled.jaxpr)
    assert counts.quantizations == 2 * 3  # in each of three layers for a and b together, and for c
    assert counts.primitives["quantized_dots"] == counts.primitives["quantized_dot_general"] == 3


def test_static_ranges_are_those_of_the_transformed_input():
    recipe = jq.get_recipe("w8a8_static").with_transforms(jq.Smooth(unfoldable="multiply"))
    params, x = mlp_params(layers=1), inputs()
    _, tree = quantized(recipe, params=params)
    factor = np.asarray(tree["a"].input_factor[0, :, 0])
    want = np.abs(np.asarray(x) * factor).max() / 127
    np.testing.assert_allclose(tree["a"].input_scale.ravel(), [want], rtol=1e-5)
    np.testing.assert_array_equal(tree["a"].input_scale, tree["b"].input_scale)


def test_convolutions_and_experts_keep_factors_too():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(6, (3,), name="second")(nn.gelu(nn.Conv(8, (3,), name="first")(x)))

    x = jax.random.normal(jax.random.key(4), (2, 12, 4))
    x = x.at[..., 1].mul(10)
    variables = Net().init(jax.random.key(0), x)
    recipe = Recipe(
        "w8a8 conv", (jq.Rule(op="conv", weight=jq.WeightScheme(), act=jq.ActScheme()),)
    )
    errors = []
    for each in (recipe, recipe.with_transforms(jq.Smooth(unfoldable="multiply"))):
        model = jq.quantize(each)(Net())
        tree = jq.ptq(model, variables, calibration=[x], progress=False)
        errors.append(float(jnp.abs(model.apply(tree, x) - Net().apply(variables, x)).mean()))
    assert tree["params"]["first"]["kernel"].input_factor.shape == (1, 4, 1)
    assert errors[1] < 0.8 * errors[0]

    def experts(p, x):
        return jax.lax.ragged_dot(x, p["w"], jnp.array([2, 3], jnp.int32))

    params, x = {"w": jax.random.normal(jax.random.key(5), (2, 8, 6))}, inputs()
    rule = jq.Rule(op="ragged_dot", weight=jq.WeightScheme(), act=jq.ActScheme())
    recipe = Recipe("experts", (rule,))
    plain = error(*quantized(recipe, experts, params, x), experts, params, x)
    recipe = recipe.with_transforms(jq.Smooth(unfoldable="multiply"))
    model, tree = quantized(recipe, experts, params, x)
    assert tree["w"].input_factor.shape == (1, 8, 1)
    assert error(model, tree, experts, params, x) < 0.8 * plain


# --- what is said --------------------------------------------------------------------------------


def rows(recipe, model, *args):
    plan = jq.explain(model, *args, recipe=recipe)
    return {row.weights: row for row in plan.transforms}, plan


def test_explain_says_what_becomes_of_every_input():
    x = jax.random.normal(jax.random.key(2), (2, 3, 16))
    variables = jax.eval_shape(Encoder().init, jax.random.key(0), x)
    found, plan = rows(SMOOTH, Encoder(), variables, x)
    qkv = tuple(f"mix/{name}/kernel" for name in ("query", "key", "value"))
    assert {weights: row.status for weights, row in found.items()} == {
        qkv: "folded", ("mix/out/kernel",): "folded", ("wide/kernel",): "folded",
        ("narrow/kernel",): "multiply", ("wide_relu/kernel",): "folded",
        ("narrow_relu/kernel",): "folded", ("head/kernel",): "folded",
    }  # fmt: skip
    assert found[qkv].into == ("n1/bias", "n1/scale")
    assert "powers 1 and 3 of a factor" in found[("narrow/kernel",)].reason  # of the gelu
    text = str(plan)
    assert "folded into n1/bias, n1/scale" in text
    assert "multiplied by stored factors first" in text
    assert json.loads(json.dumps(plan.to_json()))["transforms"][0]["transform"] == "smooth"
    left, _ = rows(W8A8.with_transforms(jq.Smooth()), Encoder(), variables, x)
    assert left[("narrow/kernel",)].status == "left"


def test_what_is_refused_is_said_by_explain_and_raised_by_ptq():
    recipe = W8A8.with_transforms(jq.Smooth(unfoldable="refuse"))
    found, _ = rows(recipe, mlp, mlp_params(), inputs())
    assert {row.status for row in found.values()} == {"refused"}
    with pytest.raises(FoldError, match=r"smooth of recipe 'w8a8\+smooth'.*\n.*a, b: "):
        quantized(recipe)
    recipe = W8A8.with_transforms(jq.Rotate(unfoldable="refuse"))
    with pytest.raises(FoldError, match=r"rotate of recipe 'w8a8\+rotate'"):
        quantized(recipe)


@pytest.mark.parametrize("recipe", [SMOOTH, ROTATE], ids=["smooth", "rotate"])
def test_a_rule_leaves_an_input_as_it_is(recipe):
    keep = jq.Rule("c", weight=jq.WeightScheme(), act=jq.ActScheme(), transforms=False)
    own = recipe.with_rules(keep)
    found, _ = rows(own, mlp, mlp_params(), inputs())
    assert found[("c",)].status == "left"
    assert "transforms=False" in found[("c",)].reason
    _, tree = quantized(own)
    assert tree["c"].input_factor is None and tree["c"].input_turn is None
    assert tree["a"].input_factor is not None
    # nor is a weight changed that a fold would reach
    keep = jq.Rule("d", weight=jq.WeightScheme(), act=jq.ActScheme(), transforms=False)
    folds = W8A8.with_transforms(jq.Smooth(), jq.Rotate()).with_rules(keep)
    _, tree = quantized(folds, gated_decoder, gated_params(), TOKENS)
    _, plain = quantized(W8A8, gated_decoder, gated_params(), TOKENS)
    np.testing.assert_array_equal(tree["d"].codes, plain["d"].codes)
    assert not np.array_equal(tree["w"].codes, plain["w"].codes)
    keep = jq.Rule("c", weight=jq.WeightScheme(), act=jq.ActScheme(), transforms=False)
    own = W8A8.with_transforms(jq.Smooth()).with_rules(keep)
    found, _ = rows(own, gated_decoder, gated_params(), TOKENS)
    assert found[("d",)].reason == "a rule with transforms=False names c"  # which would be divided


def test_what_is_inside_shard_map_is_left_and_said():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    spec = PartitionSpec

    def fn(p, x):
        inner = jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(spec(None, "d"), spec()),
            out_specs=spec(None, "d"),
        )  # fmt: skip
        return inner(p["b"], x @ p["a"])

    params, x = {"a": jnp.eye(8), "b": jnp.ones((8, 4))}, inputs()
    for recipe in (SMOOTH, ROTATE):
        found, _ = rows(recipe, fn, params, x)
        assert found[("b",)].status == "left"
        assert "inside shard_map, where each device has a part" in found[("b",)].reason
    assert "b: not looked at: it is read inside shard_map" in str(jq.explain_folds(fn, params, x))


def test_a_weight_that_stays_float_keeps_no_factors():
    own = SMOOTH.with_rules(jq.Rule("b", skip=True))
    found, _ = rows(own, mlp, mlp_params(), inputs())
    assert found[("a", "b")].status == "left"
    assert "b stays float" in found[("a", "b")].reason
    _, tree = quantized(own)
    assert tree["a"].input_factor is None and tree["c"].input_factor is not None


def test_shapes_give_shapes():
    shapes = jax.eval_shape(lambda: mlp_params())
    model = jq.quantize(BOTH)(mlp)
    abstract = jq.ptq(model, shapes, inputs(), progress=False)
    _, real = quantized(BOTH)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or 1 / 0, abstract, real)


def test_missing_and_bad_input_is_named():
    with pytest.raises(ValueError, match="needs statistics of activations.*calibration="):
        jq.ptq(jq.quantize(SMOOTH)(mlp), mlp_params(), inputs(), progress=False)
    shape = jax.ShapeDtypeStruct((5, 8), jnp.float32)
    with pytest.raises(ValueError, match="checked on data"):
        jq.ptq(jq.quantize(ROTATE)(mlp), mlp_params(), shape, progress=False)
    with pytest.raises(ValueError, match=r"qat takes the weights as they are.*smooth"):
        jq.qat(mlp, SMOOTH)(mlp_params(), inputs())
    with pytest.raises(ValueError, match="alpha=2 must be between"):
        jq.Smooth(alpha=2)
    with pytest.raises(ValueError, match=r"unfoldable='skip' must be one of"):
        jq.Rotate(unfoldable="skip")
    with pytest.raises(ValueError, match="nothing is left to rotate"):
        jq.Rotate(stream=False, heads=False)
    with pytest.raises(TypeError, match=r"transforms\[0\]= takes Smooth or Rotate"):
        Recipe("x", (), ("smooth",))
    with pytest.raises(ValueError, match="transform's kind is one of"):
        Recipe.from_json({"name": "x", "rules": [], "transforms": [{"kind": "turn"}]})


@pytest.mark.parametrize("recipe", [SMOOTH, BOTH, jq.get_recipe("w8a8_rotated")])
def test_recipes_with_transforms_go_through_json(recipe):
    assert Recipe.from_json(json.dumps(recipe.to_json())) == recipe
    assert recipe.with_transforms(name="w8a8") == W8A8
    old = {k: v for k, v in W8A8.to_json().items() if k != "transforms"}
    assert Recipe.from_json(old) == W8A8


def test_a_recipe_without_transforms_reads_no_batch():
    def never():
        raise AssertionError
        yield

    x, params = inputs(), mlp_params()
    program_and = jq.explain(mlp, params, x, recipe="w8a8")
    assert program_and.transforms == ()
    from jaxquant.algorithms.planning import assign

    _, assignment = assign(mlp, params, ["a", "b", "c"], ((x,), {}), W8A8)
    done = transform_model(mlp, params, ["a", "b", "c"], ((x,), {}), assignment, never())
    assert done.tree is params and done.fn is mlp and not done.rows
