"""Trains the demo decoder: `python -m jaxquant.models.train --help`.

The run is a function of its arguments and the installed sources: fixed seeds, batches that depend
on the step alone. It resumes from `--work-dir` wherever it was stopped. The learning rate is a
function of step / total steps, so a run that is resumed with another `--steps`, or whose
`--minutes` run out, still decays to zero. Training ends with a verdict: did the last tenth of the
steps improve the held-out loss by less than `--tolerance`?
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import math
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.models import batches, data, params
from jaxquant.models.config import DecoderConfig
from jaxquant.models.linen import Decoder
from jaxquant.models.losses import next_token_loss, slice_losses

MIX = {"english": 5.0, "python": 7.0, "arithmetic": 2.0, "json": 2.0}
log = logging.getLogger("jaxquant.models.train")

_FREEZE_PLAN = 0.85  # no re-planning later, so that the last tenth is measured on a fixed schedule


def main(argv: list[str] | None = None) -> None:
    """Prepares the data, trains or resumes, exports the weights and the record of the run."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("jax").setLevel(logging.WARNING)
    work = pathlib.Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    streams, held_out, sources = data.prepare(work, args.vocab_size)
    config = DecoderConfig(
        vocab_size=args.vocab_size,
        scan_layers=args.scan_layers,
        max_length=args.length,
        dtype=jnp.dtype(args.compute_dtype),
    )
    run = Run(args, config, streams, held_out, work)
    run.train()
    if args.export:
        run.export(pathlib.Path(args.export), sources)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, prog="python -m jaxquant.models.train")
    p.add_argument("--work-dir", required=True, help="data, checkpoints and the loss curve")
    p.add_argument("--export", help="directory that receives weights, tokenizer, held-out text")
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--minutes", type=float, help="wall time; if short, fewer steps are made")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--vocab-size", type=int, default=3072)
    p.add_argument("--learning-rate", type=float, default=2e-3)
    p.add_argument("--warmup", type=float, default=0.03, help="fraction of the steps")
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compute-dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--scan-layers", action="store_true")
    p.add_argument("--eval-every", type=int, default=100)
    p.add_argument("--tolerance", type=float, default=0.005, help="of the stop criterion")
    p.add_argument("--stop-after", type=int, help="stop at this step, to be resumed (a trial)")
    return p


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` is step / total in [0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW without its learning rate, which the step multiplies in; norm scales do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            weight_decay,
            mask=lambda tree: jax.tree_util.tree_map_with_path(
                lambda path, _: getattr(path[-1], "key", None) != "scale", tree
            ),
        ),
    )


class Run:
    """One training run: its state, its loop, its record."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: DecoderConfig,
        streams: Mapping[str, np.ndarray],
        held_out: Mapping[str, np.ndarray],
        work: pathlib.Path,
    ) -> None:
        self.args, self.config, self.work = args, config, work
        self.model = Decoder(config)
        rows = batches.rows_per_slice(MIX, args.batch_size)
        self.batch = batches.MixedBatches(streams, rows, args.length, args.seed)
        self.held_out = {
            name: batches.windows(stream, 16, args.length) for name, stream in held_out.items()
        }
        self.optimizer = optimizer(args.weight_decay)
        self.update = jax.jit(self._update, donate_argnums=(0, 1))
        self.evaluate = jax.jit(lambda v, tokens: self.model.apply(v, tokens))
        self.total = args.steps
        self._restore_or_init()

    def _update(
        self, weights: Any, state: Any, tokens: jax.Array, rate: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        def loss_fn(weights: Any) -> jax.Array:
            logits: Any = self.model.apply({"params": weights}, tokens[:, :-1])
            return next_token_loss(logits, tokens)

        loss, gradients = jax.value_and_grad(loss_fn)(weights)
        updates, state = self.optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, jax.tree.map(lambda u: -rate * u, updates)), state, loss

    def _restore_or_init(self) -> None:
        tokens = jnp.zeros((1, 8), jnp.int32)
        self.weights = self.model.init(jax.random.key(self.args.seed), tokens)["params"]
        self.state = self.optimizer.init(self.weights)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.checks: dict[str, dict[str, float]] = {}
        path = self.work / "state.npz"
        if not path.exists():
            return
        leaves, tree = jax.tree.flatten((self.weights, self.state))
        with np.load(path) as stored:
            leaves = [jnp.asarray(stored[f"leaf{i}"]) for i in range(len(leaves))]
            record = json.loads(str(stored["record"]))
        self.weights, self.state = jax.tree.unflatten(tree, leaves)
        for name in ("step", "seconds", "total", "curve", "checks"):
            setattr(self, name, record[name])
        if self.args.minutes is None:
            self.total = self.args.steps
        log.info("resumed at step %d after %.1f minutes", self.step, self.seconds / 60)

    def save(self) -> None:
        """Writes the state atomically, so that a killed run leaves the previous one whole."""
        record = {
            name: getattr(self, name) for name in ("step", "seconds", "total", "curve", "checks")
        }
        leaves = jax.tree.leaves((self.weights, self.state))
        arrays: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        temporary = self.work / "state.tmp.npz"
        np.savez(temporary, record=np.asarray(json.dumps(record)), **arrays)
        os.replace(temporary, self.work / "state.npz")

    def train(self) -> None:
        """Steps until the total, evaluating, saving and re-planning on the way."""
        args = self.args
        recent: list[float] = []
        last = time.monotonic()
        while self.step < min(self.total, args.stop_after or self.total):
            rate = learning_rate((self.step + 1) / self.total, args.learning_rate, args.warmup)
            self.weights, self.state, loss = self.update(
                self.weights, self.state, self.batch(self.step), np.float32(rate)
            )
            self.step += 1
            recent.append(float(loss))
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self.step == 1 or self.step % 20 == 0:
                self._log(f"loss {np.mean(recent[-20:]):.4f} rate {rate:.2e}")
            at_check = {round(0.9 * self.total): "0.9", self.total: "1.0"}.get(self.step)
            if self.step % args.eval_every and not at_check:
                continue
            if at_check:
                self.checks[at_check] = self._evaluate(full=True)
                self._log(f"all held out: {self.checks[at_check]}")
            losses = self._evaluate(full=False)
            train_loss = float(np.mean(recent[-args.eval_every :]))
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            self.curve.append(
                {"step": self.step, "minutes": round(self.seconds / 60, 2), "rate": rate,
                 "train": train_loss, **losses}
            )  # fmt: skip
            self._log("held out " + " ".join(f"{k} {v:.4f}" for k, v in losses.items()))
            self._plan()
            self.save()

    def _log(self, message: str) -> None:
        speed = self.step * self.args.batch_size * self.args.length / max(self.seconds, 1e-9)
        log.info(
            "step %d/%d %.1f min %.0f tok/s %s",
            self.step, self.total, self.seconds / 60, speed, message,
        )  # fmt: skip

    def _evaluate(self, full: bool) -> dict[str, float]:
        """Held-out loss by slice: of everything, or of the first 16 rows of each."""
        groups = {k: v if full else v[:1] for k, v in self.held_out.items()}
        return slice_losses(self.evaluate, {"params": self.weights}, groups)

    def _plan(self) -> None:
        """Fits the number of steps to what is left of `--minutes`, until the plan is frozen."""
        if self.args.minutes is None or self.step >= _FREEZE_PLAN * self.total:
            return
        before = self.curve[-2] if len(self.curve) > 1 else {"step": 0, "minutes": 0.0}
        pace = (self.seconds / 60 - before["minutes"]) / (self.step - before["step"])
        affordable = self.step + int((self.args.minutes - self.seconds / 60) / pace)
        planned = min(self.args.steps, max(affordable, int(self.step / _FREEZE_PLAN)))
        if planned != self.total:
            self._log(f"planned steps: {self.total} -> {planned}")
            self.total = planned

    def verdict(self) -> dict[str, Any]:
        """How much the last tenth of the steps improved the mean held-out loss: little enough?"""
        if not {"0.9", "1.0"} <= self.checks.keys():
            return {"criterion": "not evaluated: the run is not finished", "met": False}
        before, after = (float(np.mean(list(self.checks[at].values()))) for at in ("0.9", "1.0"))
        improvement = (before - after) / before
        return {
            "criterion": f"last tenth of the steps improves the mean held-out loss by less than "
            f"{self.args.tolerance:.1%}",
            "loss_at_nine_tenths": before,
            "loss_at_end": after,
            "improvement": improvement,
            "met": improvement < self.args.tolerance,
        }

    def export(self, target: pathlib.Path, sources: dict[str, Any]) -> None:
        """Writes bfloat16 weights, tokenizer, held-out text, loss curve and `training.json`."""
        (target / "heldout").mkdir(parents=True, exist_ok=True)
        flat = params.from_linen(self.weights, self.config)
        params.save_flat(target / "weights.safetensors", flat, jnp.bfloat16)
        shutil.copy(self.work / "tokenizer.json", target / "tokenizer.json")
        for path in (self.work / "heldout").iterdir():
            shutil.copy(path, target / "heldout" / path.name)
        with open(target / "loss_curve.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.curve[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
                for row in self.curve
            )
        arguments = {k: v for k, v in vars(self.args).items() if k not in ("work_dir", "export")}
        tokens = self.step * self.args.batch_size * self.args.length
        record = {
            "config": {
                k: str(jnp.dtype(v)) if k.endswith("dtype") else v
                for k, v in dataclasses.asdict(self.config).items()
            },
            "parameters": sum(int(np.prod(value.shape)) for value in flat.values()),
            "steps": self.step,
            "planned_steps": self.total,
            "tokens": tokens,
            "wall_minutes": round(self.seconds / 60, 1),
            "arguments": arguments,
            "mix_rows": batches.rows_per_slice(MIX, self.args.batch_size),
            "held_out_loss": self.checks.get("1.0") or self._evaluate(full=True),
            "verdict": self.verdict(),
            "sources": sources,
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("jax", "flax", "optax", "tokenizers")},
            },
        }
        (target / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        log.info(json.dumps({k: record[k] for k in ("held_out_loss", "verdict")}, indent=2))


if __name__ == "__main__":
    main()
