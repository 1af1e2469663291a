"""SmoothQuant through the public function: same function, same tree, smaller error at w8a8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.models import linen as linen_model
from jaxquant.models import shipped
from jaxquant.passes.channel_flow import find_channel_groups
from jaxquant.passes.fold_transforms import FoldError
from jaxquant.passes.program import trace
from tests.passes.fold_zoo import DECODER, Encoder, gated_decoder, gated_params

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


@functools.cache
def trained(scan=True):
    return shipped.load(scan_layers=scan)


@functools.cache
def text():
    batches = shipped.held_out(2, 32, ("english", "python"))
    return [slices[0] for slices in batches.values()]


def apply_to(variables, path, value):
    def change(where, x):
        name = jax.tree_util.keystr(where, simple=True, separator="/")
        return x * value if name == path else x

    return jax.tree_util.tree_map_with_path(change, variables)


def with_outliers(variables):
    """The same function with 8 input channels of every MLP forty times as large."""
    factor = np.ones(384, np.float32)
    factor[::48] = 40
    variables = apply_to(variables, "params/layers/mlp_norm/scale", factor)
    for name in ("gate", "up"):
        path = f"params/layers/mlp/{name}/kernel"
        variables = apply_to(variables, path, 1 / factor[:, None])
    return variables


def error(model, float_tree, quantized):
    pairs = [(model.apply(float_tree, b), model.apply(quantized, b)) for b in text()]
    return float(np.mean([np.mean((np.asarray(a) - np.asarray(b)) ** 2) for a, b in pairs]))


def test_the_trained_model_loses_less_at_w8a8():
    model, variables = trained()
    model = jq.quantize("w8a8")(model)
    smoothed = jq.smooth(model, variables, calibration=text())
    assert jax.tree.structure(smoothed) == jax.tree.structure(variables)
    assert smoothed["params"]["embed"]["embedding"] is variables["params"]["embed"]["embedding"]
    plain = error(model, variables, jq.ptq(model, variables, text()[0], progress=False))
    better = error(model, variables, jq.ptq(model, smoothed, text()[0], progress=False))
    assert better < 0.95 * plain


def test_planted_outliers_are_smoothed_away():
    model, variables = trained()
    model, variables = jq.quantize("w8a8")(model), with_outliers(variables)
    plain = error(model, variables, jq.ptq(model, variables, text()[0], progress=False))
    smoothed = jq.smooth(model, variables, calibration=text())
    better = error(model, variables, jq.ptq(model, smoothed, text()[0], progress=False))
    assert better < 0.1 * plain


@pytest.mark.parametrize("scan", [True, False])
def test_linen_and_nnx_smooth_alike(scan):
    model, variables = trained(scan)
    smoothed = jq.smooth(model, variables, calibration=text()[:1])
    module = jq.smooth(shipped.load_nnx(scan_layers=scan), calibration=text()[:1])
    linen_logits = model.apply(smoothed, text()[1])
    nnx_logits = module(text()[1])
    np.testing.assert_allclose(linen_logits, model.apply(variables, text()[1]), atol=2e-4)
    np.testing.assert_allclose(nnx_logits, linen_logits, atol=2e-4)
    layer = "layers" if scan else "layers_0"
    down = smoothed["params"][layer]["mlp"]["down"]["kernel"]
    state = nnx.state(module)["layers"]
    other = (state if scan else state[0])["mlp"]["down"]["kernel"][...]
    np.testing.assert_allclose(other, down, rtol=1e-5)


def test_the_factors_are_those_of_the_paper():
    params, alpha = gated_params(), 0.7
    group = next(
        g for g in find_channel_groups(trace(gated_decoder, params, (TOKENS,)))
        if "a" in g.consumers
    )  # fmt: skip
    stats = jq.calibrate(gated_decoder, params, TOKENS, statistics="channel_absmax")
    smoothed = jq.smooth(gated_decoder, params, calibration=[TOKENS], alpha=alpha, only=["a", "z"])
    x = np.asarray(stats["a"]["channel_absmax"])  # [layers, channels]
    w = np.max([np.abs(params[k]).max(-1) for k in "abc"], axis=0)
    factors = x**alpha / w ** (1 - alpha)
    np.testing.assert_allclose(smoothed["b"] / params["b"], factors[..., None] * np.ones(8), 1e-5)
    np.testing.assert_allclose(params["g"] / smoothed["g"], factors, rtol=1e-5)
    assert group.count == factors.size
    assert smoothed["w"] is params["w"]  # its group was not chosen


def test_heads_that_share_a_value_head_share_the_larger_statistics():
    params = gated_params()
    smoothed = jq.smooth(gated_decoder, params, calibration=[TOKENS], only="d")
    ratio = np.asarray(smoothed["d"] / params["d"]).reshape(2, 2, 2, 4, 16)
    np.testing.assert_allclose(ratio[:, :, 0], ratio[:, :, 1], rtol=1e-5)
    stats = jq.calibrate(gated_decoder, params, TOKENS, statistics="channel_absmax")
    x = np.asarray(stats["d"]["channel_absmax"]).reshape(2, 2, 2, 4).max(2)
    w = np.abs(params["d"]).reshape(2, 2, 2, 4, 16).max((2, 4))
    np.testing.assert_allclose(ratio[:, :, 0, :, 0], (x / w) ** 0.5, rtol=1e-4)


def test_what_cannot_be_folded_is_left_refused_or_explicit():
    x = jax.random.normal(jax.random.key(2), (2, 3, 16))
    model = Encoder()
    variables = model.init(jax.random.key(0), x)
    kernel = lambda tree: tree["params"]["narrow"]["kernel"]  # noqa: E731
    left = jq.smooth(model, variables, calibration=[x])
    assert kernel(left) is kernel(variables)  # behind GELU
    with pytest.raises(FoldError, match="narrow/kernel"):
        jq.smooth(model, variables, calibration=[x], unfoldable="refuse")
    fn, tree = jq.smooth(model, variables, calibration=[x], unfoldable="multiply")
    assert np.abs(kernel(tree) / kernel(variables) - 1).max() > 0.1
    want = model.apply(variables, x)
    np.testing.assert_allclose(jax.jit(fn)(tree, x), want, rtol=1e-4, atol=1e-5)
    quantized = jq.quantize("w8a8")(fn)
    y = jax.jit(quantized)(jq.ptq(quantized, tree, x, progress=False), x)
    np.testing.assert_allclose(y, want, atol=0.1)


def test_dead_channels_keep_the_factor_one():
    params = {"a": jnp.eye(4), "b": jnp.ones((4, 3))}
    x = jnp.array([[1.0, 4.0, 0.0, 9.0]])
    smoothed = jq.smooth(lambda p, x: (x @ p["a"]) @ p["b"], params, calibration=[x])
    np.testing.assert_allclose(smoothed["b"][:, 0], [1, 2, 1, 3], rtol=1e-6)


def test_bad_input_is_named():
    model = linen_model.Decoder(DECODER)
    variables = model.init(jax.random.key(0), TOKENS)
    smooth = functools.partial(jq.smooth, model, variables, calibration=[TOKENS])
    with pytest.raises(ValueError, match=r"alpha=1.5 must be between 0 and 1"):
        smooth(alpha=1.5)
    with pytest.raises(ValueError, match="only='nope' matches no weight"):
        smooth(only="nope")
    with pytest.raises(ValueError, match="calibration is empty"):
        smooth(calibration=[])
    with pytest.raises(ValueError, match="give batches as calibration="):
        jq.smooth(model, variables, TOKENS, calibration=[TOKENS])
    decorated = jq.quantize("w8a8")(model)
    quantized = jq.ptq(decorated, variables, TOKENS, progress=False)
    with pytest.raises(ValueError, match="this one is quantized already"):
        jq.smooth(decorated, quantized, calibration=[TOKENS])
