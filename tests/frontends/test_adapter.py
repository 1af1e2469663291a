"""`describe`: one view of Linen, NNX and functions; errors name the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.recipe import get_recipe
from jaxquant.frontends import describe, quantize
from tests.frontends import linen_zoo, nnx_zoo
from tests.frontends.support import (
    assert_close,
    assert_identical,
    dequantize_tree,
    dequantized_module,
    quantize_module,
    quantize_tree,
)


def test_linen():
    x = linen_zoo.make("block")[2][0]
    model = quantize("w4a16_g128")(linen_zoo.NormNet)()
    plain = linen_zoo.NormNet()
    variables = plain.init(linen_zoo.keys(), x, train=False)
    adapter = describe(model)
    assert (adapter.kind, adapter.name, adapter.notes) == ("linen", "NormNet", [])
    assert adapter.recipe == get_recipe("w4a16_g128")
    fn, tree = adapter.pure(variables)
    assert tree is variables
    for options in (
        {"train": False, "mutable": "cache"},
        {"train": True, "mutable": ["cache", "batch_stats"]},
    ):
        assert_identical(fn(tree, x, **options), plain.apply(variables, x, **options))
    options = {"train": False, "mutable": ["cache"]}
    shapes = jax.eval_shape(lambda: variables)
    out, _ = jax.eval_shape(lambda v: fn(v, x, **options), shapes)
    assert out.shape == (*x.shape[:-1], 4)
    quantized = quantize_tree(variables)
    expected = plain.apply(dequantize_tree(quantized), x, **options)
    assert adapter.with_tree(quantized) is quantized
    assert_close(adapter.apply(quantized, x, **options), expected)


@pytest.mark.parametrize("quantized", [False, True])
def test_linen_parameter_paths(quantized):
    x = linen_zoo.make("block")[2][0]
    model = quantize(linen_zoo.NormNet)()
    variables = model.init(linen_zoo.keys(), x, train=False)
    tree = quantize_tree(variables) if quantized else variables
    paths = describe(model).param_paths(tree)
    assert len(paths) == len(jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor))
    assert sorted(p for p in paths if p) == sorted(
        ["BatchNorm_0/bias", "BatchNorm_0/scale"]
        + [f"Dense_{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")]
    )
    assert paths.count(None) == 3  # batch_stats and cache


def test_linen_boxes_rngs_and_method():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(), ("a", "b"))
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(3, kernel_init=init)(x))

    x, model = jnp.ones((2, 4)), quantize(Boxed)()
    variables = model.init(linen_zoo.keys(), x)
    adapter = describe(model)
    assert adapter.param_paths(variables) == ["Dense_0/bias", "Dense_0/kernel"]
    fn, tree = adapter.pure(variables)
    rngs = {"dropout": jax.random.key(3)}
    assert_identical(fn(tree, x, rngs=rngs), Boxed().apply(variables, x, rngs=rngs))
    bound = quantize(linen_zoo.SetupModel)()
    x = linen_zoo.make("setup")[2][0]
    variables = bound.init(linen_zoo.keys(), x)
    fn, tree = describe(bound).pure(variables)
    expected = linen_zoo.SetupModel().apply(variables, x, method="encode")
    assert_identical(fn(tree, x, method="encode"), expected)


def test_nnx():
    x = nnx_zoo.inputs("NormNet")
    model = quantize("w8a16")(nnx_zoo.NormNet)(rngs=nnx.Rngs(0))
    model.eval()
    adapter = describe(model)
    assert (adapter.kind, adapter.name) == ("nnx", "NormNet")
    assert adapter.recipe == get_recipe("w8a16")
    fn, tree = adapter.pure()
    count = model.count[...]
    assert_identical(fn(tree, x), nnx.clone(model)(x))
    assert int(model.count[...]) == int(count)  # the user's model is left alone
    assert_identical(jax.jit(fn)(tree, x), jax.jit(fn)(tree, x))
    paths = adapter.param_paths(tree)
    assert len(paths) == len(jax.tree_util.tree_leaves(tree, is_leaf=is_qtensor))
    modules = {"linear": ("kernel", "bias"), "head": ("kernel", "bias"), "norm": ("scale", "bias")}
    expected = {f"{module}/{name}" for module, names in modules.items() for name in names}
    assert {p for p in paths if p} == expected
    quantized = quantize_module(model)
    state = nnx.state(quantized)
    assert len(adapter.param_paths(state)) == len(
        jax.tree_util.tree_leaves(state, is_leaf=is_qtensor)
    )
    new = adapter.with_tree(state)
    assert type(new) is type(model) and new is not model
    assert is_qtensor(new.linear.kernel.get_raw_value())
    assert not is_qtensor(model.linear.kernel.get_raw_value())
    expected = dequantized_module(quantized)(x)
    assert_close(adapter.apply(state, x), expected)
    assert_close(jax.jit(adapter.apply)(state, x), expected)
    assert_close(new(x), expected)


def test_nnx_state_can_be_given():
    model = quantize(nnx_zoo.Mlp)(rngs=nnx.Rngs(0))
    other = nnx.state(nnx_zoo.Mlp(rngs=nnx.Rngs(1)))
    fn, tree = describe(model).pure(other)
    assert tree is other
    x = nnx_zoo.inputs("Mlp")
    assert_identical(fn(tree, x), nnx_zoo.Mlp(rngs=nnx.Rngs(1))(x))


def test_function():
    def mlp(params, x, *, scale=1.0):
        return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"][0]["kernel"] * scale

    params = {"up": {"kernel": jnp.eye(4)}, "down": [{"kernel": jnp.ones((4, 2))}]}
    x = jnp.arange(8.0).reshape(2, 4) / 8
    adapter = describe(quantize("fp8")(mlp))
    assert (adapter.kind, adapter.name) == ("function", "mlp")
    assert adapter.recipe == get_recipe("fp8")
    assert adapter.param_paths(params) == ["down/0/kernel", "up/kernel"]
    fn, tree = adapter.pure(params)
    assert tree is params
    assert_identical(fn(tree, x, scale=0.5), mlp(params, x, scale=0.5))
    quantized = quantize_tree(params)
    expected = mlp(dequantize_tree(quantized), x, scale=0.5)
    assert_close(adapter.apply(adapter.with_tree(quantized), x, scale=0.5), expected)


def test_notes_on_unhashable_modules():
    model = quantize(linen_zoo.Caller)(nn.Dense(2, bias_init=lambda *a: jnp.zeros(2)))
    assert describe(model).notes == []

    class Table(nn.Module):
        table: object

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    (note,) = describe(quantize(Table)(jnp.ones(3))).notes
    assert ".table: a jax.Array" in note and "jax.jit" in note
    (note,) = describe(quantize(Table)(np.zeros(1 << 20))).notes
    assert "8,388,608 bytes" in note


def test_notes_on_unhashable_nnx_modules():
    class Listed(nnx_zoo.Mlp):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.sizes = nnx.static([1, 2])

    model = quantize(Listed)(rngs=nnx.Rngs(0))
    (note,) = describe(model).notes
    assert "unhashable" in note and "jax.jit" in note
    quantized, x = quantize_module(model), nnx_zoo.inputs("Mlp")
    assert_close(quantized(x), dequantized_module(quantized)(x))
    assert describe(quantize(nnx_zoo.Mlp)(rngs=nnx.Rngs(0))).notes == []


def test_errors_name_the_fix():
    with pytest.raises(TypeError, match=r"Dense is a class: give an instance"):
        describe(nn.Dense)
    with pytest.raises(TypeError, match=r"Mlp is a class"):
        describe(quantize(nnx_zoo.Mlp))
    with pytest.raises(TypeError, match=r"Dense is not decorated: put @jaxquant\.quantize"):
        describe(nn.Dense(3))
    with pytest.raises(TypeError, match=r"Mlp is not decorated.*jaxquant\.quantize\(recipe\)"):
        describe(nnx_zoo.Mlp(rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"quantize_tree is not decorated: use jaxquant"):
        describe(quantize_tree)
    with pytest.raises(TypeError, match=r"expected a decorated .* got int: 3"):
        describe(3)
    with pytest.raises(TypeError, match="give its variables"):
        describe(quantize(nn.Dense(3))).pure()
    with pytest.raises(TypeError, match="come before its own arguments, not list"):
        describe(quantize(nn.Dense(3))).pure([1.0])
    with pytest.raises(TypeError, match="give its parameters"):
        describe(quantize(lambda p, x: x)).pure(None)
