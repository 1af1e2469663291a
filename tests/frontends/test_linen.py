"""Decorated Linen classes: float as undecorated, quantized as dequantize-then-float."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct

from jaxquant.core.qtensor import is_qtensor
from jaxquant.frontends import quantize
from tests.frontends import linen_zoo as zoo
from tests.frontends.support import (
    assert_close,
    assert_identical,
    dequantize_tree,
    qtensor_count,
    quantize_tree,
)


def _setup(name):
    cls, fields, args, kwargs = zoo.make(name)
    plain, decorated = cls(**fields), quantize("w8a8")(cls)(**fields)
    return plain, decorated, args, kwargs


def _quantized(variables):
    stacked = "layers" if "layers" in variables["params"] else "\0"
    quantized = quantize_tree(variables, stacked)
    assert qtensor_count(quantized) > 0
    return quantized


@pytest.mark.parametrize("name", zoo.NAMES)
def test_float_is_bit_identical(name):
    plain, decorated, args, kwargs = _setup(name)
    variables = plain.init(zoo.keys(), *args, **kwargs)
    assert_identical(decorated.init(zoo.keys(), *args, **kwargs), variables)
    out, again = decorated.init_with_output(zoo.keys(), *args, **kwargs)
    assert_identical((out, again), plain.init_with_output(zoo.keys(), *args, **kwargs))
    expected = plain.apply(variables, *args, **kwargs)
    assert_identical(decorated.apply(variables, *args, **kwargs), expected)
    run = jax.jit(functools.partial(decorated.apply, **kwargs))
    plain_run = jax.jit(functools.partial(plain.apply, **kwargs))
    assert_identical(run(variables, *args), plain_run(variables, *args))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_quantized_is_dequantize_then_float(name):
    plain, decorated, args, kwargs = _setup(name)
    variables = plain.init(zoo.keys(), *args, **kwargs)
    quantized = _quantized(variables)
    expected = plain.apply(dequantize_tree(quantized), *args, **kwargs)
    assert_close(decorated.apply(quantized, *args, **kwargs), expected)
    run = jax.jit(functools.partial(decorated.apply, **kwargs))
    assert_close(run(quantized, *args), expected)


@pytest.mark.parametrize("scanned", [False, True])
def test_submodule_of_undecorated_model(scanned):
    parent = zoo.Scanned if scanned else zoo.Model
    tokens = zoo.make("model")[2][0]
    plain, decorated = parent(zoo.Block), parent(quantize("w4a16_g128")(zoo.Block))
    variables = plain.init(zoo.keys(), tokens)
    assert_identical(decorated.init(zoo.keys(), tokens), variables)
    quantized = _quantized(variables)
    # the embedding belongs to the undecorated parent
    quantized["params"]["Embed_0"] = variables["params"]["Embed_0"]
    expected = plain.apply(dequantize_tree(quantized), tokens)
    for call in (decorated.apply, jax.jit(decorated.apply)):
        assert_close(call(quantized, tokens), expected)
    out, sown = decorated.apply(quantized, tokens, mutable="intermediates")
    assert_close(
        (out, sown), plain.apply(dequantize_tree(quantized), tokens, mutable="intermediates")
    )


def test_submodule_inside_decorated_model():
    decorated = quantize("w8a8")(zoo.Model)(quantize("w8a16")(zoo.Block))
    tokens = zoo.make("model")[2][0]
    variables = zoo.Model().init(zoo.keys(), tokens)
    quantized = _quantized(variables)
    assert_identical(decorated.apply(variables, tokens), zoo.Model().apply(variables, tokens))
    assert_close(
        decorated.apply(quantized, tokens), zoo.Model().apply(dequantize_tree(quantized), tokens)
    )


def test_class_looks_the_same():
    decorated = quantize("w8a8")(zoo.SetupModel)
    assert decorated.__name__ == "SetupModel"
    assert decorated.__qualname__ == zoo.SetupModel.__qualname__
    assert decorated.__module__ == zoo.SetupModel.__module__
    assert decorated.__doc__ == zoo.SetupModel.__doc__
    assert issubclass(decorated, zoo.SetupModel)
    fields = [(f.name, f.default) for f in dataclasses.fields(decorated)]
    assert fields == [(f.name, f.default) for f in dataclasses.fields(zoo.SetupModel)]
    assert decorated(7).clone(name="x") == decorated(7, name="x")
    assert hash(decorated(7)) == hash(decorated(7)) != hash(decorated(8))
    assert decorated(7).describe() == "hidden 7"
    assert decorated(7).width == 7
    assert repr(decorated(7)) == repr(zoo.SetupModel(7))
    assert decorated.encode.__name__ == "encode"


@quantize("w8a8")
class Pickled(nn.Module):
    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width)(x)


def test_module_level_class_pickles():
    assert pickle.loads(pickle.dumps(Pickled(5))) == Pickled(5)


@pytest.mark.parametrize("method", ["encode", zoo.SetupModel.encode, "lambda", "decorated"])
def test_methods(method):
    decorated_class = quantize(zoo.SetupModel)
    plain, decorated = zoo.SetupModel(), decorated_class()
    x = zoo.make("setup")[2][0]
    variables = plain.init(zoo.keys(), x, which=0)
    variables = plain.init(zoo.keys(), x, which=1) | {}
    variables["params"]["down_0"] = {"kernel": jnp.ones((24, 16)), "bias": jnp.ones(16)}
    quantized = _quantized(variables)
    if method == "lambda":  # reaches a child directly
        method = plain_method = lambda m, x: m.up(x) * 2
    elif method == "decorated":
        method, plain_method = decorated.encode, zoo.SetupModel.encode
    else:
        plain_method = method
    expected = plain.apply(dequantize_tree(quantized), x, method=plain_method)
    assert_close(decorated.apply(quantized, x, method=method), expected)
    floats = plain.apply(variables, x, method=plain_method)
    assert_identical(decorated.apply(variables, x, method=method), floats)


def test_bind_and_keyword_only():
    x = zoo.make("setup")[2][0]
    plain, decorated = zoo.SetupModel(), quantize(zoo.SetupModel)()
    variables = plain.init(zoo.keys(), x, which=1)
    quantized = _quantized(variables)
    bound, expected = decorated.bind(quantized), plain.bind(dequantize_tree(quantized))
    h = bound.encode(x)
    assert_close(h, expected.encode(x))
    assert_close(bound.decode(h, which=1), expected.decode(h, which=1))
    assert_close(bound(x, which=1), expected(x, which=1))
    assert_identical(decorated.bind(variables)(x, which=1), plain.bind(variables)(x, which=1))


def test_batch_stats_and_mutable_collections():
    plain, decorated = zoo.NormNet(), quantize(zoo.NormNet)()
    x = zoo.make("block")[2][0]
    variables = plain.init(zoo.keys(), x, train=True)
    assert_identical(decorated.init(zoo.keys(), x, train=True), variables)
    quantized = _quantized(variables)
    floats = dequantize_tree(quantized)
    for train in (True, False):
        for mutable in (["batch_stats", "cache"], "cache", True, nn.DenyList("params")):
            if train and mutable == "cache":
                continue
            expected = plain.apply(floats, x, train=train, mutable=mutable)
            out, new = decorated.apply(quantized, x, train=train, mutable=mutable)
            assert_close(out, expected[0])
            assert_close(
                {k: v for k, v in new.items() if k != "params"},
                {k: v for k, v in expected[1].items() if k != "params"},
            )
            assert int(new["cache"]["count"]) == 1
            if mutable is True:  # parameters come back as the very same QTensors
                before = jax.tree_util.tree_leaves(quantized["params"], is_leaf=is_qtensor)
                after = jax.tree_util.tree_leaves(new["params"], is_leaf=is_qtensor)
                assert all(a is b for a, b in zip(after, before, strict=True))


def test_dropout_uses_the_same_rng_stream():
    plain, decorated, (x,), _ = _setup("block")
    variables = plain.init(zoo.keys(), x)
    quantized = _quantized(variables)
    rngs = {"dropout": jax.random.key(7)}
    expected = plain.apply(dequantize_tree(quantized), x, train=True, rngs=rngs)
    assert_close(decorated.apply(quantized, x, train=True, rngs=rngs), expected)
    assert_identical(
        decorated.apply(variables, x, train=True, rngs=rngs),
        plain.apply(variables, x, train=True, rngs=rngs),
    )
    # inside an undecorated parent, several decorated children in turn
    parent, plain_parent = zoo.Model(quantize(zoo.Block)), zoo.Model()
    tokens = zoo.make("model")[2][0]
    variables = plain_parent.init(zoo.keys(), tokens)
    quantized = _quantized(variables)
    quantized["params"]["Embed_0"] = variables["params"]["Embed_0"]
    expected = plain_parent.apply(dequantize_tree(quantized), tokens, train=True, rngs=rngs)
    assert_close(parent.apply(quantized, tokens, train=True, rngs=rngs), expected)


@pytest.mark.parametrize("capture", [True, lambda m, name: isinstance(m, nn.Dense)])
def test_capture_intermediates(capture):
    plain, decorated, (x,), _ = _setup("block")
    quantized = _quantized(plain.init(zoo.keys(), x))
    options = {"capture_intermediates": capture}
    expected = plain.apply(dequantize_tree(quantized), x, **options)
    assert_close(decorated.apply(quantized, x, **options), expected)
    bound_parent = zoo.Model(quantize(zoo.Block), layers=1)
    tokens = zoo.make("model")[2][0]
    variables = zoo.Model(layers=1).init(zoo.keys(), tokens)
    quantized = _quantized(variables)
    quantized["params"]["Embed_0"] = variables["params"]["Embed_0"]
    expected = zoo.Model(layers=1).apply(dequantize_tree(quantized), tokens, **options)
    assert_close(bound_parent.apply(quantized, tokens, **options), expected)


def test_module_fields_and_other_outputs():
    x = zoo.make("block")[2][0]
    plain = zoo.Caller(zoo.Block())
    variables = plain.init(zoo.keys(), x)
    quantized = _quantized(variables)
    expected = plain.apply(dequantize_tree(quantized), x, rngs_scale=0.5, mode="loud")
    for decorated in (
        quantize(zoo.Caller)(zoo.Block()),
        zoo.Caller(quantize(zoo.Block)()),
        quantize("w8a16")(zoo.Caller(zoo.Block())),
    ):
        out = decorated.apply(quantized, x, rngs_scale=0.5, mode="loud")
        assert (out["mode"], out["count"]) == ("loud", 3)
        assert_close(out["y"], expected["y"])


def test_many_bound_modules_as_arguments():
    """More than ten scopes: their order must survive JAX's sorting of dict keys."""

    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x, layers):
            total = sum(layer(x) * (i + 1) / 12 for i, layer in enumerate(layers))
            return nn.Dense(zoo.DIM, name="own")(total)

    class Many(nn.Module):
        mixer: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            layers = [nn.Dense(zoo.DIM, name=f"l{i}") for i in range(12)]
            return self.mixer(name="mixer")(x, layers)

    x = zoo.make("block")[2][0]
    plain, decorated = Many(Mixer), Many(quantize(Mixer))
    variables = plain.init(zoo.keys(), x)
    assert_identical(decorated.init(zoo.keys(), x), variables)
    quantized = _quantized(variables)
    assert_close(decorated.apply(quantized, x), plain.apply(dequantize_tree(quantized), x))


