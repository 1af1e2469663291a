"""Decorated Linen modules among other things people do with trees, boxes and transforms."""

import abc
import typing

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxquant.frontends import quantize
from tests.frontends import linen_zoo as zoo
from tests.frontends.support import (
    assert_close,
    assert_identical,
    dequantize_tree,
    int8,
    qtensor_count,
    quantize_tree,
)


class Boxed(nn.Module):
    """A kernel in a box with axis names, mesh axes or logical ones."""

    partition: typing.Any = nn.with_partitioning

    @nn.compact
    def __call__(self, x):
        init = self.partition(nn.initializers.lecun_normal(), ("in", "out"))
        return x + nn.relu(nn.Dense(zoo.DIM, kernel_init=init)(x))


class Stack(nn.Module):
    """The boxes get the name of the layer axis."""

    block: typing.Any
    partition: typing.Any

    @nn.compact
    def __call__(self, x):
        run = nn.scan(
            lambda block, carry, _: (block(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return run(nn.remat(self.block)(self.partition, name="layers"), x, None)[0]


@pytest.mark.parametrize("partition", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxes_under_scan(partition):
    x = zoo.make("block")[2][0]
    plain, child = Stack(Boxed, partition), Stack(quantize(Boxed), partition)
    top = quantize(Stack)(Boxed, partition)
    variables = plain.init(zoo.keys(), x)
    assert_identical(child.init(zoo.keys(), x), variables)
    assert_identical(top.init(zoo.keys(), x), variables)
    quantized = quantize_tree(variables, "layers")
    assert quantized["params"]["layers"]["Dense_0"]["kernel"].names == ("layers", "in", "out")
    expected = plain.apply(dequantize_tree(quantized), x)
    for model in (child, top):
        assert_close(model.apply(quantized, x), expected)
        assert_close(jax.jit(model.apply)(quantized, x), expected)


def test_frozen_variables_and_abstract_init():
    tokens = zoo.make("model")[2][0]
    model = quantize(zoo.Model)()
    variables = model.init(zoo.keys(), tokens)
    shapes = jax.eval_shape(model.init, zoo.keys(), tokens)
    assert jax.tree_util.tree_structure(shapes) == jax.tree_util.tree_structure(variables)
    frozen = flax.core.freeze(quantize_tree(variables))
    expected = zoo.Model().apply(dequantize_tree(frozen), tokens)
    assert_close(model.apply(frozen, tokens), expected)
    plain_table = zoo.Model().tabulate(jax.random.key(0), tokens)
    assert model.tabulate(jax.random.key(0), tokens) == plain_table


def test_gradient_of_the_float_leaves():
    x = zoo.make("setup")[2][0]
    model, plain = quantize(zoo.SetupModel)(), zoo.SetupModel()
    quantized = quantize_tree(model.init(zoo.keys(), x))

    def loss(model, tree, bias, x):
        up = {**tree["params"]["up"], "bias": bias}
        return (model.apply({"params": {**tree["params"], "up": up}}, x) ** 2).mean()

    bias = jnp.linspace(-1, 1, 24)
    floats = dequantize_tree(quantized)
    grads = jax.grad(loss, argnums=(2, 3))(model, quantized, bias, x)
    assert_close(grads, jax.grad(loss, argnums=(2, 3))(plain, floats, bias, x))


def test_scan_and_vmap_over_stacked_trees():
    x = zoo.make("raw")[2][0]
    model, plain = quantize(zoo.RawModule)(), zoo.RawModule()
    variables = model.init(zoo.keys(), x)
    stacked = jax.tree_util.tree_map(lambda w: jnp.stack([w, w * 1.5]), variables)
    quantized = jax.tree_util.tree_map(lambda w: int8(w, (w.ndim - 2,)), stacked)
    floats = dequantize_tree(quantized)

    def run(model, tree):
        return jax.lax.scan(lambda c, layer: (model.apply(layer, c), None), x, tree)[0]

    assert_close(run(model, quantized), run(plain, floats))
    out = jax.vmap(model.apply, (0, None))(quantized, x)
    assert_close(out, jax.vmap(plain.apply, (0, None))(floats, x))


T = typing.TypeVar("T")


class Base(nn.Module, typing.Generic[T], metaclass=abc.ABCMeta):
    @abc.abstractmethod
    def body(self, x): ...

    def __call__(self, x):
        return self.body(x)


class KeywordOnly(nn.Module, kw_only=True):
    width: int
    half: int = 0

    def __post_init__(self):
        self.half = self.width // 2
        super().__post_init__()

    @nn.remat
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.half)(x)


class NameScopes(nn.Module):
    @nn.compact_name_scope
    def up(self, x):
        return nn.Dense(3)(x)

    @nn.compact
    def __call__(self, x):
        return self.up(x)


class Concrete(Base[int]):
    @nn.compact
    def body(self, x):
        return nn.Dense(3)(x)


def _sequential(dense):
    return nn.Sequential([dense(4), nn.relu, dense(3)])


@pytest.mark.parametrize(
    ("plain", "decorated"),
    [
        (Concrete(), quantize(Concrete)()),
        (KeywordOnly(width=6), quantize(KeywordOnly)(width=6)),
        (NameScopes(), quantize(NameScopes)()),
        (_sequential(nn.Dense), _sequential(quantize(nn.Dense))),
        (nn.RNN(nn.GRUCell(4)), nn.RNN(quantize(nn.GRUCell)(4))),
        (
            nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.LSTMCell(4))),
            quantize(nn.Bidirectional)(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.LSTMCell(4))),
        ),
    ],
    ids=["abstract", "keyword_only", "name_scopes", "sequential", "cell", "bidirectional"],
)
def test_kinds_of_classes(plain, decorated):
    x = zoo.make("block")[2][0]
    variables = plain.init(zoo.keys(), x)
    assert_identical(decorated.init(zoo.keys(), x), variables)
    quantized = quantize_tree(variables)
    assert qtensor_count(quantized) > 0
    expected = plain.apply(dequantize_tree(quantized), x)
    assert_close(decorated.apply(quantized, x), expected)
    assert_close(jax.jit(decorated.apply)(quantized, x), expected)


def test_decode_cache():
    class Attend(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(4, decode=True)(x)

    x = zoo.make("block")[2][0]
    plain, decorated = Attend(), quantize(Attend)()
    variables = plain.init(zoo.keys(), x)
    quantized = quantize_tree(variables)
    floats = dequantize_tree(quantized)
    cache = expected_cache = variables["cache"]
    for i in range(3):
        token = x[:, i : i + 1]
        out, new = decorated.apply({**quantized, "cache": cache}, token, mutable=["cache"])
        expected = plain.apply({**floats, "cache": expected_cache}, token, mutable=["cache"])
        assert_close((out, new), expected)
        cache, expected_cache = new["cache"], expected[1]["cache"]
