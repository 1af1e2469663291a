"""Linen and NNX, scanned and unrolled, cached and not: one function, one checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import next_token_loss
from tests.models import tiny

FORMS = [
    pytest.param({"scan_layers": scan, "tie_embeddings": tie}, id=f"scan={scan}-tied={tie}")
    for scan in (False, True)
    for tie in (False, True)
]


def _reference(tie_embeddings: bool) -> np.ndarray:
    """The decoder once more in numpy, float64, without any of the package's code."""
    flat, config = tiny.checkpoint(tie_embeddings), tiny.CONFIG
    w = {name: value.astype(np.float64) for name, value in flat.items()}
    tokens = np.asarray(tiny.tokens())
    length = tokens.shape[1]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    angles = np.arange(length)[:, None] * config.rope_theta ** -(np.arange(0, 4, 2) / 4)

    def rope(x):
        pairs = x[..., :2] + 1j * x[..., 2:]
        turned = pairs * np.exp(1j * angles)[:, None, :]
        return np.concatenate([turned.real, turned.imag], -1)

    x = w["embed.embedding"][tokens]
    for i in range(config.num_layers):
        layer = {n.removeprefix(f"layers.{i}."): v for n, v in w.items()}
        h = norm(x, layer["attention_norm.scale"])
        q, k, v = (
            np.einsum("btd,dhe->bthe", h, layer[f"attention.{n}.kernel"])
            for n in ("query", "key", "value")
        )
        q, k = rope(q), np.repeat(rope(k), 2, axis=2)
        scores = np.einsum("bthe,bshe->bhts", q, k) / np.sqrt(config.head_dim)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhts,bshe->bthe", p / p.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
        x = x + np.einsum("bthe,hed->btd", mixed, layer["attention.out.kernel"])
        h = norm(x, layer["mlp_norm.scale"])
        gate, up = h @ layer["mlp.gate.kernel"], h @ layer["mlp.up.kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down.kernel"]
    head = w["embed.embedding"].T if tie_embeddings else w["lm_head.kernel"]
    return norm(x, w["norm.scale"]) @ head


@pytest.mark.parametrize("form", FORMS)
def test_linen_equals_the_numpy_reference(form):
    model, variables = tiny.linen_model(**form)
    logits = jax.jit(model.apply)(variables, tiny.tokens())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, _reference(form["tie_embeddings"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_nnx_equals_linen(form):
    model, variables = tiny.linen_model(**form)
    logits = jax.jit(model.apply)(variables, tiny.tokens())
    np.testing.assert_allclose(tiny.nnx_model(**form)(tiny.tokens()), logits, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_linen_tree_has_the_checkpoints_shapes(form):
    model, variables = tiny.linen_model(**form)
    fresh = jax.eval_shape(model.init, jax.random.key(0), tiny.tokens())
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (fresh, variables)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_linen_cached_decoding_equals_the_full_forward(scan_layers):
    model, variables = tiny.linen_model(scan_layers=scan_layers)
    tokens = tiny.tokens()
    full = tiny.logits(tokens)
    cache, parts = {}, []
    for piece in (tokens[:, :5], tokens[:, 5:7], tokens[:, 7:8], tokens[:, 8:]):
        logits, cache = model.apply({**variables, **cache}, piece, decode=True, mutable=["cache"])
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=1e-5)
    assert int(cache["cache"]["index"]) == 10


@pytest.mark.parametrize("scan_layers", [False, True])
def test_nnx_cached_decoding_equals_the_full_forward(scan_layers):
    model = tiny.nnx_model(scan_layers=scan_layers)
    tokens = tiny.tokens()
    full = model(tokens)
    model.init_cache(2)
    parts = [model(piece, decode=True) for piece in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=1e-5)


def test_init_with_decode_leaves_the_cache_empty():
    model, _ = tiny.linen_model()
    cache = model.init(jax.random.key(0), tiny.tokens(), decode=True)["cache"]
    assert int(cache["index"]) == 0
    assert not np.any(cache["layers"]["attention"]["cached_key"])


def test_padding_on_the_left_changes_nothing():
    model, variables = tiny.linen_model()
    tokens = tiny.tokens(length=6)
    padded = jnp.pad(tokens, ((0, 0), (3, 0)))
    positions = jnp.broadcast_to(jnp.arange(9) - 3, padded.shape)
    logits = model.apply(variables, padded, positions=positions)
    np.testing.assert_allclose(logits[:, 3:], tiny.logits(tokens), atol=1e-5)


def test_remat_keeps_the_gradients():
    gradients = []
    for remat in (False, True):
        model, variables = tiny.linen_model(remat=remat)
        gradients.append(
            jax.jit(
                jax.grad(
                    lambda v, m=model: next_token_loss(m.apply(v, tiny.tokens()), tiny.tokens())
                )
            )(variables)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)


def test_bfloat16_computation_is_close_to_float32():
    half, variables = tiny.linen_model(dtype=jnp.bfloat16)
    full_logits = tiny.logits(tiny.tokens())
    half_logits = half.apply(variables, tiny.tokens())
    assert half_logits.dtype == jnp.float32
    error = jnp.abs(half_logits - full_logits).max() / jnp.abs(full_logits).max()
    assert 0 < error < 0.05


def test_sequences_longer_than_the_model_are_refused():
    model, variables = tiny.linen_model()
    with pytest.raises(ValueError, match="17 tokens does not fit max_length=16"):
        model.apply(variables, tiny.tokens(length=17))
    with pytest.raises(ValueError, match=r"\[batch, length\]; got shape \(10,\)"):
        model.apply(variables, tiny.tokens()[0])


def test_a_full_cache_is_an_error_in_both():
    model, variables = tiny.linen_model()
    _, cache = model.apply(variables, tiny.tokens(length=15), decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="holds 15 of max_length=16 positions; 2 more"):
        model.apply({**variables, **cache}, tiny.tokens(length=2), decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="batch_size=2; tokens have 1 rows"):
        model.apply({**variables, **cache}, tiny.tokens(1, 1), decode=True, mutable=["cache"])
    model = tiny.nnx_model()
    model.init_cache(2)
    model(tiny.tokens(length=15), decode=True)
    with pytest.raises(ValueError, match="holds 15 of max_length=16 positions; 2 more"):
        model(tiny.tokens(length=2), decode=True)


def test_nnx_decoding_needs_a_cache_of_the_right_batch():
    model = tiny.nnx_model()
    with pytest.raises(ValueError, match="call init_cache"):
        model(tiny.tokens(), decode=True)
    model.init_cache(3)
    with pytest.raises(ValueError, match="batch_size=3; tokens have 2 rows"):
        model(tiny.tokens(), decode=True)