class Shared(nn.Module):
    """A decorated child that is given its parent's embedding as a bound module."""

    head: type[nn.Module]

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(zoo.VOCAB, zoo.DIM, name="table")
        return self.head(embed=embed)(jnp.take(jnp.eye(zoo.DIM), tokens % zoo.DIM, axis=0))


class Head(nn.Module):
    embed: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.embed.attend(nn.Dense(zoo.DIM)(x))


def test_bound_module_as_field():
    tokens = zoo.make("model")[2][0]
    plain, decorated = Shared(Head), Shared(quantize(Head))
    variables = plain.init(zoo.keys(), tokens)
    assert_identical(decorated.init(zoo.keys(), tokens), variables)
    quantized = _quantized(variables)
    expected = plain.apply(dequantize_tree(quantized), tokens)
    assert_close(decorated.apply(quantized, tokens), expected)
    only_shared = variables | {"params": dict(variables["params"])}
    only_shared["params"]["table"] = quantized["params"]["table"]
    expected = plain.apply(dequantize_tree(only_shared), tokens)
    assert_close(decorated.apply(only_shared, tokens), expected)


def test_inheritance():
    base = quantize(zoo.SetupModel)

    class Extended(base):
        gain: float = 3.0

        def __call__(self, x, which: int = 0):
            return super().__call__(x, which) * self.gain

        def logits(self, x):
            return self.up(x)

    class PlainExtended(zoo.SetupModel):
        gain: float = 3.0

        def __call__(self, x, which: int = 0):
            return super().__call__(x, which) * self.gain

        def logits(self, x):
            return self.up(x)

    x = zoo.make("setup")[2][0]
    plain, decorated = PlainExtended(gain=2.0), Extended(gain=2.0)
    variables = plain.init(zoo.keys(), x)
    quantized = _quantized(variables)
    assert_identical(decorated.apply(variables, x), plain.apply(variables, x))
    expected = plain.bind(dequantize_tree(quantized))
    assert_close(decorated.apply(quantized, x), expected(x))
    assert_close(decorated.bind(quantized)(x), expected(x))
    assert_close(decorated.bind(quantized).logits(x), expected.logits(x))


