"""Rotation through the public function: same function, same tree, smaller error at w8a8."""

import functools

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models import linen as linen_model
from jaxquant.models import shipped
from jaxquant.passes.fold_transforms import FoldError
from tests.passes.fold_zoo import DECODER, gated_decoder, gated_params

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


@functools.cache
def text():
    batches = shipped.held_out(2, 32, ("english", "python"))
    return [slices[0] for slices in batches.values()]


def mean_error(fn, tree, want):
    outs = [np.asarray(jax.jit(fn)(tree, b)) for b in text()]
    return float(np.mean([np.mean((a - b) ** 2) for a, b in zip(outs, want)]))


def test_the_trained_model_loses_less_at_w8a8():
    """Its head is tied to the embedding, so the stream needs two explicit rotations."""
    model, variables = shipped.load()
    with pytest.raises(FoldError, match="norm/scale cannot be folded"):
        jq.rotate(model, variables, text()[0])
    fn, tree = jq.rotate(model, variables, text()[0], online=True)
    assert jax.tree.structure(tree) == jax.tree.structure(variables)
    want = [np.asarray(model.apply(variables, b)) for b in text()]
    assert mean_error(fn, tree, want) < 1e-9
    plain, turned = jq.quantize("w8a8")(model), jq.quantize("w8a8")(fn)
    before = jq.ptq(plain, variables, text()[0], progress=False)
    after = jq.ptq(turned, tree, text()[0], progress=False)
    assert mean_error(turned, after, want) < 0.6 * mean_error(plain.apply, before, want)


def test_a_model_with_its_own_head_keeps_its_code():
    config = DECODER.replace(tie_embeddings=False)
    model = linen_model.Decoder(config)
    variables = model.init(jax.random.key(0), TOKENS)
    turned = jq.rotate(model, variables, TOKENS)
    assert jax.tree.structure(turned) == jax.tree.structure(variables)
    want = model.apply(variables, TOKENS)
    np.testing.assert_allclose(model.apply(turned, TOKENS), want, atol=1e-5)
    other = jq.rotate(model, variables, TOKENS, seed=1)
    assert not np.allclose(
        other["params"]["embed"]["embedding"], turned["params"]["embed"]["embedding"]
    )


def test_nnx():
    module = shipped.load_nnx()
    fn, state = jq.rotate(module, text()[0], online=True)
    want = np.asarray(module(text()[1]))
    np.testing.assert_allclose(jax.jit(fn)(state, text()[1]), want, atol=1e-3 * np.abs(want).max())


def test_smooth_after_rotate():
    """The pair that comes back is a model like any other."""
    fn, tree = jq.rotate(gated_decoder, gated_params(), TOKENS, online=True)
    smoothed = jq.smooth(fn, tree, calibration=[TOKENS])
    want = gated_decoder(gated_params(), TOKENS)
    np.testing.assert_allclose(jax.jit(fn)(smoothed, TOKENS), want, rtol=1e-3, atol=1e-4)


def test_a_function_under_jit_and_grad():
    fn, tree = jq.rotate(gated_decoder, gated_params(), TOKENS, online=True)
    want = jax.grad(lambda p: gated_decoder(p, TOKENS).sum())(gated_params())["z"]
    got = jax.jit(jax.grad(lambda p: fn(p, TOKENS).sum()))(tree)["z"]
    assert got.shape == want.shape and np.isfinite(got).all()


def test_quantized_trees_are_refused():
    model = jq.quantize("w8a8")(linen_model.Decoder(DECODER))
    variables = model.init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="rotate takes the float tree"):
        jq.rotate(model, jq.ptq(model, variables, TOKENS, progress=False), TOKENS)
    with pytest.raises(ValueError, match="give arrays, not shapes"):
        jq.rotate(model, jax.eval_shape(lambda: variables), TOKENS)
