"""The interceptors put module paths and classes into the jaxpr, for every op, whatever the loop."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.core import _compat, names
from jaxquant.frontends import describe, quantize
from jaxquant.frontends.scopes import nnx_scopes
from jaxquant.passes import PassResult
from jaxquant.passes.fuse_siblings import FuseSiblings
from tests.frontends import linen_zoo, nnx_zoo
from tests.frontends.support import quantize_module, quantize_tree


@pytest.fixture(autouse=True)
def _products_apart(monkeypatch):
    """One equation for each product: siblings in one would show the first one's name only."""
    monkeypatch.setattr(FuseSiblings, "run", lambda self, program: PassResult(program))


DOTS = ("dot_general", "conv_general_dilated")
DOTS += tuple(f"quantized_{name}" for name in DOTS)


def ops(fn, *args, primitives=DOTS):
    """``(primitive, module path, class)`` of each matrix product, outermost call first."""
    found = []

    def walk(jaxpr, outer):
        for eqn in jaxpr.eqns:
            stack = outer + _compat.name_stack_names(eqn)
            if eqn.primitive.name in primitives:
                found.append((eqn.primitive.name, *(names.innermost_module(stack) or ("?", "?"))))
                continue
            for value in eqn.params.values():
                for sub in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                        walk(_compat.open_jaxpr(sub)[0], stack)

    walk(jax.make_jaxpr(fn)(*args).jaxpr, ())
    return found


ATTENTION = [
    ("query", "DenseGeneral"),
    ("key", "DenseGeneral"),
    ("value", "DenseGeneral"),
    ("", "MultiHeadDotProductAttention"),
    ("", "MultiHeadDotProductAttention"),
    ("out", "DenseGeneral"),
]


def _block(prefix, dense=("Dense_1", "Dense_0"), attention="MultiHeadDotProductAttention_0"):
    inside = [(f"{attention}/{name}".rstrip("/"), cls) for name, cls in ATTENTION]
    return [(f"{prefix}{d}", "Dense") for d in dense] + [(f"{prefix}{n}", c) for n, c in inside]


@pytest.mark.parametrize("name", ["model", "scanned"])
def test_linen(name):
    cls, fields, args, _ = linen_zoo.make(name)
    model = quantize(cls)(**fields)
    variables = model.init(linen_zoo.keys(), *args)
    fn, tree = describe(model).pure(variables)
    prefixes = ["layers/"] if name == "scanned" else ["Block_0/", "Block_1/"]
    expected = [op for prefix in prefixes for op in _block(prefix)] + [("Embed_0", "Embed")]
    floats = ops(fn, tree, *args)
    assert [op[1:] for op in floats] == expected
    assert {op[0] for op in floats} == {"dot_general"}
    quantized = quantize_tree(variables, "layers")
    found = ops(model.apply, quantized, *args)
    assert [op[1:] for op in found] == expected
    weightless = "MultiHeadDotProductAttention"
    assert all((op[0] == "dot_general") == (op[2] == weightless) for op in found)


def test_decorated_child_knows_its_full_path():
    tokens = linen_zoo.make("model")[2][0]
    model = linen_zoo.Model(quantize(linen_zoo.Block))
    variables = model.init(linen_zoo.keys(), tokens)
    quantized = quantize_tree(variables)
    quantized["params"]["Embed_0"] = variables["params"]["Embed_0"]
    found = ops(model.apply, quantized, tokens)
    assert [op[1:] for op in found] == [*_block("Block_0/"), *_block("Block_1/"), ("?", "?")]


def test_names_inside_nn_jit_after_a_float_call():
    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(linen_zoo.ConvNet)(name="inner")(x)

    image = linen_zoo.make("conv")[2][0]
    model = quantize(Jitted)()
    variables = model.init(linen_zoo.keys(), image)
    model.apply(variables, image)  # traced and cached by nn.jit without scopes
    fn, tree = describe(model).pure(variables)
    assert [op[1:] for op in ops(fn, tree, image)] == [
        ("inner/Conv_0", "Conv"),
        ("inner/Dense_0", "Dense"),
    ]