def test_super_calls_with_cell():
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="a")(x)

    @quantize
    class Child(Base):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="b")(super().__call__(x))

    x = jnp.ones((2, 4))
    variables = Child().init(jax.random.key(0), x)
    assert set(variables["params"]) == {"a", "b"}
    quantized = _quantized(variables)
    assert_close(Child().apply(quantized, x), Child().apply(dequantize_tree(quantized), x))


@pytest.mark.parametrize("transform", ["jit", "vmap", "while", "cond", "remat", "jit_outside"])
def test_under_linen_transforms(transform):
    x = zoo.make("block")[2][0]

    class Parent(nn.Module):
        child: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            if transform == "jit":
                return nn.jit(self.child)(name="c")(x)
            if transform == "remat":
                return nn.remat(self.child)(name="c")(x)
            if transform == "vmap":
                mapped = nn.vmap(
                    self.child,
                    variable_axes={"params": 0, "intermediates": 0},
                    split_rngs={"params": True},
                    axis_size=2,
                    in_axes=0,
                )
                return mapped(name="layers")(x)
            child = self.child(name="c")
            if transform == "cond" and not self.is_initializing():
                return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: m(-x), child, x)
            if transform == "while":
                if self.is_initializing():
                    return child(x)
                return nn.while_loop(
                    lambda m, c: c[0] < 3,
                    lambda m, c: (c[0] + 1, m(c[1])),
                    child,
                    (0, x),
                )[1]
            return child(x)

    plain = Parent(zoo.Block)
    decorated = Parent(quantize(zoo.Block))
    if transform == "jit_outside":
        plain, decorated = nn.jit(Parent)(zoo.Block), nn.jit(quantize(Parent))(zoo.Block)
    variables = {"params": plain.init(zoo.keys(), x)["params"]}
    assert_identical({"params": decorated.init(zoo.keys(), x)["params"]}, variables)
    quantized = _quantized(variables)
    expected = plain.apply(dequantize_tree(quantized), x)
    assert_close(decorated.apply(quantized, x), expected)
    assert_close(jax.jit(decorated.apply)(quantized, x), expected)
    assert_close(decorated.apply(variables, x), plain.apply(variables, x))


