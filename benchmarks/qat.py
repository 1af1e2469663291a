"""What a few steps of quantization-aware training give the shipped model.

    python -m benchmarks.qat [recipe] [steps]

Trains on the first half of each slice of the held-out text (its weights have not seen it) to give
what the float model gives (distillation: the mean divergence to it in nats a token). Measures the
next-token loss on batches of the second half: of the float model, of `ptq`, and of `ptq` after
training with scales that follow the weights, and with learned ones (LSQ).
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.models import shipped
from jaxquant.models.losses import slice_losses

BATCH, LENGTH = 4, 64
RATE, STEP_RATE = 1e-4, 1e-5  # of weights and of scales: Adam does not see how small those are
EVALUATED = 2  # batches of each slice


def train(apply: Any, teacher: Any, both: Any, batches: list[Any], steps: int) -> Any:
    """Adam on ``(variables, scales)``, of which ``apply`` makes what ``teacher`` should make."""
    rates = {"weights": optax.adam(RATE), "scales": optax.adam(STEP_RATE)}
    optimizer = optax.multi_transform(rates, ("weights", "scales"))

    @jax.jit
    def step(both: Any, state: Any, tokens: jax.Array) -> Any:
        wanted = jax.nn.log_softmax(teacher(tokens))

        def loss(both: Any) -> jax.Array:
            given = jax.nn.log_softmax(apply(*both, tokens))
            return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - given), axis=-1))

        grads = jax.grad(loss)(both)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(both, updates), state

    state = optimizer.init(both)
    for tokens in itertools.islice(itertools.cycle(batches), steps):
        both, state = step(both, state, jnp.asarray(tokens))
    return both


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "w2a16"
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    model, variables = shipped.load()
    text = shipped.held_out(BATCH, LENGTH)
    halves = {s: (b[: len(b) // 2], b[len(b) // 2 :]) for s, b in text.items()}
    training = [b for group in zip(*(first for first, _ in halves.values())) for b in group]
    unseen = {s: second[:EVALUATED] for s, (_, second) in halves.items()}
    decorated, fake = jq.quantize(name)(model), jq.qat(model, name)
    example = training[0]

    def follow(v: Any, _: Any, tokens: Any) -> Any:
        return fake.apply(v, tokens)

    def learn(v: Any, s: Any, tokens: Any) -> Any:
        return fake.apply(v, tokens, steps=s)

    def teacher(tokens: Any) -> Any:
        return model.apply(variables, tokens)

    followed, _ = train(follow, teacher, (variables, {}), training, steps)
    start = variables, fake.init_steps(variables, example)
    learned = train(learn, teacher, start, training, steps)
    trees = {
        "float": variables,
        "ptq": jq.ptq(decorated, variables, example, progress=False),
        "qat": jq.ptq(decorated, followed, example, progress=False),
        "qat, learned steps": jq.ptq(
            decorated, learned[0], example, steps=learned[1], progress=False
        ),
    }
    table = Table(title=f"{name}, {steps} steps of {BATCH}x{LENGTH} tokens, jax {jax.__version__}")
    table.add_column("weights")
    for slice_name in (*unseen, "mean"):
        table.add_column(slice_name, justify="right")
    for title, tree in trees.items():
        losses = list(slice_losses(decorated.apply, tree, unseen).values())
        table.add_row(title, *(f"{x:.3f}" for x in (*losses, sum(losses) / len(losses))))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
