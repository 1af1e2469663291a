from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from jaxquant.models import DecoderConfig


def test_default_is_the_shipped_shape():
    config = DecoderConfig()
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (384, 4, 3072)


def test_config_is_frozen_and_hashable():
    config = DecoderConfig(dtype=jnp.bfloat16)
    assert hash(config) == hash(DecoderConfig(dtype=jnp.bfloat16))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5, "num_kv_heads": 2}, "num_heads=5 is not a multiple of num_kv_heads=2"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"vocab_size": 0}, "vocab_size must be a positive int; got 0"),
        ({"num_layers": 2.0}, "num_layers must be a positive int; got 2.0"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**changes)


def test_replace_checks_again():
    with pytest.raises(ValueError, match="num_kv_heads=4"):
        DecoderConfig().replace(num_kv_heads=4)