def test_share_scope():
    class Lora(nn.Module):
        def setup(self):
            self.child = nn.Dense(8)
            nn.share_scope(self, self.child)

        @nn.compact
        def __call__(self, x):
            a = self.param("a", nn.initializers.normal(), (x.shape[-1], 2))
            b = self.param("b", nn.initializers.normal(), (2, 8))
            return self.child(x) + x @ a @ b

    class Parent(nn.Module):
        child: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return self.child()(x)

    x = zoo.make("block")[2][0]
    for plain, decorated in (
        (Lora(), quantize(Lora)()),
        (Parent(Lora), Parent(quantize(Lora))),
        (Parent(Lora), quantize(Parent)(Lora)),
    ):
        variables = plain.init(zoo.keys(), x)
        assert_identical(decorated.init(zoo.keys(), x), variables)
        quantized = _quantized(variables)
        expected = plain.apply(dequantize_tree(quantized), x)
        assert_close(decorated.apply(quantized, x), expected)


def test_partitioned_boxes():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(8, kernel_init=init)(x)

    x = zoo.make("block")[2][0]
    plain, decorated = Boxed(), quantize(Boxed)()
    variables = plain.init(zoo.keys(), x)
    assert_identical(decorated.init(zoo.keys(), x), variables)
    quantized = _quantized(variables)
    assert isinstance(quantized["params"]["Dense_0"]["kernel"], nn.Partitioned)
    expected = plain.apply(dequantize_tree(quantized), x)
    assert_close(decorated.apply(quantized, x), expected)
    assert_close(decorated.bind(quantized)(x), expected)


