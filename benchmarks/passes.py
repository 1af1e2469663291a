"""What the passes cost, and what they save.

    python -m benchmarks.passes

writes benchmarks/results/passes-jax-VERSION.json and .md. One figure alone: --only savings. Times
are medians of rounds in one process, the garbage collector off inside a round; each timed figure is
measured twice, in two processes. The w8a8 prefill is a figure of `benchmarks.spine`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from benchmarks import harness
from benchmarks.harness import Figure
from benchmarks.speed import race
from jaxquant.models import shipped
from jaxquant.models.linen import Decoder
from jaxquant.passes.channel_flow import find_channel_groups
from jaxquant.passes.pass_manager import Pass, Record
from jaxquant.passes.program import trace
from jaxquant.passes.verify import Verifier

WITHOUT = ("share_activation_quant", "fuse_siblings", "elide_roundtrips")


def pipeline(quick: bool) -> Figure:
    """Time of each pass and of all of them against tracing and compiling the float model."""
    sizes = [(2, False), (4, False), (4, True)] if quick else [
        (2, False), (8, False), (32, False), (128, False), (4, True), (32, True), (128, True),
    ]  # fmt: skip
    rows = [_pipeline(depth, scanned, 2 if quick else 7) for depth, scanned in sizes]
    unrolled = [row for row in rows if row["layers"].endswith("unrolled")]
    scanned = [row for row in rows if row["layers"].endswith("scanned")]
    per_equation = [row["passes ms"] / row["equations"] for row in unrolled]
    target = [row for row in unrolled if row["layers"].startswith("32 ")]
    times = [row["passes ms"] for row in scanned]
    return Figure(
        title="The pipeline against tracing and compiling in float, w8a8",
        target="linear in equations; at most 0.5 of the float trace at 32 layers with the default "
        "verification; constant under scan",
        rows=rows,
        met={
            "0.5 of the trace": all(row["passes / trace"] <= 0.5 for row in target),
            "linear": per_equation[-1] <= 1.25 * min(per_equation),  # the deepest has no more
            "constant under scan": max(times) <= 1.25 * min(times),
        },
        notes=[
            "The trained model's shape with other numbers of layers, prefill 8x256, abstract "
            "weights. trace: jax.make_jaxpr of the float model; compile: lowering and compiling "
            "it, once.",
            "passes: sum over the passes, their verification included; the columns after it are "
            "the single passes.",
        ],
    )


def _pipeline(depth: int, scanned: bool, rounds: int) -> dict[str, Any]:
    config = shipped.shipped_config(num_layers=depth, scan_layers=scanned)
    model = Decoder(config)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    decorated = jq.quantize("w8a8")(model)
    quantized = jq.ptq(decorated, variables, tokens)
    traces, runs = [], []
    for _ in range(rounds):
        traces.append(_seconds(lambda: jax.make_jaxpr(model.apply)(variables, tokens)))
        with _no_collection():
            runs.append(jq.compile(decorated, quantized, tokens))
    start = time.perf_counter()
    jax.jit(model.apply).lower(variables, tokens).compile()
    compiling = time.perf_counter() - start
    trace = statistics.median(traces)
    passes = _medians([run.records for run in runs])
    total = sum(passes.values())
    row = {
        "layers": f"{depth} {'scanned' if scanned else 'unrolled'}",
        "equations": Verifier.equations(jax.make_jaxpr(model.apply)(variables, tokens)),
        "trace ms": trace * 1e3,
        "compile ms": compiling * 1e3,
        "passes ms": total * 1e3,
        "passes / trace": total / trace,
        "passes / (trace + compile)": total / (trace + compiling),
    }
    return row | {f"{name} ms": seconds * 1e3 for name, seconds in passes.items()}


def _seconds(call: Callable[[], Any]) -> float:
    with _no_collection():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class _no_collection:  # noqa: N801 (used as a function)
    """JAX's caches empty, the garbage collector at rest: its pauses outlast whole passes."""

    def __enter__(self) -> None:
        jax.clear_caches()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()


def _medians(runs: list[tuple[Record, ...]]) -> dict[str, float]:
    """Median seconds of each pass, verification included."""
    return {
        records[0].name: statistics.median(r.seconds + r.verify_seconds for r in records)
        for records in zip(*runs, strict=True)
    }


