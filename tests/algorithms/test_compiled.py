"""`jq.compile`: what it returns, what it caches, what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxquant as jq


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0):
        return nn.Dense(8, name="out")(jnp.tanh(nn.Dense(32, name="up")(x))) * scale


X = jax.random.normal(jax.random.key(0), (4, 16))


@pytest.fixture(scope="module")
def linen():
    model = jq.quantize("w4a16_g32")(Net())
    recipe = jq.get_recipe("w4a16_g32").with_rules(
        jq.Rule("up/**", weight=jq.WeightScheme("int4", group_size=8))
    )
    variables = model.init(jax.random.key(1), X)
    return model, variables, jq.ptq(model, variables, X, recipe=recipe)


def test_it_computes_what_the_model_computes(linen):
    model, _, qvars = linen
    compiled = jq.compile(model, qvars, X)
    expected = model.apply(qvars, X)
    np.testing.assert_array_equal(compiled(qvars, X), expected)
    np.testing.assert_array_equal(jax.jit(compiled)(qvars, X), expected)
    np.testing.assert_allclose(jax.vmap(lambda x: compiled(qvars, x))(X), expected, atol=1e-5)


def test_float_leaves_give_the_float_model(linen):
    model, variables, _ = linen
    compiled = jq.compile(model, variables, X)
    np.testing.assert_array_equal(compiled(variables, X), jax.jit(model.apply)(variables, X))
    assert "quantized" not in str(compiled.jaxpr)


def test_equal_signatures_never_trace_again():
    traces = []

    def fn(p, x, twice=False):
        traces.append(1)
        return (x + x if twice else x) @ p["w"]

    q = jq.ptq(jq.quantize("w8a16")(fn), {"w": jnp.ones((16, 4))}, X)
    traces.clear()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (q, X))
    compiled = jq.compile(fn, *shapes)
    for _ in range(3):
        compiled(q, X)
        jax.jit(compiled)(q, X)
    assert len(traces) == 1
    compiled(q, X[:2])
    np.testing.assert_allclose(compiled(q, X, twice=True), 2 * compiled(q, X), rtol=1e-6)
    assert len(traces) == 3
    compiled(q, X[:2])
    compiled(q, X, twice=True)
    assert len(traces) == 3


def test_plan_jaxpr_lower_and_records(linen):
    model, _, qvars = linen
    compiled = jq.compile(model, qvars, X)
    rows = {row.param: row for row in compiled.plan.rows if row.kind == "dense"}
    up, out = rows["up/kernel"], rows["out/kernel"]
    assert (up.weight, up.status, up.bytes_after) == ("int4 g8", "quantized", 16 * 32 // 2 + 256)
    assert (out.weight, out.status, out.cls) == ("int4 channel", "quantized", "Dense")
    assert str(compiled.jaxpr).count("quantized_dot_general[") == 2
    assert [record.name for record in compiled.records][0] == "insert_scales"
    run = compiled.lower().compile()
    leaves = jax.tree.leaves((qvars, X))
    np.testing.assert_array_equal(run(leaves)[0], compiled(qvars, X))


def test_plan_and_records_are_for_the_place_that_is_given():
    rows = jnp.ones((4, 256), jnp.bfloat16)
    fn = jq.quantize("w4a16_g64")(lambda p, x: x @ p["w"].astype(x.dtype))
    q = jq.ptq(fn, {"w": jnp.ones((256, 128))}, rows)
    compiled = jq.compile(fn, q, rows, place=jq.Place("tpu", "TPU v6 lite"))
    kernel = "pallas tpu v6e: int4, scale after the dot"
    assert kernel in compiled.records[-1].notes[0]
    (op,) = compiled.plan.rows
    assert op.lowering == kernel
    assert "xla" in jq.compile(fn, q, rows, place=jq.Place("cpu")).plan.rows[0].lowering


def test_cost_counts_bytes_and_operations():
    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, p["w"])[0]

    params = {"w": jnp.ones((5, 16, 16))}
    q = jq.ptq(jq.quantize("w8a16")(fn), params, X)
    cost = jq.compile(fn, q, X).cost()
    assert cost.before.weight_bytes == 5 * 16 * 16 * 4
    assert cost.after.weight_bytes == 5 * (16 * 16 + 16 * 4)
    assert cost.before.operations == cost.after.operations == 5 * 2 * 4 * 16 * 16
    assert cost.before.activation_bytes == cost.after.activation_bytes == 5 * 2 * 4 * 16 * 4
    assert (cost.before.launches, cost.before.quantizations) == (5, 0)
    assert cost.bytes_ratio == 4160 / 7680


def test_cost_of_shared_and_fused_products():
    def fn(p, x):
        return (x @ p["q"]) * (x @ p["k"])

    params = {"q": jnp.ones((16, 8)), "k": jnp.ones((16, 8))}
    q = jq.ptq(jq.quantize("w8a8")(fn), params, X)
    cost = jq.compile(fn, q, X).cost()
    assert (cost.before.launches, cost.after.launches, cost.after.quantizations) == (2, 1, 1)
    assert cost.after.operations == cost.before.operations == 2 * 2 * 4 * 16 * 8
    assert cost.after.weight_bytes == 2 * (16 * 8 + 8 * 4)
    codes, scales, out = 4 * 16, 4 * 4, 2 * 4 * 8 * 4
    read_once = 4 * 16 * 4 + codes + scales  # the floats are read, codes and scales written
    assert cost.after.activation_bytes == read_once + codes + scales + out


def test_nnx_modules_use_their_present_state():
    model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    qmodel = jq.ptq(jq.quantize("w8a16")(model), X)
    compiled = jq.compile(qmodel, X)
    np.testing.assert_allclose(compiled(X), qmodel(X), atol=1e-6)
    qmodel.bias.set_value(qmodel.bias[...] + 1)
    np.testing.assert_allclose(compiled(X), qmodel(X), atol=1e-6)


def test_a_weight_that_is_handed_through_comes_back_as_it_was():
    def fn(p, x):
        return x @ p["w"], p, "a string"

    q = jq.ptq(jq.quantize("w8a16")(fn), {"w": jnp.ones((16, 4))}, X)
    out, same, text = jq.compile(fn, q, X)(q, X)
    assert same["w"] is q["w"] and text == "a string"
    np.testing.assert_allclose(out, X @ jnp.ones((16, 4)), rtol=1e-2)


def test_strict_and_unhashable_arguments_are_errors():
    def fn(p, x, extra=None):
        return jnp.sum(p["w"] ** 2) + x @ p["w"]

    q = {"w": jq.quantize_array(jnp.ones((16, 4)), "int8", (16, 1))}
    with pytest.raises(jq.StrictError, match="'w' would be dequantized"):
        jq.compile(fn, q, X, strict=True)
    with pytest.raises(TypeError, match="compile: an argument .* cannot be hashed"):
        jq.compile(fn, q, X, extra=object.__new__(type("Odd", (), {"__hash__": None})))


def test_explain_describes_a_quantized_tree(linen):
    model, _, qvars = linen
    plan = jq.explain(model, qvars, X)
    assert plan.recipe == "as stored"
    assert {row.param: row.weight for row in plan.where(status="quantized")} == {
        "up/kernel": "int4 g8",
        "out/kernel": "int4 channel",
    }
    assert all(row.reason == "a float array in this tree" for row in plan.where(status="float"))
    with pytest.raises(ValueError, match="recipe: the tree is quantized already"):
        jq.explain(model, qvars, X, recipe="w8a8")
