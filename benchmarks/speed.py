"""Figures of time: one matmul, the model's forward, tracing."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

import jaxquant as jq
from benchmarks import peer_qwix
from benchmarks.harness import Figure, summary_line
from jaxquant.evaluate.latency import LatencyOptions, Timing, measure_latency, speedup
from jaxquant.models import shipped
from jaxquant.models.linen import Decoder

NEWEST = jax.__version_info__ >= (0, 12)
_OLD_DOT = (
    "On jax 0.10 XLA's int8 dot is about as fast as its float32 dot on CPU; the targets are for "
    "the newest jax."
)
_OURS_SAME = "jaxquant w8a8, unstacked, float embedding and head"
_QWIX_SAME = "Qwix w8a8, unstacked, float embedding and head"


def matmul(quick: bool) -> Figure:
    """x[256, 2048] @ w[2048, 2048], activations quantized per token on the way."""
    rows, inner, outer = (256, 2048, 2048) if not quick else (64, 512, 512)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (rows, inner))
    w = jax.random.normal(keys[1], (inner, outer))

    def multiply(w: Any, x: jax.Array) -> jax.Array:
        return x @ w

    floats = jax.jit(multiply)
    ours = jax.jit(jq.transform(multiply))
    qw = jq.ptq(jq.quantize("w8a8")(multiply), w, x)
    theirs, their_w = peer_qwix.matmul_w8a8(w)
    theirs = jax.jit(theirs)
    bare, bare_w = _bare_int8(w)
    calls: dict[str, Callable[[], Any]] = {
        "float32": lambda: floats(w, x),
        "jaxquant w8a8": lambda: ours(qw, x),
        "Qwix w8a8": lambda: theirs(their_w, x),
        "w8a8 in plain JAX": lambda: bare(bare_w, x),
        **_dots_alone(bare_w[0], rows),
    }
    exact = calls["float32"]()
    errors = {name: _relative(call(), exact) for name, call in list(calls.items())[:3]}
    table, times = race(calls, "float32", quick)
    for row in table:
        row["relative error"] = errors.get(row["what"])
    faster, theirs_faster = (_faster(times, n) for n in ("jaxquant w8a8", "Qwix w8a8"))
    return Figure(
        title=f"One matmul {rows}x{inner}x{outer}, w8a8, dynamic activations",
        target="at least 3x faster than float32, and ahead of Qwix (newest jax)",
        rows=table,
        met={
            "3x float32": faster >= 3,
            "ahead of Qwix": faster >= theirs_faster,
        }
        if NEWEST
        else {},
        summary=[
            summary_line(
                f"w8a8 matmul {rows}x{inner}x{outer}, times as fast as float32",
                "≥ 3, ahead of Qwix",
                f"{faster:.2f}",
                f"{theirs_faster:.2f}",
            )
        ],
        notes=[] if NEWEST else [_OLD_DOT],
    )


def forward(quick: bool) -> Figure:
    """Prefill 8 x 256 of the trained model in w8a8, and where the time goes."""
    rows, length = (8, 256) if not quick else (2, 64)
    tokens = jnp.asarray(next(iter(shipped.held_out(rows, length).values()))[0])
    calls: dict[str, Callable[[], Any]] = {}
    model, variables = shipped.load(scan_layers=True)
    floats = jax.jit(model.apply)
    calls["float32"] = lambda: floats(variables, tokens)
    decorated = jq.quantize("w8a8")(model)
    quantized = jq.ptq(decorated, variables, tokens)
    apply = jax.jit(decorated.apply)
    calls["jaxquant w8a8"] = lambda: apply(quantized, tokens)

    flat, flat_variables = shipped.load(scan_layers=False)
    flat_floats = jax.jit(flat.apply)
    calls["float32, unstacked"] = lambda: flat_floats(flat_variables, tokens)
    float_head = jq.get_recipe("w8a8").with_rules(jq.Rule("embed/**", skip=True))
    same_ops = jq.quantize(float_head)(flat)
    same_quantized = jq.ptq(same_ops, flat_variables, tokens)
    same_apply = jax.jit(same_ops.apply)
    calls[_OURS_SAME] = lambda: same_apply(same_quantized, tokens)
    theirs, tree = peer_qwix.quantized(flat, flat_variables["params"], "w8a8", tokens)
    theirs = jax.jit(theirs)
    calls[_QWIX_SAME] = lambda: theirs(tree, tokens)

    table, times = race(calls, "float32", quick)
    dots, dots_q = _weight_dots(model.config, rows * length, quick)
    whole = times["float32"].median_s
    rest = whole - dots
    bound = whole / (rest + dots_q)
    faster = _faster(times, "jaxquant w8a8")
    same, theirs_same = (
        _faster(times, name, "float32, unstacked") for name in (_OURS_SAME, _QWIX_SAME)
    )
    return Figure(
        title=f"w8a8 forward of the trained model, prefill {rows}x{length}",
        target="at least 2x, and as fast as XLA's int8 dots allow, the float share named",
        rows=table,
        met={
            "2x": faster >= 2,
            "90% of the bound by the dots": faster >= 0.9 * bound,
            "ahead of Qwix on the same ops": same >= theirs_same,
        }
        if NEWEST
        else {},
        summary=[
            summary_line(
                f"w8a8 forward, prefill {rows}x{length}, times as fast as float32",
                f"≥ 2; XLA's int8 dots allow {bound:.2f}",
                f"{faster:.2f}",
                "no (tied embedding, scan)",
            ),
            summary_line(
                "the same, layers not stacked, embedding and head float",
                "",
                f"{same:.2f}",
                f"{theirs_same:.2f}",
            ),
        ],
        notes=[
            f"The weights' dots alone take {dots * 1e3:.1f} ms in float32 and {dots_q * 1e3:.1f} "
            "ms in w8a8 (each timed alone, activations quantized for each); the rest, attention "
            "products, softmax, norms, RoPE and SwiGLU, stays float: "
            f"{rest / whole:.0%} of the float32 forward. With these numbers w8a8 can "
            f"be {bound:.2f} times as fast as float32.",
        ]
        + ([] if NEWEST else [_OLD_DOT]),
    )


def tracing(quick: bool) -> Figure:
    """Trace and passes of the quantized model against tracing the float one, at several depths."""
    depths = (2, 4) if quick else (4, 8, 16, 32)
    table, rng = [], random.Random(0)
    for depth in depths:
        config = shipped.shipped_config(num_layers=depth, scan_layers=True)
        model = Decoder(config)
        tokens = jnp.zeros((8, 256), jnp.int32)
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        decorated = jq.quantize("w8a8")(model)
        quantized = jq.ptq(decorated, variables, tokens)
        candidates = {"float": (model, variables), "ours": (decorated, quantized)}
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(3 if quick else 9):
            for name in rng.sample(list(candidates), len(candidates)):
                times[name].append(_trace_time(*candidates[name], tokens))
        before, after = statistics.median(times["float"]), statistics.median(times["ours"])
        table.append(
            {
                "layers": depth,
                "float32 ms": before * 1e3,
                "w8a8 ms": after * 1e3,
                "ratio": after / before,
            }
        )
    ratios = [row["ratio"] for row in table]
    took = [row["w8a8 ms"] for row in table]
    return Figure(
        title="Trace and passes of the scanned model against tracing it in float",
        target="at most 1.5x, and constant in depth",
        rows=table,
        met={"1.5x": max(ratios) <= 1.5, "constant in depth": max(took) <= 1.25 * min(took)},
        summary=[
            summary_line(
                f"trace and passes / tracing in float, {depths[0]} to {depths[-1]} scanned layers",
                "≤ 1.5",
                " ".join(f"{ratio:.2f}" for ratio in ratios),
                "",
            )
        ],
        notes=[
            "`jax.make_jaxpr` of `model.apply`, JAX's caches cleared before each; medians of "
            "rounds in random order."
        ],
    )


def _trace_time(model: Any, variables: Any, tokens: jax.Array) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    jax.make_jaxpr(lambda variables, tokens: model.apply(variables, tokens))(variables, tokens)
    return time.perf_counter() - start


def race(
    calls: dict[str, Callable[[], Any]], baseline: str, quick: bool, seconds: float = 45
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Times compiled calls against each other, in random order: table rows, timings by name."""
    for call in calls.values():
        jax.block_until_ready(call())
    options = LatencyOptions(rounds=5 if quick else 30, max_seconds=seconds)
    timings = measure_latency(calls, options)
    table = []
    for name, timing in timings.items():
        table.append(
            {
                "what": name,
                "ms": timing.median_s * 1e3,
                "quartiles ms": f"{timing.q25_s * 1e3:.3g} to {timing.q75_s * 1e3:.3g}",
                f"times as fast as {baseline}": _faster(timings, name, baseline),
            }
        )
    return table, timings


