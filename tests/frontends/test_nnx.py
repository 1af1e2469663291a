"""Decorated NNX classes: float as undecorated, quantized as dequantize-then-float."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxquant.algorithms.ptq import ptq
from jaxquant.core.qtensor import QTensor, is_qtensor
from jaxquant.frontends import quantize
from tests.frontends import nnx_zoo as zoo
from tests.frontends.support import (
    assert_close,
    assert_identical,
    dequantize_tree,
    dequantized_module,
    qtensor_count,
    quantize_module,
    quantize_tree,
    raw,
)

by_class = pytest.mark.parametrize("cls", zoo.CLASSES, ids=lambda c: c.__name__)


def _pure(model, *filters):
    return raw(nnx.to_pure_dict(nnx.state(model, *filters)))


def _make(cls, decorate=None):
    decorate = decorate or quantize("w8a8")
    plain, decorated = cls(rngs=nnx.Rngs(0)), decorate(cls)(rngs=nnx.Rngs(0))
    return plain, decorated, zoo.inputs(cls.__name__)


def _quantized(model):
    quantized = quantize_module(model, "layers")
    assert qtensor_count(nnx.state(quantized)) > 0
    return quantized, dequantized_module(quantized)


def quantized_values(model):
    values = [v.get_raw_value() for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    return [v for v in values if is_qtensor(v)]


@by_class
def test_float_is_bit_identical(cls):
    plain, decorated, x = _make(cls)
    assert_identical(_pure(decorated), _pure(plain))
    assert_identical(decorated(x), plain(x))
    assert_identical(nnx.jit(lambda m, x: m(x))(decorated, x), nnx.jit(lambda m, x: m(x))(plain, x))
    assert_identical(_pure(decorated), _pure(plain))


@by_class
def test_quantized_is_dequantize_then_float(cls):
    plain, decorated, x = _make(cls)
    quantized, floats = _quantized(decorated)
    assert type(quantized) is type(decorated)
    expected = nnx.merge(nnx.graphdef(plain), nnx.state(floats))(x)
    before, count = quantized_values(quantized), qtensor_count(nnx.state(quantized))
    assert_close(quantized(x), expected)
    assert_close(quantized(x), expected)
    assert all(a is b for a, b in zip(quantized_values(quantized), before, strict=True))
    assert_close(nnx.jit(lambda m, x: m(x))(quantized, x), expected)
    assert qtensor_count(nnx.state(quantized)) == count
    if cls not in (zoo.Model, zoo.Stacked, zoo.Recurrent):  # undecorated, these cannot either
        assert_close(jax.jit(quantized)(x), expected)  # captured, not passed

    graphdef, state = nnx.split(quantized)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    assert_close(run(state, x), expected)


def test_instance_and_submodule():
    plain = zoo.Model(rngs=nnx.Rngs(0))
    tokens = zoo.inputs("Model")
    decorated = quantize("w8a16")(plain)
    assert decorated is not plain and decorated.embed is plain.embed
    assert type(plain) is zoo.Model
    assert_identical(decorated(tokens), plain(tokens))
    quantized, floats = _quantized(decorated)
    assert_close(quantized(tokens), floats(tokens))

    class Parent(zoo.Model):
        block = quantize("w8a8")(zoo.Block)

    parent = Parent(rngs=nnx.Rngs(0))
    assert_identical(parent(tokens), plain(tokens))
    for i, block in enumerate(parent.blocks):
        parent.blocks[i] = quantize_module(block)
    floats = nnx.merge(nnx.graphdef(plain), nnx.state(dequantized_module(parent)))
    assert_close(parent(tokens), floats(tokens))
    assert_close(nnx.jit(lambda m, x: m(x))(parent, tokens), floats(tokens))


def test_class_looks_the_same():
    decorated = quantize("w8a8")(zoo.Mlp)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(decorated, name) == getattr(zoo.Mlp, name)
    assert issubclass(decorated, zoo.Mlp)
    assert decorated.encode.__name__ == "encode"
    model = decorated(rngs=nnx.Rngs(0))
    assert repr(model).split("(")[0] == "Mlp"
    flat = jax.tree_util.tree_leaves(model)
    assert len(flat) == len(jax.tree_util.tree_leaves(zoo.Mlp(rngs=nnx.Rngs(0))))


def test_methods_and_keywords():
    _, decorated, x = _make(zoo.Mlp)
    quantized, floats = _quantized(decorated)
    assert_close(quantized.encode(x), floats.encode(x))
    assert_close(quantized(x, gain=0.5), floats(x, gain=0.5))
    assert_close(quantized(x, gain=jnp.float32(0.25)), floats(x, gain=0.25))


def test_state_is_updated_in_place():
    _, decorated, x = _make(zoo.NormNet)
    quantized, floats = _quantized(decorated)
    variables = dict(nnx.to_flat_state(nnx.state(quantized)))
    kernel, mean = quantized.linear.kernel, quantized.norm.mean
    value = kernel.get_raw_value()
    for _ in range(2):
        assert_close(quantized(x), floats(x))
        assert_close(_pure(quantized, nnx.Not(nnx.Param)), _pure(floats, nnx.Not(nnx.Param)))
    assert int(quantized.count[...]) == 2
    assert quantized.linear.kernel is kernel and kernel.get_raw_value() is value
    assert quantized.norm.mean is mean and np.abs(mean[...]).max() > 0
    assert set(variables) == set(dict(nnx.to_flat_state(nnx.state(quantized))))
    step = nnx.jit(lambda m, x: m(x))
    assert_close(step(quantized, x), step(floats, x))
    assert_close(_pure(quantized, nnx.Not(nnx.Param)), _pure(floats, nnx.Not(nnx.Param)))
    quantized.eval(), floats.eval()
    assert_close(quantized(x), floats(x))


def test_structure_changes_reach_the_module():
    _, decorated, x = _make(zoo.NormNet)
    quantized, floats = _quantized(decorated)
    value = quantized.linear.kernel.get_raw_value()
    linear, count = quantized.linear, quantized.count
    for i in (1, 2):
        assert_close(quantized.counted(x), floats.counted(x))
        assert quantized.calls == floats.calls == i
        np.testing.assert_allclose(quantized.history[...], x.mean(), rtol=1e-6)
        assert isinstance(quantized.history, nnx.Cache)
    assert quantized.linear is linear and quantized.count is count
    assert quantized.linear.kernel.get_raw_value() is value
    assert type(quantized.linear) is nnx.Linear
    assert_close(_pure(quantized, nnx.Not(nnx.Param)), _pure(floats, nnx.Not(nnx.Param)))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_sow():
    _, decorated, x = _make(zoo.Sowing)
    quantized, floats = _quantized(decorated)
    for _ in range(2):
        assert_close(quantized(x), floats(x))
    assert len(quantized.h.get_value()) == 2
    assert_close(nnx.pop(quantized, nnx.Intermediate), nnx.pop(floats, nnx.Intermediate))


def test_capture():
    _, decorated, x = _make(zoo.Sowing)
    quantized, floats = _quantized(decorated)
    forward = nnx.capture(lambda m, x: m(x), nnx.Intermediate)
    assert_close(forward(quantized, x), forward(floats, x))


def test_rngs_as_argument():
    class Noisy(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(zoo.DIM, zoo.DIM, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=False)

        def __call__(self, x, *, rngs, other=None):
            y = self.drop(self.linear(x), rngs=rngs)
            return y if other is None else other(y)

    x = zoo.inputs("Mlp")
    quantized, floats = _quantized(quantize(Noisy)(rngs=nnx.Rngs(0)))
    rngs, expected_rngs = nnx.Rngs(3), nnx.Rngs(3)
    for _ in range(2):
        assert_close(quantized(x, rngs=rngs), floats(x, rngs=expected_rngs))
    assert_identical(_pure(rngs), _pure(expected_rngs))
    other, other_floats = _quantized(zoo.Mlp(rngs=nnx.Rngs(5)))
    expected = floats(x, rngs=expected_rngs, other=other_floats)
    assert_close(quantized(x, rngs=rngs, other=other), expected)


def test_decode_cache():
    attention = functools.partial(
        nnx.MultiHeadAttention, 4, zoo.DIM, decode=True, use_bias=True, rngs=nnx.Rngs(0)
    )
    decorated = quantize("w8a8")(attention())
    x = zoo.inputs("Mlp")
    quantized, floats = _quantized(decorated)
    quantized.init_cache(x.shape), floats.init_cache(x.shape)
    for i in range(3):
        token = x[:, i : i + 1]
        assert_close(quantized(token), floats(token))
    assert int(quantized.cache_index[...]) == 3
    assert_close(_pure(quantized, nnx.Cache), _pure(floats, nnx.Cache))


def test_returning_variables_and_modules():
    class Accessor(zoo.Mlp):
        def table(self):
            return self.up.kernel

        def child(self):
            return self.down

    quantized, _ = _quantized(quantize(Accessor)(rngs=nnx.Rngs(0)))
    assert quantized.table() is quantized.up.kernel
    assert quantized.child() is quantized.down


def test_method_that_looks_at_values():
    class Looping(zoo.Mlp):
        def until(self, x, limit):
            steps = 0
            while float(jnp.abs(x).max()) > limit and steps < 3:
                x, steps = self(x) * 0.5, steps + 1
            return x, steps

    x = zoo.inputs("Mlp")
    quantized, floats = _quantized(quantize(Looping)(rngs=nnx.Rngs(0)))
    (out, steps), (expected, expected_steps) = quantized.until(x, 0.2), floats.until(x, 0.2)
    assert steps == expected_steps > 0
    assert_close(out, expected)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lambda x: quantized.until(x, 0.2))(x)


def test_gradients():
    class Lora(nnx.Module):
        def __init__(self, *, rngs):
            self.base = nnx.Linear(zoo.DIM, zoo.DIM, rngs=rngs)
            self.a = nnx.LoRAParam(jax.random.normal(rngs.params(), (zoo.DIM, zoo.DIM)))

        def __call__(self, x):
            return self.base(x) + x @ self.a[...]

    x = zoo.inputs("Mlp")
    quantized, floats = _quantized(quantize(Lora)(rngs=nnx.Rngs(0)))

    def loss(model, x):
        return (model(x) ** 2).mean()

    argnums = nnx.DiffState(0, nnx.LoRAParam)
    expected = nnx.grad(loss, argnums=argnums)(floats, x)
    assert_close(nnx.grad(loss, argnums=argnums)(quantized, x), expected)
    assert_close(nnx.jit(nnx.grad(loss, argnums=argnums))(quantized, x), expected)
    assert_close(jax.grad(lambda x: loss(quantized, x))(x), jax.grad(lambda x: loss(floats, x))(x))


def test_training_beside_quantized_weights():
    class Lora(nnx.Module):
        def __init__(self, *, rngs):
            self.base = nnx.Linear(zoo.DIM, zoo.DIM, rngs=rngs)
            self.a = nnx.LoRAParam(jnp.zeros((zoo.DIM, zoo.DIM)))

        def __call__(self, x):
            return self.base(x) + x @ self.a[...]

    x = zoo.inputs("Mlp")
    quantized, _ = _quantized(quantize(Lora)(rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(quantized, optax.sgd(0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        argnums = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean(), argnums=argnums)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(quantized, optimizer, x)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert qtensor_count(nnx.state(quantized)) == 1
    assert_close(copy.deepcopy(quantized)(x), quantized(x))


def test_bridges():
    x = zoo.inputs("Mlp")
    model = nnx.bridge.ToNNX(quantize(linen.Dense)(4), rngs=nnx.Rngs(0)).lazy_init(x)
    quantized, floats = _quantized(model)
    assert_close(quantized(x), floats(x))
    inside = nnx.bridge.ToNNX(linen.Dense(4), rngs=nnx.Rngs(0)).lazy_init(x)
    decorated = quantize("w8a16")(inside)
    quantized = ptq(decorated, x, progress=False)
    assert qtensor_count(nnx.state(quantized)) == 1
    assert_close(quantized(x), dequantized_module(quantized)(x))
    module = nnx.bridge.to_linen(quantize(nnx.Linear), zoo.DIM, 4)
    variables = quantize_tree(module.init(jax.random.key(0), x))
    assert qtensor_count(variables) == 1
    assert_close(module.apply(variables, x), module.apply(dequantize_tree(variables), x))


def test_under_nnx_transforms():
    _, decorated, x = _make(zoo.Mlp)
    quantized, floats = _quantized(decorated)

    def call(m, x):
        return m(x)

    for transform in (
        nnx.remat,
        nnx.jit,
        functools.partial(nnx.vmap, in_axes=(None, 0)),
        lambda f: nnx.jit(nnx.remat(f)),
    ):
        assert_close(transform(call)(quantized, x), transform(call)(floats, x))


def test_scan_over_decorated_layers():
    class Stacked(zoo.Stacked):
        def __init__(self, *, rngs):
            layer = quantize("w8a8")(zoo.Mlp)
            self.layers = nnx.split_rngs(splits=3)(
                nnx.vmap(lambda rngs: layer(rngs=rngs), in_axes=0, out_axes=0)
            )(rngs)
            self.head = nnx.Linear(zoo.DIM, 4, rngs=rngs)

    model, plain = Stacked(rngs=nnx.Rngs(0)), zoo.Stacked(rngs=nnx.Rngs(0))
    x = zoo.inputs("Stacked")
    assert_identical(model(x), plain(x))
    model.layers = quantize_module(nnx.Dict(layers=model.layers), "layers").layers
    assert qtensor_count(nnx.state(model)) == 3
    floats = nnx.merge(nnx.graphdef(plain), nnx.state(dequantized_module(model)))
    assert_close(model(x), floats(x))


def test_inheritance():
    base = quantize(zoo.Mlp)

    class Extended(base):
        def __call__(self, x):
            return super().__call__(x) * 2

        def hidden(self, x):
            return self.mix(self.up(x))

    quantized, floats = _quantized(Extended(rngs=nnx.Rngs(0)))
    x = zoo.inputs("Mlp")
    assert_close(quantized(x), floats(x))
    assert_close(quantized.hidden(x), floats.hidden(x))


def test_float_then_quantized_then_float():
    for order in ("fqf", "qfq"):
        _, decorated, x = _make(zoo.Mlp)
        quantized, floats = _quantized(decorated)
        step = nnx.jit(lambda m, x: m(x))
        expected = {"f": zoo.Mlp(rngs=nnx.Rngs(0))(x), "q": floats(x)}
        for kind in order:
            model = decorated if kind == "f" else quantized
            assert_close(model(x), expected[kind])
            assert_close(step(model, x), expected[kind])


def test_eager_calls_trace_once():
    class Fresh(zoo.Mlp):
        pass

    quantized, _ = _quantized(quantize(Fresh)(rngs=nnx.Rngs(0)))
    x = zoo.inputs("Mlp")

    def traces(call):
        before = zoo.TRACES["calls"]
        call()
        return zoo.TRACES["calls"] - before

    assert traces(lambda: quantized(x)) == 1
    assert traces(lambda: quantized(x + 1)) == 0
    assert traces(lambda: quantized(x, gain=1)) == 1
    assert traces(lambda: quantized(x, gain=1.0)) == 1
    assert traces(lambda: quantized(x, gain=1)) == 0
    assert traces(lambda: quantized(x[:1])) == 1


def test_cached_calls_update_state():
    _, decorated, x = _make(zoo.NormNet)
    quantized, floats = _quantized(decorated)
    for i in range(3):
        assert_close(quantized(x + i), floats(x + i))
    assert_close(_pure(quantized, nnx.Not(nnx.Param)), _pure(floats, nnx.Not(nnx.Param)))


def test_variables_hold_qtensors():
    _, decorated, _ = _make(zoo.Mlp)
    quantized, _ = _quantized(decorated)
    value = quantized.up.kernel.get_value()
    assert isinstance(value, QTensor)
    graphdef, state = nnx.split(quantized)
    merged = nnx.merge(graphdef, state)
    assert_identical(merged.up.kernel.get_value(), value)
    assert_identical(nnx.clone(quantized).up.kernel.get_value(), value)
    nnx.update(quantized, state)
    assert_identical(quantized.up.kernel.get_value(), value)
    assert "QTensor" in repr(quantized) and "QTensor" in repr(state) and "int8" in str(quantized)
    assert_identical(nnx.to_pure_dict(state)["up"]["kernel"], value)
    shapes = nnx.eval_shape(lambda: quantized)
    assert isinstance(shapes.up.kernel.get_value().codes, jax.ShapeDtypeStruct)


@pytest.mark.parametrize("layer", ["linear", "embed", "einsum"])
def test_undecorated_module_names_the_fix(layer):
    rngs = nnx.Rngs(0)
    module = {
        "linear": lambda: nnx.Linear(4, 3, rngs=rngs),
        "embed": lambda: nnx.Embed(5, 4, rngs=rngs),
        "einsum": lambda: nnx.Einsum("bi,io->bo", (4, 3), rngs=rngs),
    }[layer]()
    quantized, _ = _quantized(module)
    x = jnp.zeros((2,), jnp.int32) if layer == "embed" else jnp.ones((2, 4))
    with pytest.raises(Exception, match=r"jaxquant\.quantize"):
        quantized(x)


def test_pytree_false_and_dataclass_modules():
    class Plain(nnx.Module, pytree=False):
        def __init__(self, *, rngs):
            self.layers = [nnx.Linear(4, 4, rngs=rngs)]
            self.linear = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    model = quantize(Plain)(rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4))
    quantized, floats = _quantized(model)
    assert_close(quantized(x), floats(x))
