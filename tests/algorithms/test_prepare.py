"""`jq.prepare` on whole trees: every result stays as it was, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxquant as jq
from jaxquant.core.qtensor import is_qtensor
from tests.models import tiny


def leaves(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor) if is_qtensor(leaf)]


def key(number, shape):
    return jax.random.normal(jax.random.key(number), shape)


PARAMS = {
    "query": key(0, (64, 4, 16)),
    "out": key(1, (4, 16, 64)),
    "table": key(2, (32, 64)),
    "layers": {"up": key(3, (3, 64, 96)), "down": key(4, (3, 4, 24, 64))},
}
TOKENS = jnp.arange(8)


def net(p, tokens):
    x = p["table"][tokens]
    x = x + jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", x, p["query"]), p["out"])

    def layer(h, w):
        up = jnp.tanh(h @ w["up"]).reshape(-1, 4, 24)
        return h + jnp.einsum("thk,hkd->td", up, w["down"]), None

    return lax.scan(layer, x, p["layers"])[0] @ p["table"].T


RECIPES = {
    "w8a8": "w8a8",
    "fp8": "fp8",
    "int4": jq.Recipe(
        "int4",
        (jq.Rule(weight=jq.WeightScheme("int4", "group", group_size=8, symmetric=False)),),
    ),
    "nf4": jq.Recipe("nf4", (jq.Rule(weight=jq.WeightScheme("nf4", "group", group_size=8)),)),
    "int2": jq.Recipe("int2", (jq.Rule(weight=jq.WeightScheme("int2", "group", group_size=8)),)),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_function_of_heads_layers_and_a_tied_table(recipe, tmp_path):
    quantized = jq.ptq(jq.quantize(RECIPES[recipe])(net), PARAMS, TOKENS)
    axes = jax.tree.map(lambda w: w.contracted, quantized, is_leaf=is_qtensor)
    assert axes == {
        "query": (-3,),
        "out": (-3, -2),
        "table": (-1,),
        "layers": {"up": (-2,), "down": (-3, -2)},
    }
    ready = jq.prepare(quantized, "cuda")
    order = jax.tree.map(
        lambda w: tuple(w.codes.format.layout.major_to_minor), ready, is_leaf=is_qtensor
    )
    assert order == {
        "query": (1, 2, 0),
        "out": (2, 0, 1),
        "table": (0, 1),
        "layers": {"up": (0, 2, 1), "down": (0, 3, 1, 2)},
    }
    run = jax.jit(jq.transform(net))
    want = run(quantized, TOKENS)
    np.testing.assert_array_equal(run(ready, TOKENS), want)
    assert all(a is b for a, b in zip(leaves(jq.prepare(ready, "cuda")), leaves(ready)))
    # A checkpoint knows nothing of it; restoring can do it at once.
    jq.save(tmp_path / "ready", ready)
    restored = jq.restore(tmp_path / "ready")
    assert jax.tree.structure(restored) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, restored, quantized)
    at_once = jq.restore(tmp_path / "ready", prepare="cuda")
    assert jax.tree.structure(at_once) == jax.tree.structure(ready)
    assert at_once["out"].codes.format.layout.major_to_minor == (2, 0, 1)
    np.testing.assert_array_equal(run(at_once, TOKENS), want)
    back = jq.prepare(at_once, "cpu")
    assert jax.tree.structure(back) == jax.tree.structure(quantized)
    assert back["out"].codes.format.layout.major_to_minor == (0, 1, 2)


def test_a_linen_decoder_with_scanned_layers():
    model, variables = tiny.linen_model()
    tokens = tiny.tokens()
    model = jq.quantize("w8a8")(model)
    quantized = jq.ptq(model, variables, tokens)
    ready = jq.prepare(quantized, "cuda")
    assert leaves(ready) and all(w.prepared == "cuda" for w in leaves(ready))
    moved = [w for w in leaves(ready) if w.codes.format.layout.major_to_minor[-1] != w.ndim - 1]
    assert len(moved) > 3
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(ready, tokens), apply(quantized, tokens))
    np.testing.assert_array_equal(model.apply(ready, tokens), apply(quantized, tokens))


def test_an_nnx_model_is_a_new_one():
    model = jq.ptq(jq.quantize("w8a8")(nnx.Linear(32, 16, rngs=nnx.Rngs(0))), jnp.ones((2, 32)))
    ready = jq.prepare(model, "cuda")
    assert ready is not model
    for one, order in ((model, (0, 1)), (ready, (1, 0))):
        (kernel,) = leaves(nnx.state(one))
        assert kernel.codes.format.layout.major_to_minor == order
    x = key(5, (4, 32))
    np.testing.assert_array_equal(ready(x), model(x))


def test_shapes_can_be_prepared():
    shapes = jax.eval_shape(lambda: PARAMS)
    quantized = jq.ptq(jq.quantize("w8a8")(net), shapes, TOKENS)
    ready = jq.prepare(quantized, "cuda")
    assert all(w.prepared == "cuda" for w in leaves(ready))
    out = jax.eval_shape(jq.transform(net), ready, TOKENS)
    assert out.shape == (8, 32)


def test_a_convolution_has_no_order():
    def conv(p, x):
        return lax.conv(x, p["w"], (1, 1), "SAME")

    quantized = jq.ptq(
        jq.quantize("w8a16")(conv), {"w": key(6, (8, 4, 3, 3))}, key(7, (1, 4, 8, 8))
    )
    assert quantized["w"].contracted == ()
    assert jq.prepare(quantized, "cuda")["w"].codes is quantized["w"].codes


def test_platforms(tmp_path):
    quantized = jq.ptq(jq.quantize("w8a8")(net), PARAMS, TOKENS)
    same = jq.prepare(quantized)  # the tests' default device is a CPU
    assert all(a is b for a, b in zip(leaves(same), leaves(quantized)))
    for wrong in ("gpu", "metal"):
        message = f"platform is one of cpu, cuda, rocm, tpu, not '{wrong}'"
        with pytest.raises(ValueError, match=message):
            jq.prepare(quantized, wrong)
        with pytest.raises(ValueError, match=message):
            jq.restore(tmp_path / "nothing", prepare=wrong)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda q: jq.prepare(q, "cuda"))(quantized)
