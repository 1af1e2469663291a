"""`quantize` as a decorator: with and without a recipe, on functions, and its errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.core.recipe import get_recipe
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.marks import recipe_of
from tests.frontends import linen_zoo, nnx_zoo
from tests.frontends.support import (
    assert_close,
    assert_identical,
    dequantize_tree,
    int8,
    quantize_tree,
)


def test_recipe_forms():
    recipe = get_recipe("w4a8")
    for target in (linen_zoo.Block, nnx_zoo.Mlp, lambda p, x: x):
        assert recipe_of(quantize(target)) == get_recipe("w8a8")
        assert recipe_of(quantize()(target)) == get_recipe("w8a8")
        assert recipe_of(quantize("w4a8")(target)) == recipe
        assert recipe_of(quantize(recipe)(target)) == recipe
        assert recipe_of(target) is None


def test_decorating_again_changes_the_recipe():
    twice = quantize("w8a16")(quantize("w4a8")(linen_zoo.Block))
    assert recipe_of(twice) == get_recipe("w8a16")
    x = linen_zoo.make("block")[2][0]
    variables = twice().init(linen_zoo.keys(), x)
    quantized = quantize_tree(variables)
    expected = linen_zoo.Block().apply(dequantize_tree(quantized), x)
    assert_close(twice().apply(quantized, x), expected)
    model = quantize("fp8")(quantize("w8a8")(nnx_zoo.Mlp)(rngs=nnx.Rngs(0)))
    assert recipe_of(model) == get_recipe("fp8")


def test_the_same_decoration_gives_the_same_class():
    assert quantize("w8a8")(nn.Dense) is quantize("w8a8")(nn.Dense)
    assert quantize("w8a8")(nn.Dense) is not quantize("w8a16")(nn.Dense)
    assert type(quantize("w8a8")(nn.Dense(3))) is quantize("w8a8")(nn.Dense)
    assert quantize(nn.Dense).__mro__[1] is nn.Dense


def test_partial_of_a_class():
    layer = quantize("w8a8")(functools.partial(nn.Dense, 3, use_bias=False))
    x = jnp.ones((2, 4))
    variables = layer().init(jax.random.key(0), x)
    assert_identical(variables, nn.Dense(3, use_bias=False).init(jax.random.key(0), x))
    quantized = quantize_tree(variables)
    assert_close(layer().apply(quantized, x), nn.Dense(3).apply(
        {"params": {**dequantize_tree(quantized)["params"], "bias": jnp.zeros(3)}}, x
    ))  # fmt: skip


def test_function_with_a_linen_model_inside():
    model = linen_zoo.Model()
    tokens = linen_zoo.make("model")[2][0]
    params = model.init(linen_zoo.keys(), tokens)["params"]

    @quantize("w8a16")
    def loss(params, tokens, *, reduce: str = "mean"):
        """A loss."""
        logits = model.apply({"params": params}, tokens)
        return getattr(jnp, reduce)(logits**2)

    assert loss.__name__ == "loss" and loss.__doc__ == "A loss."
    quantized = quantize_tree({"params": params})["params"]
    floats = dequantize_tree(quantized)
    assert_close(loss(quantized, tokens), loss(floats, tokens))
    assert_close(jax.jit(loss)(quantized, tokens), loss(floats, tokens))
    assert_close(loss(quantized, tokens, reduce="sum"), loss(floats, tokens, reduce="sum"))
    assert describe(loss).param_paths(params)[0].startswith("Block_0/")


def test_function_traces_once():
    traces = []

    @quantize
    def fn(params, x):
        traces.append(1)
        return x @ params["w"]

    params, x = {"w": int8(jnp.arange(12.0).reshape(4, 3), (0,))}, jnp.ones((2, 4))
    out = [fn(params, x + i) for i in range(3)]
    assert len(traces) == 1
    assert_close(out[1], (x + 1) @ dequantize_tree(params)["w"])


def test_errors():
    with pytest.raises(ValueError, match="w4a16_g128"):
        quantize("w5a5")
    for target in (3, [nn.Dense], int, {}):
        with pytest.raises(TypeError, match="module .class or instance. or a function"):
            quantize("w8a8")(target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Callable:
    """A model of the kind Equinox makes: a pytree of its parameters that can be called."""

    kernel: jax.Array

    def __call__(self, x):
        return x @ self.kernel


class Wrapper:
    """A model of the kind Hugging Face makes: a Linen module and its parameters in one object."""

    def __init__(self, module, params):
        self.module, self.params = module, params

    def __call__(self, x, params=None):
        return self.module.apply({"params": self.params if params is None else params}, x)


def test_callables_that_hold_their_parameters_are_refused_and_the_way_named():
    x = jnp.ones((2, 4))
    model = Callable(jax.random.normal(jax.random.key(0), (4, 3)))
    with pytest.raises(TypeError, match=r"this Callable holds its parameters.*lambda model"):
        quantize(model)
    fn = quantize(lambda model, x: model(x))
    quantized = quantize_tree(model)
    assert_close(fn(quantized, x), dequantize_tree(quantized)(x))

    module = nn.Dense(3)
    params = module.init(jax.random.key(0), x)["params"]
    wrapper = Wrapper(module, params)
    with pytest.raises(TypeError, match=r"this Wrapper holds a Linen module.*params=params"):
        quantize(wrapper)
    fn = quantize(lambda params, x: wrapper(x, params=params))
    quantized = quantize_tree(params)
    assert_close(fn(quantized, x), wrapper(x, params=dequantize_tree(quantized)))

    bound = functools.partial(jnp.einsum, "ab,bc->ac")
    assert_close(
        quantize(jax.tree_util.Partial(lambda c, w, x: c * bound(x, w), 2.0))(x.T, x),
        2 * bound(x, x.T),
    )
