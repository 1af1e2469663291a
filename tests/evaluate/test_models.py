"""Flax models, Linen and NNX, decorated and not, through the same comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.core.qtensor import is_qtensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.evaluate import compare
from jaxquant.frontends import describe, quantize
from tests.evaluate import tiny

quick = functools.partial(compare, latency=False, resamples=0, progress=False)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens, *, train: bool):
        x = nn.Embed(tiny.VOCABULARY, 8)(tokens)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(tiny.VOCABULARY)(jnp.tanh(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(tiny.VOCABULARY, 8, rngs=rngs)
        self.out = nnx.Linear(8, tiny.VOCABULARY, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, tokens):
        self.calls[...] += 1
        return self.out(jnp.tanh(self.embed(tokens)))


def with_int8(tree):
    """A copy whose matrices are quantized, and one with the same values in float."""
    encode = lambda w: quantize_array(w, "int8", (w.shape[0], 1)) if w.ndim == 2 else w  # noqa: E731
    codes = jax.tree.map(encode, tree)
    floats = jax.tree.map(
        lambda w: w.dequantize() if is_qtensor(w) else w, codes, is_leaf=is_qtensor
    )
    return codes, floats


@pytest.mark.parametrize("decorated", [False, True])
def test_linen(decorated):
    model = quantize("w8a16")(Linen()) if decorated else Linen()
    tokens = tiny.tokens(0, 4, 6)
    variables = Linen().init(jax.random.key(0), tokens, train=False)
    codes, floats = with_int8(variables)
    batch = {"tokens": tokens, "train": False}
    report = quick(model, variables, codes, [batch])
    (recipe,) = report.recipes
    assert recipe.name == ("w8a16" if decorated else "quantized")
    want = quick(Linen(), variables, floats, [batch]).recipes[0].overall
    assert recipe.overall.divergence.mean.value == pytest.approx(
        want.divergence.mean.value, rel=1e-3
    )
    assert recipe.overall.divergence.mean.value > 0
    assert {w.path for w in recipe.weights} == {"Dense_0/kernel", "Embed_0/embedding"}
    assert recipe.memory.leaves == 2
    assert recipe.memory.quantized_float == 2 * 8 * tiny.VOCABULARY * 4


def test_random_keys_in_a_batch_are_the_same_for_all_candidates():
    tokens = tiny.tokens(0, 4, 6)
    variables = Linen().init(jax.random.key(0), tokens, train=False)
    batch = {"tokens": tokens, "train": True, "rngs": {"dropout": jax.random.key(1)}}
    report = quick(Linen(), variables, {"same": variables}, [batch])
    assert report["same"].overall.divergence.worst == 0
    dry = quick(Linen(), variables, variables, [{"tokens": tokens, "train": False}])
    assert report["float"].overall.loss != dry["float"].overall.loss


@pytest.mark.parametrize("decorated", [False, True])
def test_nnx(decorated):
    model = Nnx(nnx.Rngs(0))
    if decorated:
        model = quantize("w8a16")(model)
    adapter = describe(model if decorated else quantize()(model))
    _, state = adapter.pure()
    codes, floats = (adapter.with_tree(tree) for tree in with_int8(state))
    tokens = [tiny.tokens(0, 4, 6)]
    report = quick(model, None, {"int8": codes, "copy": floats}, tokens)
    got, want = report["int8"].overall, report["copy"].overall
    assert got.divergence.mean.value == pytest.approx(want.divergence.mean.value, rel=1e-3)
    assert got.divergence.mean.value > 0
    assert {w.path for w in report["int8"].weights} == {"embed/embedding", "out/kernel"}
    assert report["int8"].memory.leaves == 2
    assert int(model.calls[...]) == 0  # the user's model is as it was
    logits = np.asarray(model(tokens[0]))
    log_p = tiny.log_softmax64(logits)
    nll = -np.take_along_axis(log_p[:, :-1], tokens[0][:, 1:, None], -1).mean()
    assert report["float"].overall.loss.value == pytest.approx(nll, rel=1e-5)


def test_nnx_wants_models_and_not_trees():
    model = Nnx(nnx.Rngs(0))
    with pytest.raises(TypeError, match="recipe 'a' is a dict; without variables"):
        quick(model, None, {"a": {"b": 1}}, [tiny.tokens(0)])


def test_a_sharded_tree_is_measured_where_it_lies():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    rng = np.random.default_rng(0)
    params = {"w": jax.device_put(rng.normal(size=(16, 8)).astype(np.float32), spec)}
    codes, floats = with_int8(params)
    x = rng.normal(size=(4, 16)).astype(np.float32)
    report = quick(lambda p, x: x @ p["w"], params, {"int8": codes, "copy": floats}, [x])
    got, want = (report[name].overall.divergence.mean.value for name in ("int8", "copy"))
    assert got == pytest.approx(want, rel=1e-3)
    assert report["int8"].weights[0].sqnr_db > 30
