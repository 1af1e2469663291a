"""The pass on small programs: what ptq computes, gradients, equations that can be seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as jp

import jaxquant as jq
from jaxquant.algorithms.rtn import range_function
from jaxquant.core import _compat
from jaxquant.core.qtensor import is_qtensor
from jaxquant.passes import PassError, PassManager
from jaxquant.passes.analyses import AssignRecipe, FindWeights
from jaxquant.passes.edit_jaxpr import bodies
from jaxquant.passes.insert_fake_quant import InsertFakeQuant
from jaxquant.passes.program import trace
from tests.passes.zoo import CASES

INT8 = jq.WeightScheme("int8")
RECIPES = {
    "w8a8": jq.Recipe("w8a8", (jq.Rule(weight=INT8, act=jq.ActScheme("int8")),)),
    "w4": jq.Recipe("w4", (jq.Rule(weight=jq.WeightScheme("int4", symmetric=False)),)),
}
W = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
X = jax.random.normal(jax.random.key(1), (5, 8))


def insert(fn, params, *args, recipe=RECIPES["w8a8"]):
    program = trace(fn, params, args)
    passes = [FindWeights(), AssignRecipe(recipe), InsertFakeQuant(range_of=range_function)]
    return PassManager(passes, verify="all").run(program)


def fakes(jaxpr) -> dict[str, int]:
    """How often each fake quantization is in a program, bodies included."""
    found = {"fake_codes": 0, "fake_activation": 0}
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive is jp.custom_jvp_call_p:
            name = eqn.params["call_jaxpr"].jaxpr.debug_info.func_name
            if name in found:
                found[name] += 1
                continue
        for sub in bodies(eqn):
            for key, number in fakes(sub).items():
                found[key] += number
    return found


USED = [case for case in CASES if not case.dequantized]  # ptq refuses what nothing could quantize
ASYMMETRIC = ("matmul", "batched_experts", "tied_embedding", "convolution", "scan_stacked")


@pytest.mark.parametrize(
    ("case", "recipe"),
    [(case, "w8a8") for case in USED] + [(c, "w4") for c in USED if c.name in ASYMMETRIC],
    ids=str,
)
def test_forward_is_that_of_ptq(case, recipe):
    """And the gradient of every weight is that of the function at the weights ptq would give."""
    params = case.params()
    model = jq.quantize(RECIPES[recipe])(case.fn)
    fake = jq.qat(model)
    q = jq.ptq(model, params, *case.inputs)

    def loss(params, fn):
        out = fn(params, *case.inputs)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in floats), out

    if case.grad:
        grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
        got, out = grad(params, fake)
    else:
        out = jax.jit(fake)(params, *case.inputs)
    expected = jax.jit(model)(q, *case.inputs)
    limit = {"rtol": 1e-4, "atol": max(2e-5, case.tolerance)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **limit), out, expected)
    quantized = [name for name, leaf in q.items() if is_qtensor(leaf)]
    seen = fakes(insert(case.fn, params, *case.inputs, recipe=RECIPES[recipe]).jaxpr)
    assert seen["fake_codes"] == len(quantized)
    if not case.grad:
        return
    dequantized = {n: w.dequantize() if is_qtensor(w) else w for n, w in q.items()}
    exact, _ = grad(dequantized, case.fn)
    rough = 0.08 if recipe == "w8a8" else 1e-3  # the inputs are rounded as well
    for name in params:
        error, norm = (np.linalg.norm(np.asarray(x, np.float64))
                       for x in (got[name] - exact[name], exact[name]))  # fmt: skip
        assert error <= rough * norm + max(1e-4, case.tolerance), (name, error, norm)


def test_the_equations_are_counted():
    def fn(p, x):
        x = lax.scan(
            lambda c, w: (jax.checkpoint(lambda c: jnp.tanh(c @ w))(c), None), x, p["stack"]
        )[0]
        return x @ p["a"] + x @ p["b"]

    params = {
        "stack": jax.random.normal(jax.random.key(2), (3, 8, 8)), "a": W["w"], "b": W["w"] + 1
    }  # fmt: skip
    before = trace(fn, params, (X,))
    assert fakes(before.jaxpr) == {"fake_codes": 0, "fake_activation": 0}
    after = insert(fn, params, X)
    assert fakes(after.jaxpr) == {"fake_codes": 3, "fake_activation": 3}
    only_weights = jq.Recipe("w8", (jq.Rule(weight=INT8),))
    assert fakes(insert(fn, params, X, recipe=only_weights).jaxpr) == {
        "fake_codes": 3, "fake_activation": 0
    }  # fmt: skip
    assert str(insert(fn, params, X).jaxpr) == str(after.jaxpr)
    (scan,) = [e for e in after.jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    names = [e.primitive.name for e in _compat.open_jaxpr(scan.params["jaxpr"])[0].eqns]
    assert any("checkpoint" in name or "remat" in name for name in names)


def test_a_weight_that_is_clipped_has_no_gradient():
    scheme = jq.WeightScheme("int8", range="percentile", percentile=50.0)
    fake = jq.qat(lambda p, x: x @ p["w"], jq.Recipe("clip", (jq.Rule(weight=scheme),)))
    grad = jax.grad(lambda p: fake(p, X).sum())(W)["w"]
    limit = np.percentile(np.abs(W["w"]), 50.0, axis=0) * 127.5 / 127
    inside = np.abs(W["w"]) <= limit
    expected = inside * np.asarray(X.sum(0), np.float64)[:, None]
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
    assert 0.3 < inside.mean() < 0.7


@pytest.mark.parametrize("name", ["int2", "int1"])
def test_a_block_of_zeros_can_be_trained_away_from_zero(name):
    fake = jq.qat(
        lambda p, x: x @ p["w"],
        jq.Recipe("low", (jq.Rule(weight=jq.WeightScheme(name, granularity="channel")),)),
    )
    params = {"w": jnp.zeros((8, 32)).at[:, 1:].set(1.0)}
    assert not np.any(fake(params, X)[:, 0])
    grad = jax.grad(lambda p: fake(p, X).sum())(params)["w"]
    np.testing.assert_allclose(grad[:, 0], X.sum(0), rtol=1e-5)


def test_custom_rules_stay_the_users_own():
    @jax.custom_vjp
    def layer(w, x):
        return jnp.tanh(x @ w)

    layer.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda r, ct: (7 * jnp.ones_like(r[0]), r[1]))
    fake = jq.qat(lambda p, x: layer(p["w"], x), RECIPES["w8a8"])
    value, grad = jax.value_and_grad(lambda p: fake(p, X).sum())(W)
    np.testing.assert_allclose(grad["w"], 7 * np.ones((8, 6)), rtol=1e-5)
    model = jq.quantize(RECIPES["w8a8"])(lambda p, x: layer(p["w"], x))
    np.testing.assert_allclose(value, model(jq.ptq(model, W, X), X).sum(), rtol=1e-5)


def test_vmap_over_weights_and_over_inputs():
    fake = jq.qat(lambda p, x: x @ p["w"], RECIPES["w8a8"])
    many = {"w": jnp.stack([W["w"], 2 * W["w"] - 1])}
    found = jax.vmap(fake, in_axes=(0, None))(many, X)
    for i in range(2):
        one = fake({"w": many["w"][i]}, X)
        np.testing.assert_allclose(found[i], one, rtol=1e-5, atol=1e-5)
    rows = jax.vmap(fake, in_axes=(None, 0))(W, X)
    np.testing.assert_allclose(rows, fake(W, X), rtol=1e-5, atol=1e-5)


def test_a_parameter_that_is_handed_through_stays_the_float():
    fake = jq.qat(lambda p, x: (x @ p["w"], p), RECIPES["w8a8"])
    _, params = fake(W, X)
    np.testing.assert_array_equal(params["w"], W["w"])


def test_errors():
    program = trace(lambda p, x: x @ p["w"], W, (X,))
    with pytest.raises(PassError, match="requires assignment"):
        PassManager([InsertFakeQuant()]).run(program)
    mse = jq.Recipe("mse", (jq.Rule(weight=jq.WeightScheme("int4", range="mse")),))
    with pytest.raises(ValueError, match="range='mse': give range_of="):
        PassManager([FindWeights(), AssignRecipe(mse), InsertFakeQuant()]).run(program)
    step = {"w": {"weight": jnp.ones((2, 6))}}
    passes = [FindWeights(), AssignRecipe(RECIPES["w8a8"])]
    with pytest.raises(ValueError, match=r"\['weight'\] has shape \(2, 6\), not \(1, 6\)"):
        PassManager([*passes, InsertFakeQuant(step)]).run(program)
    with pytest.raises(ValueError, match="'v' is not quantized; quantized are: w"):
        PassManager([*passes, InsertFakeQuant({"v": {"weight": X}})]).run(program)
    with pytest.raises(ValueError, match="it takes 'weight' and 'input'"):
        PassManager([*passes, InsertFakeQuant({"w": {"bias": X}})]).run(program)
    with pytest.raises(ValueError, match="the input of this weight is not static"):
        PassManager([*passes, InsertFakeQuant({"w": {"input": X}})]).run(program)
