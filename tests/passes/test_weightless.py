"""Products of two activations: float unless a rule names attention, and then only there."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.core.qtensor import is_qtensor

X = jax.random.normal(jax.random.key(0), (2, 6, 16))
RECIPE = jq.get_recipe("w8a16").with_rules(
    jq.Rule("first/**", op="attention", act=jq.ActScheme("int8"))
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = nn.MultiHeadDotProductAttention(num_heads=4, name=name)(x)
        return jnp.einsum("btd,bsd->bts", x, x)  # two activations, in no attention module


def dots(fn, *args) -> tuple[int, int]:
    """(integer, float) dot_generals in the lowered program."""
    text = jax.jit(fn).lower(*args).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    integer = sum("xi8>" in line for line in lines)
    return integer, len(lines) - integer


@pytest.fixture(scope="module")
def models():
    plain, decorated = Model(), jq.quantize(RECIPE)(Model())
    variables = plain.init(jax.random.key(1), X)
    return plain, decorated, variables, jq.ptq(decorated, variables, X)


def test_only_the_named_products_are_quantized(models):
    _, decorated, _, q = models
    without = jax.tree.map(
        lambda x: x.replace(op_rules=()) if is_qtensor(x) else x, q, is_leaf=is_qtensor
    )
    integer, _ = dots(decorated.apply, q, X)
    baseline, _ = dots(decorated.apply, without, X)
    assert integer - baseline == 2  # scores and mixing of `first`


def test_values_and_gradient_are_close_to_float(models):
    plain, decorated, _, q = models
    dequantized = jax.tree.map(
        lambda x: x.dequantize() if is_qtensor(x) else x, q, is_leaf=is_qtensor
    )
    out, expected = decorated.apply(q, X), plain.apply(dequantized, X)
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03
    grad = jax.grad(lambda x: decorated.apply(q, x).sum())(X)
    expected = jax.grad(lambda x: plain.apply(dequantized, x).sum())(X)
    assert np.linalg.norm(grad - expected) / np.linalg.norm(expected) < 0.05


def test_float_leaves_stay_float_whatever_the_recipe_says(models):
    plain, decorated, variables, _ = models
    np.testing.assert_array_equal(decorated.apply(variables, X), plain.apply(variables, X))


def test_the_rule_is_saved_with_the_tree(models, tmp_path):
    _, decorated, _, q = models
    jq.save(tmp_path / "q", q)
    back = jq.restore(tmp_path / "q")
    np.testing.assert_array_equal(decorated.apply(back, X), decorated.apply(q, X))
    assert jax.tree.structure(back) == jax.tree.structure(q)


def test_nnx():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.first(x)

    model = jq.quantize(RECIPE)(Attention)(nnx.Rngs(0))
    q = jq.ptq(model, X)
    integer, _ = dots(lambda state, x: nnx.merge(nnx.graphdef(q), state)(x), nnx.state(q), X)
    assert integer >= 2
    error = np.linalg.norm(q(X) - model(X)) / np.linalg.norm(model(X))
    assert 0 < error < 0.05


def test_the_plan_lists_them(models):
    _, decorated, variables, _ = models
    rows = [r for r in jq.explain(decorated, variables, X).rows if r.kind == "attention"]
    assert {(r.path, r.status) for r in rows} >= {("first", "quantized"), ("second", "float")}
