"""The model in the package: small, complete, and good enough to show what quantization costs."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import generator, shipped, slice_losses
from jaxquant.models.corpus import SLICES, split_documents

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

# Held-out loss in nats a token, on the first 16 rows of 128 tokens of each slice.
BOUNDS = {"english": 3.5, "python": 3.3, "arithmetic": 0.72, "json": 0.31}


@pytest.fixture(scope="module")
def shipped_model():
    return shipped.load()


def test_the_weights_are_bfloat16_and_small():
    path = shipped.ASSETS / "weights.safetensors"
    assert path.stat().st_size <= 16_000_000
    model, variables = shipped.load(scan_layers=False)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert 2_000_000 <= count <= 8_000_000
    assert abs(path.stat().st_size - 2 * count) < 10_000
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf.astype(jnp.bfloat16).astype(jnp.float32), leaf)
    assert model.config.max_length == 256


def test_held_out_loss_is_below_its_bound(shipped_model):
    model, variables = shipped_model
    groups = {name: group[:1] for name, group in shipped.held_out(16, 128).items()}
    losses = slice_losses(model.apply, variables, groups)
    assert losses.keys() == BOUNDS.keys()
    for name, bound in BOUNDS.items():
        assert losses[name] < bound, losses


def test_linen_and_nnx_agree(shipped_model):
    tokens = shipped.held_out(2, 16, ["python"])["python"][0]
    model, variables = shipped_model
    logits = model.apply(variables, tokens)
    np.testing.assert_allclose(shipped.load_nnx()(tokens), logits, atol=1e-3)


def test_it_can_add(shipped_model):
    model, variables = shipped_model
    tokenizer = shipped.tokenizer()
    prompt = tokenizer.encode("3 + 4 = 7\n5 + 2 = 7\n1 + 8 = 9\n2 + 2 =", bos=True)
    result = generator(model, max_new_tokens=3)(variables, jnp.asarray([prompt]))
    assert re.match(r" 4\n", tokenizer.decode(result.tokens[0]))


def test_held_out_batches_are_named_and_shaped():
    groups = shipped.held_out(4, 64, slices=["json", "english"])
    assert list(groups) == ["json", "english"]
    assert all(b.shape == (4, 64) and b.dtype == np.int32 for g in groups.values() for b in g)
    assert set(shipped.held_out(1, 256)) == set(SLICES)
    with pytest.raises(ValueError, match="'prose'; known slices: english, python, arithmetic"):
        shipped.held_out(1, 8, slices=["prose"])
    with pytest.raises(ValueError, match="sequence of names; got the string 'json'"):
        shipped.held_out(1, 8, slices="json")


@pytest.mark.parametrize("name", SLICES)
def test_held_out_text_is_whole_documents(name):
    documents = split_documents(shipped.held_out_text(name))
    assert len(documents) > 10
    assert 100_000 < len(shipped.held_out_text(name)) < 210_000
    tokens = shipped.held_out_tokens(name)
    assert np.sum(tokens == shipped.tokenizer().bos_id) == len(documents)


def test_the_training_record_tells_what_was_done():
    record = json.loads((shipped.ASSETS / "training.json").read_text())
    assert set(record["sources"]) == set(record["held_out_loss"]) == set(SLICES)
    assert record["tokens"] == record["steps"] * 16 * 256
    assert {"criterion", "met"} <= set(record["verdict"])
    for name in SLICES:
        text = shipped.held_out_text(name)
        assert record["sources"][name]["held_out_documents"] == len(split_documents(text))


def test_other_settings_can_be_chosen():
    config = shipped.shipped_config(max_length=512, dtype=jnp.bfloat16)
    assert config.max_length == 512
    assert config.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="depth"):
        shipped.load(depth=3)
