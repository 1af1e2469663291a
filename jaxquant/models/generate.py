"""Text generation with a KV cache: one prefill, then a loop over single tokens.

The loop knows the model only through `step(cache, tokens, positions) -> (logits, cache)`, and
hands the parameters through untouched, so float and quantized trees, Linen and NNX take one path.
Everything here is traceable; `generator` returns a jitted function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxquant.models.sampling import GREEDY, Sampling, sample

Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Generated(NamedTuple):
    """What a generation returns.

    Attributes:
      tokens: int32 [B, max_new_tokens]; `pad_id` after a row's end.
      lengths: int32 [B], tokens of each row, its end-of-sequence token included.
    """

    tokens: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class Limits:
    """When generation stops.

    Attributes:
      max_new_tokens: at most so many tokens a row.
      eos_id: a row ends with this token; None never ends early.
      pad_id: fills rows that have ended.
    """

    max_new_tokens: int
    eos_id: int | None = None
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive; got {self.max_new_tokens}")


def generate(
    model: Any,
    variables: Any,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    pad_id: int = 0,
    positions: jax.Array | None = None,
) -> Generated:
    """Continues each row of `prompt`.

    Args:
      model: a Linen or NNX `Decoder`, or whatever wraps one and keeps its `config`.
      variables: the Linen variables (without a cache), any leaves; None for an NNX model.
      prompt: int32 [B, T], left-padded if its rows differ in length (see `pad_prompts`).
      max_new_tokens: at most so many tokens a row.
      key: PRNG key; greedy sampling needs none.
      sampling: how a token is drawn.
      eos_id: a row ends with this token.
      pad_id: fills rows that have ended.
      positions: int32 [B, T], negative at padding; by default 0 ... T-1.

    Returns:
      The new tokens and their number by row.

    Raises:
      ValueError: prompt and new tokens exceed the model's `max_length`, a key is missing, or the
        prompt is empty.
    """
    limits = Limits(max_new_tokens, eos_id, pad_id)
    _check_prompt(prompt, max_new_tokens, model.config.max_length)
    if key is None:
        if sampling.temperature > 0:
            raise ValueError(f"{sampling} draws at random; give a PRNG key, or sample greedily")
        key = jax.random.key(0)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(prompt.shape[1], dtype=jnp.int32), prompt.shape)
    if isinstance(model, nn.Module):
        step, cache = linen_step(model, variables), None
    else:
        step, cache = nnx_step(model, prompt.shape[0])
    return decode_loop(step, cache, prompt, positions, key, sampling, limits)


def generator(
    model: Any, **options: Any
) -> Callable[[Any, jax.Array, jax.Array | None], Generated]:
    """A jitted `(variables, prompt, key) -> Generated`; `options` as for `generate`.

    For NNX the function takes the model's state, `nnx.state(model)`, as its variables.
    """
    if isinstance(model, nn.Module):
        return jax.jit(lambda v, prompt, key=None: generate(model, v, prompt, key=key, **options))
    graph = nnx.graphdef(model)
    return jax.jit(
        lambda state, prompt, key=None: generate(
            _merge(graph, state), None, prompt, key=key, **options
        )
    )


def linen_step(model: nn.Module, variables: Any) -> Step:
    """One cached call of a Linen model; with `cache=None` it makes the cache."""

    def step(cache: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        collections = dict(variables) if cache is None else {**variables, "cache": cache}
        logits, updated = model.apply(
            collections, tokens, decode=True, positions=positions, mutable=["cache"]
        )
        return logits, updated["cache"]

    return step


def nnx_step(model: nnx.Module, batch_size: int) -> tuple[Step, Any]:
    """One cached call of an NNX model as a pure function, and an empty cache.

    The caller's model is not touched: the cache lives in a copy.
    """
    copy = _merge(nnx.graphdef(model), nnx.state(model))
    copy.init_cache(batch_size)
    graph, *states = nnx.split(copy, nnx.Cache, ...)
    empty, rest = states

    def step(cache: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        merged = _merge(graph, cache, rest)
        logits = merged(tokens, decode=True, positions=positions)
        return logits, nnx.state(merged, nnx.Cache)

    return step, empty


def _merge(graph: Any, *states: Any) -> Any:
    """`nnx.merge` into variables of this trace: by itself it reuses those of an outer one."""
    return nnx.merge(graph, *(jax.tree.map(lambda x: x, state) for state in states))


def decode_loop(
    step: Step,
    cache: Any,
    prompt: jax.Array,
    positions: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    limits: Limits,
) -> Generated:
    """Prefills the prompt, then samples until every row has ended or the limit is reached."""
    batch = prompt.shape[0]
    logits, cache = step(cache, prompt, positions)
    first_key, key = jax.random.split(key)
    token = sample(logits[:, -1], first_key, sampling)
    tokens = jnp.full((batch, limits.max_new_tokens), limits.pad_id, jnp.int32)
    tokens = tokens.at[:, 0].set(token)
    ended = _is_end(token, limits)
    lengths = jnp.ones((batch,), jnp.int32)
    next_position = positions[:, -1:] + 1

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        count, _, _, _, ended, _, _ = carry
        return (count < limits.max_new_tokens) & ~jnp.all(ended)

    def one_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, cache, token, tokens, ended, lengths, key = carry
        logits, cache = step(cache, token[:, None], next_position + count - 1)
        draw_key, key = jax.random.split(key)
        token = jnp.where(ended, limits.pad_id, sample(logits[:, -1], draw_key, sampling))
        tokens = tokens.at[:, count].set(token)
        lengths = lengths + ~ended
        return count + 1, cache, token, tokens, ended | _is_end(token, limits), lengths, key

    carry = (jnp.int32(1), cache, token, tokens, ended, lengths, key)
    carry = jax.lax.while_loop(unfinished, one_token, carry)
    return Generated(tokens=carry[3], lengths=carry[5])


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Left-pads prompts of different lengths to one array.

    Returns:
      tokens and positions, int32 [B, T]; positions are negative at padding.

    Raises:
      ValueError: there is no prompt, or an empty one.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("prompts must be non-empty lists of token ids; start one with the bos id")
    longest = max(len(p) for p in prompts)
    tokens = np.full((len(prompts), longest), pad_id, np.int32)
    positions = np.empty_like(tokens)
    for row, prompt in enumerate(prompts):
        missing = longest - len(prompt)
        tokens[row, missing:] = prompt
        positions[row] = np.arange(longest) - missing
    return tokens, positions


def _is_end(token: jax.Array, limits: Limits) -> jax.Array:
    if limits.eos_id is None:
        return jnp.zeros(token.shape, bool)
    return token == limits.eos_id


def _check_prompt(prompt: jax.Array, max_new_tokens: int, max_length: int) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must be [batch, length >= 1]; got shape {tuple(prompt.shape)}")
    if prompt.shape[1] + max_new_tokens > max_length:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"cache's max_length={max_length}"
        )