def test_gradients_and_vmap_keep_names():
    x = linen_zoo.make("setup")[2][0]
    model = quantize(linen_zoo.SetupModel)()
    variables = model.init(linen_zoo.keys(), x)
    fn, tree = describe(model).pure(variables)
    grad = jax.grad(lambda tree, x: jax.vmap(fn, (None, 0))(tree, x).sum())
    found = ops(grad, tree, x)
    assert {op[1:] for op in found} == {("up", "Dense"), ("down_0", "Dense")}
    assert len(found) > 2


def _nnx_block(prefix):
    mlp = [("mlp/up", "Linear"), ("mlp/mix", "Einsum"), ("mlp/down", "Linear")]
    products = [("attn", "MultiHeadAttention")] * 2
    heads = [(f"attn/{name}", "LinearGeneral") for name in ("query", "key", "value")]
    every = [*mlp, *heads, *products, ("attn/out", "LinearGeneral")]
    return [(prefix + path, cls) for path, cls in every]


NNX = {
    nnx_zoo.Model: [*_nnx_block("blocks/0/"), *_nnx_block("blocks/1/"), ("embed", "Embed")],
    nnx_zoo.Stacked: [
        ("layers/up", "Linear"),
        ("layers/mix", "Einsum"),
        ("layers/down", "Linear"),
        ("head", "Linear"),
    ],
    nnx_zoo.ConvNet: [("conv", "Conv"), ("head", "Linear")],
    nnx_zoo.RawModule: [("", "RawModule"), ("", "RawModule")],
}


@pytest.mark.parametrize("cls", NNX, ids=lambda c: c.__name__)
def test_nnx(cls):
    model, x = quantize(cls)(rngs=nnx.Rngs(0)), nnx_zoo.inputs(cls.__name__)
    fn, tree = describe(model).pure()
    assert [op[1:] for op in ops(fn, tree, x)] == NNX[cls]
    graphdef, state = nnx.split(quantize_module(model, "layers"))
    found = ops(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    assert [op[1:] for op in found] == NNX[cls]
    assert sum(op[0].startswith("quantized") for op in found) >= len(found) - 4


def test_nnx_jit_inside():
    class Jitted(nnx_zoo.Mlp):
        @nnx.jit
        def __call__(self, x):
            return super().__call__(x)

    model, x = quantize(Jitted)(rngs=nnx.Rngs(0)), nnx_zoo.inputs("Mlp")
    model(x)
    fn, tree = describe(model).pure()
    expected = [("up", "Linear"), ("mix", "Einsum"), ("down", "Linear")]
    assert [op[1:] for op in ops(fn, tree, x)] == expected
    quantized = quantize_module(model)
    graphdef, state = nnx.split(quantized)
    found = ops(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    assert [op[1:] for op in found] == expected


def test_nnx_classes_are_put_back():
    model = nnx_zoo.Model(rngs=nnx.Rngs(0))
    before = [(type(m), set(vars(m))) for _, m in nnx.iter_modules(model)]
    with nnx_scopes(model):
        assert type(model) is not nnx_zoo.Model and isinstance(model, nnx_zoo.Model)
        assert type(model.embed).__name__ == "Embed"
    assert [(type(m), set(vars(m))) for _, m in nnx.iter_modules(model)] == before
    with pytest.raises(ZeroDivisionError), nnx_scopes(model):
        raise ZeroDivisionError
    assert [(type(m), set(vars(m))) for _, m in nnx.iter_modules(model)] == before


def test_scopes_change_no_values():
    x = nnx_zoo.inputs("Block")
    model = quantize(nnx_zoo.Block)(rngs=nnx.Rngs(0))
    fn, tree = describe(model).pure()
    assert jnp.array_equal(fn(tree, x), model(x))
