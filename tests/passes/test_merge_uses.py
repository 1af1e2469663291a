"""A weight that several operations use: which of them quantize their input, and what is said."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.core.recipe import ActScheme, Recipe, Rule, WeightScheme
from tests.passes.test_survives import equations

INT8, ACT = WeightScheme("int8"), ActScheme()
ANY = Rule(weight=INT8, act=ACT)
W = jax.random.normal(jax.random.key(0), (8, 8)) / 3
X = jax.random.normal(jax.random.key(1), (2, 6, 8))


def conv(x, w):
    return lax.conv_general_dilated(
        x, w[None], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


def ragged(x, w):
    rows = x.reshape(-1, 8)
    return lax.ragged_dot(rows, w[None], jnp.array([len(rows)], jnp.int32)).reshape(x.shape)


OTHERS = {"conv": conv, "ragged_dot": ragged}


def shared(kind, rows=12):
    """A dot of some rows, and another operation of twelve, on one weight."""

    def fn(p, x):
        return OTHERS[kind](x, p["w"]), jnp.tile(x, (rows // 12, 1, 1)) @ p["w"]

    return fn


def rounded(x):
    """What int8 codes and a scale per token keep of x."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


def inputs_rounded(fn, tree):
    """For each product whether it is one of int8 codes on both sides."""
    jaxpr = jax.make_jaxpr(jq.transform(fn))(tree, X)
    names = {}
    for eqn in equations(jaxpr):
        if "act" in eqn.params and "tree" in eqn.params:
            names[str(eqn.primitive)] = bool(eqn.params["act"])
    return names


def reasons(plan):
    return "; ".join(row.reason for row in plan.rows)


@pytest.mark.parametrize("rows", [12, 48], ids=["equal work", "the dot decides"])
@pytest.mark.parametrize("kind", OTHERS)
def test_an_op_that_no_rule_names_keeps_its_float_input(kind, rows):
    fn = jq.quantize(Recipe("any", (ANY,)))(shared(kind, rows))
    tree = jq.ptq(fn, {"w": W}, X)
    assert tree["w"].act == ACT
    assert tree["w"].act_ops == ("dot_general",)
    other = "quantized_conv_general_dilated" if kind == "conv" else "quantized_ragged_dot"
    assert inputs_rounded(shared(kind, rows), tree) == {other: False, "quantized_dot_general": True}
    w = np.asarray(tree["w"].dequantize(), np.float64)
    x = np.asarray(X, np.float64)
    of_float, of_codes = jq.transform(shared(kind, rows))(tree, X)
    np.testing.assert_allclose(of_float, x @ w, atol=1e-5)
    np.testing.assert_allclose(of_codes[:2], rounded(x) @ w, atol=1e-5)
    plan = jq.explain(fn, {"w": W}, X)
    assert sorted((row.kind, row.act) for row in plan.rows) == sorted(
        [(kind, ""), ("dot", str(ACT))]
    )
    whose = "its input" if rows == 12 else f"the input of {kind} 'w'"
    assert f"{whose} stays float: XLA has no integer {kind}" in reasons(plan)
    again = jq.explain(fn, tree, X)
    assert [row.act for row in again.rows] == [row.act for row in plan.rows]


@pytest.mark.parametrize("kind", OTHERS)
def test_an_op_that_a_rule_names_quantizes_its_input_as_well(kind):
    fn = jq.quantize(Recipe("named", (Rule(op=kind, weight=INT8, act=ACT), ANY)))(shared(kind))
    tree = jq.ptq(fn, {"w": W}, X)
    assert tree["w"].act_ops is None
    assert set(inputs_rounded(shared(kind), tree).values()) == {True}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_op_alone_is_as_it_was(kind):
    def fn(p, x):
        return OTHERS[kind](x, p["w"])

    tree = jq.ptq(jq.quantize(Recipe("any", (ANY,)))(fn), {"w": W}, X)
    assert (tree["w"].act, tree["w"].act_ops) == (None, None)
    named = Recipe("named", (Rule(op=kind, weight=INT8, act=ACT),))
    tree = jq.ptq(jq.quantize(named)(fn), {"w": W}, X)
    assert (tree["w"].act, tree["w"].act_ops) == (ACT, None)


def test_another_scheme_for_the_other_op_is_not_mixed_in():
    """One weight has one scheme for its inputs: that of the use that decides."""
    per_tensor = ActScheme(granularity="tensor")
    recipe = Recipe("two", (Rule(op="conv", weight=INT8, act=per_tensor), ANY))
    fn = jq.quantize(recipe)(shared("conv", 48))
    tree = jq.ptq(fn, {"w": W}, X)
    assert (tree["w"].act, tree["w"].act_ops) == (ACT, ("dot_general",))
    said = reasons(jq.explain(fn, {"w": W}, X))
    assert "the input of conv 'w' stays float: dot 'w' decides" in said


def test_two_dots_do_the_same_whatever_rule_matches_them():
    """An einsum that a rule names, and a product that none does: the plan says who decides."""

    def fn(p, x):
        with jax.named_scope("jq:layer:Einsum"):
            y = jnp.einsum("btd,dn->btn", x, p["layer"]["w"])
        return y, x[0] @ p["layer"]["w"]

    recipe = Recipe("einsums", (Rule(op="einsum", weight=INT8, act=ACT),))
    fn = jq.quantize(recipe)(fn)
    params = {"layer": {"w": W}}
    tree = jq.ptq(fn, params, X)
    assert (tree["layer"]["w"].act, tree["layer"]["w"].act_ops) == (ACT, None)
    x = np.asarray(X, np.float64)
    w = np.asarray(tree["layer"]["w"].dequantize(), np.float64)
    for got, x_of in zip(fn(tree, X), (x, x[0]), strict=True):
        np.testing.assert_allclose(got, rounded(x_of) @ w, atol=1e-5)
    assert "no rule matches dot" in reasons(jq.explain(fn, params, X))


@pytest.mark.parametrize("kind", OTHERS)
def test_training_and_checkpoints_keep_it(kind, tmp_path):
    fn = jq.quantize(Recipe("any", (ANY,)))(shared(kind, 48))
    tree = jq.ptq(fn, {"w": W}, X)
    jq.save(tmp_path / "q", tree)
    back = jq.restore(tmp_path / "q")
    assert back["w"].act_ops == ("dot_general",)
    trained = jq.qat(fn)({"w": W}, X)
    for a, b in zip(trained, fn(back, X), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