def _faster(timings: dict[str, Timing], name: str, baseline: str = "float32") -> float:
    """How many times as fast as the baseline: the median over rounds, which load hardly moves."""
    return speedup(timings[baseline], timings[name]).median


def _weight_dots(config: Any, rows: int, quick: bool) -> tuple[float, float]:
    """Seconds of all dots with a weight, each timed alone: in float32 and in w8a8."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {(d, heads): layers, (heads, d): layers, (f, d): layers, (d, config.vocab_size): 1}
    for shape, count in (((d, kv), 2 * layers), ((d, f), 2 * layers)):
        shapes[shape] = shapes.get(shape, 0) + count
    total = total_q = 0.0
    for (inner, outer), count in shapes.items():
        x = jax.random.normal(jax.random.key(0), (rows, inner))
        w = jax.random.normal(jax.random.key(1), (inner, outer))
        floats = jax.jit(lambda w, x: x @ w)
        bare, bare_w = _bare_int8(w)
        _, times = race(
            {"f": lambda: floats(w, x), "q": lambda: bare(bare_w, x)},  # noqa: B023
            "f",
            quick,
            seconds=10,
        )
        total += count * times["f"].median_s
        total_q += count * times["q"].median_s
    return total, total_q


def _bare_int8(w: jax.Array) -> tuple[Callable[..., jax.Array], Any]:
    """The least that w8a8 with dynamic per-token activations can cost in plain JAX."""
    scale = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 127
    codes = jnp.round(w / scale).astype(jnp.int8)

    @jax.jit
    def multiply(parts: Any, x: jax.Array) -> jax.Array:
        codes, scale = parts
        s = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
        xq = jnp.round(x / s).astype(jnp.int8)
        y = jax.lax.dot(xq, codes, preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) * s * scale

    return multiply, (codes, scale)


def _dots_alone(codes: jax.Array, rows: int) -> dict[str, Callable[[], jax.Array]]:
    """XLA's dot of int8 codes with a weight [k, n], [n, k], and [n, k] in memory only."""
    x = jax.random.randint(jax.random.key(2), (rows, codes.shape[0]), -127, 128, jnp.int8)

    def dot(axis: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        dims = (((1,), (axis,)), ((), ()))
        return jax.jit(functools.partial(
            jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.int32
        ))  # fmt: skip

    turned = jnp.asarray(codes.T)
    laid_out = jax.device_put(codes, Format(Layout((1, 0)), codes.sharding))
    first, last = dot(0), dot(1)
    return {
        "XLA's int8 dot alone, weight [k, n]": lambda: first(x, codes),
        "the same, weight [n, k]": lambda: last(x, turned),
        "the same, [n, k] as a layout of [k, n]": lambda: first(x, laid_out),
    }


def _relative(value: jax.Array, exact: jax.Array) -> float:
    return float(jnp.linalg.norm(value - exact) / jnp.linalg.norm(exact))