def test_float_then_quantized_then_float():
    tokens = zoo.make("model")[2][0]
    plain = zoo.Model()
    variables = plain.init(zoo.keys(), tokens)
    quantized = _quantized(variables)
    expected = plain.apply(variables, tokens)
    expected_q = plain.apply(dequantize_tree(quantized), tokens)
    for order in ("fqf", "qfq"):
        decorated = quantize("w8a8")(zoo.Model)(zoo.Block)
        run = jax.jit(decorated.apply)
        for kind in order:
            tree, want = (variables, expected) if kind == "f" else (quantized, expected_q)
            assert_close(decorated.apply(tree, tokens), want)
            assert_close(run(tree, tokens), want)


def test_eager_calls_trace_once():
    tokens = zoo.make("model")[2][0]

    class Fresh(zoo.Model):
        pass

    decorated = quantize(Fresh)(layers=1)
    variables = decorated.init(zoo.keys(), tokens)
    quantized = _quantized(variables)

    def traces(call):
        before = zoo.TRACES["calls"]
        call()
        return zoo.TRACES["calls"] - before

    assert traces(lambda: decorated.apply(quantized, tokens)) == 1
    assert traces(lambda: decorated.apply(quantized, tokens + 1)) == 0
    assert traces(lambda: decorated.clone().apply(quantized, tokens)) == 0
    assert traces(lambda: decorated.apply(quantized, tokens, train=False)) == 1  # another call
    assert traces(lambda: decorated.apply(quantized, tokens, train=False)) == 0
    rngs = {"dropout": jax.random.key(0)}
    assert traces(lambda: decorated.apply(quantized, tokens, train=True, rngs=rngs)) == 1
    rngs = {"dropout": jax.random.key(1)}
    assert traces(lambda: decorated.apply(quantized, tokens, train=True, rngs=rngs)) == 0
    assert traces(lambda: decorated.apply(quantized, tokens[:1])) == 1
    assert traces(lambda: decorated.apply(quantized, tokens, mutable=["intermediates"])) == 1
    assert traces(lambda: decorated.apply(quantized, tokens, mutable=["intermediates"])) == 0