def savings(quick: bool) -> Figure:
    """Launches, quantizations, bytes and time of a decode step, with and without the passes."""
    rows = []
    for preset, batch in (("w8a8", 1), ("w8a8", 16), ("w4a16_g64", 1)):
        step, arguments = _decode_step(preset, batch)
        versions = {
            "with": jq.compile(step, *arguments),
            "without": jq.compile(step, *arguments, passes=_without),
        }
        calls = {name: _call(c, arguments) for name, c in versions.items()}
        _, times = race(calls, "without", quick, seconds=15)
        for name, compiled in versions.items():
            after = compiled.cost().after
            rows.append(
                {
                    "decode step": f"{preset}, batch {batch}, {name} share, fuse, elide",
                    "launches": after.launches,
                    "quantizations": after.quantizations,
                    "activation kB": after.activation_bytes / 1e3,
                    "weight MB": after.weight_bytes / 1e6,
                    "ms": times[name].median_s * 1e3,
                }
            )
    return Figure(
        title="A decode step of the trained model with and without share, fuse and elide",
        target="fewer launches and quantizations",
        rows=rows,
        met={
            "fewer launches": all(
                a["launches"] < b["launches"] for a, b in zip(rows[::2], rows[1::2], strict=True)
            )
        },
        notes=[
            "Launches: products as the program has them; on this CPU XLA runs the products of a "
            "fused equation one after the other, and has shared equal quantizations by itself, so "
            "the times say that nothing was lost. Bytes are counted from the jaxpr, as "
            "`jq.compile(...).cost()` does.",
        ],
    )


def _without(passes: tuple[Pass, ...]) -> list[Pass]:
    return [step for step in passes if step.name not in WITHOUT]


def _call(compiled: Any, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    jitted = jax.jit(compiled)
    return lambda: jitted(*arguments)


def _decode_step(
    preset: str, batch: int, *, quantize: bool = True
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One token against a KV cache that holds 128: function, and arguments to call it with."""
    model, variables = shipped.load(scan_layers=True)
    rows, length = batch, 128
    tokens = jnp.asarray(next(iter(shipped.held_out(rows, length).values()))[0])[:, :length]
    weights = variables
    if quantize:
        weights = jq.ptq(jq.quantize(preset)(model), variables, tokens, progress=False)
    _, filled = model.apply(variables, tokens, decode=True, mutable=["cache"])
    token = tokens[:, -1:]

    def step(params: Any, cache: Any, token: jax.Array) -> Any:
        logits, updated = model.apply(
            {**params, "cache": cache}, token, decode=True, mutable=["cache"]
        )
        return logits, updated["cache"]

    return step, (weights, filled["cache"], token)


def folding(quick: bool) -> Figure:
    """What a decode step is spared where factors per channel are folded, counted."""
    step, arguments = _decode_step("w8a8", 1, quantize=False)
    program = trace(step, arguments[0], arguments[1:])
    rows = []
    for group in find_channel_groups(program):
        width = group.channels.shape[-1]
        inputs = group.channels.size // width
        rows.append(
            {
                "weights": ", ".join(group.consumers),
                "absorbed by": ", ".join(p.path for p in group.producers) or "nothing",
                "multiplications of an input": inputs * group.foldable,
                "bytes read and written for them": 2 * 4 * group.channels.size * group.foldable,
                "why not": "" if group.foldable else "; ".join(group.obstacles),
            }
        )
    return Figure(
        title="What a decode step of batch 1 is spared by folding factors per channel",
        target="every group with a producer that can absorb is folded",
        rows=rows,
        met={"folded": any(row["multiplications of an input"] for row in rows)},
        notes=[
            "Counted, not timed: an explicit factor reads an input and writes it once in each "
            "layer, unless XLA fuses it into what made the input. Quality: "
            "`python -m benchmarks.transforms`.",
        ],
    )


FIGURES = {"pipeline": pipeline, "savings": savings, "folding": folding}


if __name__ == "__main__":
    harness.main("benchmarks.passes", FIGURES, ("pipeline", "savings"), "passes")
