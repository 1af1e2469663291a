"""Figure of quality: every recipe on the trained model, slice by slice, beside Qwix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from benchmarks import peer_qwix
from benchmarks.harness import Figure
from jaxquant.models import shipped

_RECIPES = ("w8a8", "w8a16", "fp8", "w4a16_g128", "w4a16_g64", "w4a8", "nf4", "mxfp4", "nvfp4")
_RECIPES += ("w3a16", "w2a16", "w1a16")


def quality(quick: bool) -> Figure:
    """Mean KL divergence to the float model in nats a token, and the loss, by slice."""
    batches = 1 if quick else 4
    recipes = _RECIPES[:2] if quick else _RECIPES
    data = {name: group[:batches] for name, group in shipped.held_out(8, 256).items()}
    model, variables = shipped.load(scan_layers=False)
    example = next(iter(data.values()))[0]
    floats = Scores(model.apply, variables, data)
    table = [floats.row("float32", "", floats)]
    met = {}
    notes = []
    for preset in recipes:
        whole = jq.quantize(preset)(model)
        tree = jq.ptq(whole, variables, example)
        table.append(Scores(whole.apply, tree, data).row("jaxquant", preset, floats))
        if preset not in peer_qwix.SCHEMES:
            continue
        recipe = jq.get_recipe(preset).with_rules(jq.Rule("embed/**", skip=True))
        same = jq.quantize(recipe)(model)
        tree = jq.ptq(same, variables, example)
        ours = Scores(same.apply, tree, data).row("jaxquant, float embedding", preset, floats)
        try:
            theirs_fn, tree = peer_qwix.quantized(model, variables["params"], preset, example)
        except ValueError as error:
            notes.append(f"Qwix cannot do {preset} here: {error}")
            table.append(ours)
            continue
        theirs = Scores(theirs_fn, tree, data).row("Qwix, float embedding", preset, floats)
        table += [ours, theirs]
        met[preset] = ours["KL"] <= 1.02 * theirs["KL"]
    return Figure(
        title="Quality of every recipe on the trained model, held-out text",
        target="measured, by slice; no worse than Qwix on the same ops (2% of KL for rounding)",
        rows=table,
        met=met,
        notes=[
            f"{batches} batches of 8x256 tokens of every slice. KL: mean divergence to the float "
            f"model "
            "in nats a token; the tail is its 99th percentile; agreement: share of equal top-1 "
            "predictions; loss: nats a token.",
            *notes,
        ],
    )


class Scores:
    """Log-probabilities of one model on all slices; the same few lines for both libraries."""

    def __init__(
        self, fn: Callable[..., Any], tree: Any, data: Mapping[str, Sequence[np.ndarray]]
    ) -> None:
        run = jax.jit(lambda tree, tokens: jax.nn.log_softmax(fn(tree, tokens), axis=-1))
        self.logp = {
            name: [run(tree, jnp.asarray(tokens)) for tokens in group]
            for name, group in data.items()
        }
        self.data = data

    def row(self, library: str, preset: str, floats: Scores) -> dict[str, Any]:
        """The table's line, against the float model's scores."""
        kls, losses, agreed = {}, {}, []
        for name, group in self.data.items():
            parts = [_compare(p, q) for p, q in zip(floats.logp[name], self.logp[name])]
            kls[name] = np.concatenate([kl for kl, _ in parts])
            agreed += [same for _, same in parts]
            losses[name] = np.mean(
                [float(_loss(q, jnp.asarray(t))) for q, t in zip(self.logp[name], group)]
            )
        together = np.concatenate(list(kls.values()))
        return {
            "library": library,
            "recipe": preset,
            "KL": float(together.mean()),
            "KL p99": float(np.quantile(together, 0.99)),
            "agreement": float(np.concatenate(agreed).mean()),
            **{f"KL {name}": float(values.mean()) for name, values in kls.items()},
            **{f"loss {name}": float(value) for name, value in losses.items()},
        }


@jax.jit
def _divergence(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1), jnp.argmax(p, -1) == jnp.argmax(q, -1)


def _compare(p: jax.Array, q: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    kl, same = _divergence(p, q)
    return np.asarray(kl).ravel(), np.asarray(same).ravel()


@jax.jit
def _loss(logp: jax.Array, tokens: jax.Array) -> jax.Array:
    taken = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)
    return -jnp.mean(taken)