def test_eager_cache_tells_modules_apart():
    class Scaled(nn.Module):
        factor: object
        shape: object = None

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, use_bias=False)(x) * self.factor

    decorated = quantize(Scaled)
    x = jnp.ones((2, 3), jnp.bfloat16)
    quantized = _quantized(decorated(1).init(jax.random.key(0), x))
    one = decorated(1).apply(quantized, x)
    for factor in (2, 1.0, True, np.float32(1), jnp.float32(3), [2][0]):
        expected = Scaled(factor).apply(dequantize_tree(quantized), x)
        out = decorated(factor).apply(quantized, x)
        assert out.dtype == expected.dtype
        assert_close(out, expected)
    assert_close(decorated(1, shape={"a": [1, 2]}).apply(quantized, x), one)


def test_unhashable_module_still_works():
    class Constant(nn.Module):
        table: object

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x) + self.table

    decorated = quantize(Constant)
    x = jnp.ones((2, 3))
    for value in (1.0, 2.0):
        table = jnp.full(4, value)
        variables = Constant(table).init(jax.random.key(0), x)
        quantized = _quantized(variables)
        expected = Constant(table).apply(dequantize_tree(quantized), x)
        assert_close(decorated(table).apply(quantized, x), expected)


def test_user_interceptors_run_at_every_call():
    tokens = zoo.make("model")[2][0]
    decorated = quantize(zoo.Model)(layers=1)
    quantized = _quantized(decorated.init(zoo.keys(), tokens))
    seen = []

    def spy(next_fun, args, kwargs, context):
        seen.append(context.method_name)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(spy):
        decorated.apply(quantized, tokens)
        count = len(seen)
        decorated.apply(quantized, tokens)
    assert count > 3 and len(seen) == 2 * count


def test_method_that_looks_at_values():
    class Looping(zoo.SetupModel):
        def until(self, x, limit):
            steps = 0
            while jnp.abs(x).max() > limit and steps < 3:
                x, steps = self(x) * 0.5, steps + 1
            return x, steps

    x = zoo.make("setup")[2][0]
    plain, decorated = Looping(), quantize(Looping)()
    variables = plain.init(zoo.keys(), x)
    quantized = _quantized(variables)
    expected, steps = plain.bind(dequantize_tree(quantized)).until(x, 0.1)
    assert steps > 0
    for out, count in (
        decorated.apply(quantized, x, 0.1, method="until"),
        decorated.bind(quantized).until(x, 0.1),
    ):
        assert count == steps
        assert_close(out, expected)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lambda q: decorated.apply(q, x, 0.1, method="until"))(quantized)


@pytest.mark.parametrize("layer", ["dense", "embed", "einsum"])
def test_undecorated_module_names_the_fix(layer):
    x = jnp.ones((2, 4))
    module = {
        "dense": nn.Dense(3),
        "embed": nn.Embed(5, 4),
        "einsum": nn.Einsum((4, 3), "bi,io->bo"),
    }[layer]
    if layer == "embed":
        x = jnp.zeros((2,), jnp.int32)
    quantized = _quantized(module.init(jax.random.key(0), x))
    with pytest.raises(Exception, match=r"decorate|jaxquant\.quantize"):
        module.apply(quantized, x)


def test_bound_instance_is_refused():
    with pytest.raises(ValueError, match="already bound"):
        quantize(nn.Dense(3).bind({"params": {}}))


def test_struct_outputs_keep_their_type():
    @struct.dataclass
    class Out:
        y: jax.Array
        tag: str = struct.field(pytree_node=False)

    @quantize
    class M(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Out(nn.Dense(2)(x), "t")

    x = jnp.ones((1, 3))
    variables = M().init(jax.random.key(0), x)
    out = M().apply(_quantized(variables), x)
    assert isinstance(out, Out) and out.tag == "t" and out.y.shape == (1, 2)
