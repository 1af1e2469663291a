from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import next_token_loss, perplexity, slice_losses
from tests.models import tiny


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    loss = next_token_loss(jnp.zeros((2, 10, 61)), tiny.tokens())
    np.testing.assert_allclose(loss, np.log(61), rtol=1e-6)
    np.testing.assert_allclose(perplexity(float(loss)), 61, rtol=1e-5)


def test_targets_are_the_following_tokens():
    tokens = jnp.array([[1, 2, 0]])
    logits = 50.0 * jnp.eye(3)[jnp.array([[2, 0, 1]])]  # right about 2 and 0; the last is unused
    assert float(next_token_loss(logits, tokens)) < 1e-6
    assert float(next_token_loss(logits[:, :2], tokens)) < 1e-6
    assert float(next_token_loss(logits[:, ::-1], tokens)) > 10
    with pytest.raises(ValueError, match="do not line up"):
        next_token_loss(logits[:, :1], tokens)


def test_slices_are_averaged_apart():
    model, variables = tiny.linen_model()
    tokens = np.asarray(tiny.tokens(batch=4))
    losses = slice_losses(
        model.apply, variables, {"a": [tokens[:2], tokens[2:]], "b": [tokens[2:]]}
    )
    whole = next_token_loss(tiny.logits(tokens), jnp.asarray(tokens))
    np.testing.assert_allclose(losses["a"], whole, rtol=1e-5)
    assert abs(losses["a"] - losses["b"]) > 1e-3
