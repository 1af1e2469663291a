from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxquant.models import GREEDY, Sampling, generate, generator, pad_prompts
from tests.models import tiny


def _by_full_forward(prompt: np.ndarray, count: int) -> np.ndarray:
    """Greedy continuation without a cache; what follows a position cannot change its logits."""
    length = prompt.shape[1]
    tokens = np.zeros((prompt.shape[0], tiny.CONFIG.max_length), np.int32)
    tokens[:, :length] = prompt
    for i in range(length, length + count):
        tokens[:, i] = np.argmax(tiny.logits(tokens)[:, i - 1], axis=-1)
    return tokens[:, length : length + count]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_linen_and_nnx_continue_as_the_full_forward_does(scan_layers):
    prompt = tiny.tokens(length=5)
    expected = _by_full_forward(np.asarray(prompt), 6)
    model, variables = tiny.linen_model(scan_layers=scan_layers)
    result = generator(model, max_new_tokens=6)(variables, prompt)
    np.testing.assert_array_equal(result.tokens, expected)
    np.testing.assert_array_equal(result.lengths, [6, 6])
    model = tiny.nnx_model(scan_layers=scan_layers)
    result = generator(model, max_new_tokens=6)(nnx.state(model), prompt)
    np.testing.assert_array_equal(result.tokens, expected)


def test_padded_prompts_continue_as_they_do_alone():
    model, variables = tiny.linen_model()
    prompts = [list(map(int, row[:n])) for row, n in zip(tiny.tokens(2, 7), (3, 7))]
    tokens, positions = pad_prompts(prompts)
    np.testing.assert_array_equal(positions[0], [-4, -3, -2, -1, 0, 1, 2])
    together = generate(model, variables, tokens, positions=positions, max_new_tokens=4)
    for row, prompt in enumerate(prompts):
        alone = _by_full_forward(np.asarray([prompt]), 4)
        np.testing.assert_array_equal(together.tokens[row], alone[0])


def test_a_row_ends_with_eos_and_is_padded():
    model, variables = tiny.linen_model()
    prompt = tiny.tokens(length=5)
    free = np.asarray(generate(model, variables, prompt, max_new_tokens=6).tokens)
    eos = int(free[0, 2])
    result = generate(model, variables, prompt, max_new_tokens=6, eos_id=eos, pad_id=1)
    for row in range(2):
        hits = np.flatnonzero(free[row] == eos)
        length = int(hits[0]) + 1 if hits.size else 6
        assert int(result.lengths[row]) == length
        np.testing.assert_array_equal(result.tokens[row, :length], free[row, :length])
        assert np.all(np.asarray(result.tokens[row, length:]) == 1)
    assert int(result.lengths[0]) <= 3


def test_sampling_is_reproducible_and_random():
    model, variables = tiny.linen_model()
    run = generator(model, max_new_tokens=8, sampling=Sampling(temperature=2.0))
    prompt = tiny.tokens(length=4)
    first, again, other = (run(variables, prompt, jax.random.key(s)).tokens for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))
    greedy = generator(model, max_new_tokens=8, sampling=GREEDY)(variables, prompt).tokens
    one = generator(model, max_new_tokens=8, sampling=Sampling(top_k=1))
    np.testing.assert_array_equal(one(variables, prompt, jax.random.key(3)).tokens, greedy)


@jax.tree_util.register_pytree_with_keys_class
class _Half:
    """A leaf that is no array, as a quantized weight is none."""

    def __init__(self, value):
        self.value = value

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("value"), self.value),), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_leaves_that_are_no_arrays_reach_apply_untouched(monkeypatch):
    model, variables = tiny.linen_model()
    prompt = tiny.tokens(length=5)
    expected = generate(model, variables, prompt, max_new_tokens=4).tokens
    original = type(model).apply

    def apply(self, variables, *args, **kwargs):
        leaves, tree = jax.tree.flatten(variables["params"], is_leaf=lambda x: isinstance(x, _Half))
        assert all(isinstance(leaf, _Half) for leaf in leaves)
        plain = jax.tree.unflatten(tree, [leaf.value for leaf in leaves])
        return original(self, {**variables, "params": plain}, *args, **kwargs)

    monkeypatch.setattr(type(model), "apply", apply)
    wrapped = jax.tree.map(_Half, variables)
    result = generator(model, max_new_tokens=4)(wrapped, prompt)
    np.testing.assert_array_equal(result.tokens, expected)


def test_what_does_not_fit_is_refused():
    model, variables = tiny.linen_model()
    with pytest.raises(ValueError, match="10 tokens and max_new_tokens=7 exceed.*max_length=16"):
        generate(model, variables, tiny.tokens(), max_new_tokens=7)
    with pytest.raises(ValueError, match="give a PRNG key"):
        generate(model, variables, tiny.tokens(), max_new_tokens=2, sampling=Sampling())
    with pytest.raises(ValueError, match=r"length >= 1\]; got shape \(2, 0\)"):
        generate(model, variables, tiny.tokens()[:, :0], max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens must be positive"):
        generate(model, variables, tiny.tokens(), max_new_tokens=0)
    with pytest.raises(ValueError, match="non-empty"):
        pad_prompts([[1], []])
