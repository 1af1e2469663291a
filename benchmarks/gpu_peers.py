"""The same products in PyTorch libraries: gemlite, torchao, bitsandbytes, and bf16 by cuBLAS.

`benchmarks.gpu --peer-python PATH` runs this file with a Python of its own, in which PyTorch and
whichever of them are installed; it imports nothing of jaxquant. It reads `{"asked": [[k, n, m]],
"done": [[library, form, k, n, m]]}` on its standard input and prints one line of JSON a result, at
once: microseconds of device time a call, by PyTorch's profiler (CUPTI, as for JAX), over weights
that together are several times the L2 cache, and how far the result is from the float product. What
cannot be built or run, or is far off, is a result too, with the error. `--seconds` bounds it all;
`--dry-run` builds and runs each peer on small shapes on CPU, as far as it can there, and times
nothing. bfloat16 x is what all are given.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

ROTATION_BYTES = 240 * 10**6
MOST_LAYERS = 32
REPEATS = 7
# Of the norm of the float product: a layer that is further off is not what it is taken for. 2-bit
# codes are given, not rounded to; nf4 in blocks of 64 is 0.1 off on normal weights.
FAR = 0.2


class Built:
    """A layer, and the float weight [n, k] that it stands for."""

    def __init__(self, layer: Any, weight: Any) -> None:
        self.layer, self.weight = layer, weight


Build = Callable[[int, int, str], Built]


def linear(k: int, n: int, device: str) -> Built:
    """A bias-free bfloat16 layer."""
    import torch

    layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
    return Built(layer, layer.weight.detach().clone())


def gemlite_int(bits: int, group: int) -> Build:
    """A group-quantized weight of gemlite's, with random codes."""

    def build(k: int, n: int, device: str) -> Built:
        import torch
        from gemlite import helper

        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device)
        scales = torch.rand((n, k // group), dtype=torch.bfloat16, device=device)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        make = {4: helper.A16W4_HQQ_INT, 2: helper.A16W2_HQQ_INT}[bits]
        layer = make(device=device, dtype=torch.bfloat16).from_weights(codes, scales, zeros)
        centred = codes.reshape(n, -1, group).to(torch.bfloat16) - 2 ** (bits - 1)
        return Built(layer, (centred * scales[:, :, None]).reshape(n, k))

    return build


def gemlite_layer(name: str) -> Build:
    """A layer that gemlite quantizes itself, by the name of its helper."""

    def build(k: int, n: int, device: str) -> Built:
        import torch
        from gemlite import helper

        plain = linear(k, n, device)
        make = getattr(helper, name)(device=device, dtype=torch.bfloat16)
        return Built(make.from_linear(plain.layer), plain.weight)

    return build


def torchao(config: Callable[[Any], Any], compiled: bool) -> Build:
    """A layer that torchao quantizes; its 8-bit forms are meant to be compiled."""

    def build(k: int, n: int, device: str) -> Built:
        import torch
        import torchao.quantization as quantization

        plain = linear(k, n, device)
        model = torch.nn.Sequential(plain.layer)
        quantization.quantize_(model, config(quantization))
        if compiled and device != "cpu":
            model = torch.compile(model, dynamic=False)
        return Built(model, plain.weight)

    return build


def bitsandbytes(bits: int, threshold: float = 0.0) -> Build:
    """nf4 in blocks of 64, or int8 with outliers from a threshold on (LLM.int8(); 0 for none)."""

    def build(k: int, n: int, device: str) -> Built:
        import bitsandbytes as bnb
        import torch

        plain = linear(k, n, "cpu")
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(
                k, n, bias=False, has_fp16_weights=False, threshold=threshold
            )
        else:
            layer = bnb.nn.Linear4bit(
                k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
        layer.load_state_dict({"weight": plain.weight.clone()})
        return Built(layer.to(torch.bfloat16).to(device), plain.weight.to(device))

    return build


# Names of formats as in `benchmarks.gpu_products`, and bytes a weight.
PEERS: list[tuple[str, str, float, Build]] = [
    ("torch", "bf16", 2, linear),
    ("bitsandbytes", "nf4 g64", 0.5, bitsandbytes(4)),
    ("gemlite", "w4a16 g128", 0.5, gemlite_int(4, 128)),
    ("gemlite", "w2a16 g64", 0.25, gemlite_int(2, 64)),
    (
        "torchao",
        "w4a16 g128",
        0.5,
        torchao(
            lambda q: q.Int4WeightOnlyConfig(
                group_size=128, int4_packing_format="tile_packed_to_4d"
            ),
            False,
        ),
    ),
    ("gemlite", "w8a16", 1, gemlite_layer("A16W8_INT8")),
    ("gemlite", "w8a8", 1, gemlite_layer("A8W8_int8_dynamic")),
    ("gemlite", "fp8", 1, gemlite_layer("A8W8_fp8_dynamic")),
    ("bitsandbytes", "w8a8", 1, bitsandbytes(8)),
    ("bitsandbytes", "llm.int8", 1, bitsandbytes(8, 6.0)),
    ("torchao", "w8a16", 1, torchao(lambda q: q.Int8WeightOnlyConfig(), True)),
    ("torchao", "w8a8", 1, torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig(), True)),
    (
        "torchao",
        "fp8",
        1,
        torchao(
            lambda q: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()), True
        ),
    ),
]


def device_microseconds(layers: list[Any], xs: list[Any]) -> float:
    """Median device time of a call, every layer called once on an input of its own."""
    import torch

    def run() -> None:
        for layer, x in zip(layers, xs, strict=True):
            layer(x)
        torch.cuda.synchronize()

    run()  # compiles and tunes
    run()
    times = []
    for _ in range(REPEATS):
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
        times.append(kernel_microseconds(profile.events()) / len(layers))
    if not all(times):
        raise RuntimeError("the profiler reported no kernel: is another one attached?")
    return statistics.median(times)


def kernel_microseconds(events: Any) -> float:
    """The sum of what ran on the device; ranges that a program names there are no kernels."""
    kernels = [
        e
        for e in events
        if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)
    ]
    return sum(e.time_range.elapsed_us() for e in kernels)


def distance(built: Built, x: Any) -> float:
    """How far the layer's result is from the float product, of the latter's norm."""
    import torch

    got = built.layer(x).to(torch.float32)
    want = x.to(torch.float32) @ built.weight.to(torch.float32).T
    return float((got - want).norm() / want.norm())


def measure(
    found: dict[str, Any], built: list[Built], rows: list[int], k: int, device: str
) -> None:
    """Prints a result for every number of rows."""
    import torch

    for m in rows:
        result: dict[str, Any] = {"m": m}
        try:
            xs = [torch.randn(m, k, dtype=torch.bfloat16, device=device) for _ in built]
            with torch.no_grad():
                result["off"] = distance(built[0], xs[0])
                if not result["off"] <= FAR:
                    raise ValueError(f"{result['off']:.2f} of the float product away from it")
                if device != "cpu":
                    result["us"] = device_microseconds([b.layer for b in built], xs)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
            result["error"] = f"{type(error).__name__}: {error}"[:300]
        emit(found | result)


def emit(result: dict[str, Any]) -> None:
    """One line, at once: this process may be killed at any time."""
    print(json.dumps(result), flush=True)


def versions() -> dict[str, str]:
    """What is installed here."""
    found = {}
    for name in ("torch", "gemlite", "torchao", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Measures every peer at every shape that is asked for, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    import torch

    # Beyond 8 numbers of rows compiled layers would run uncompiled, without a word.
    torch._dynamo.config.recompile_limit = 256
    until = time.monotonic() + arguments.seconds
    installed, device = versions(), "cpu" if arguments.dry_run else "cuda"
    emit({"versions": installed})
    wanted = json.load(sys.stdin)
    done = {tuple(key) for key in wanted.get("done", ())}
    by_shape: dict[tuple[int, int], list[int]] = {}
    for k, n, m in wanted["asked"]:
        by_shape.setdefault((k, n), []).append(m)
    for (k, n), every in by_shape.items():
        for library, form, size, build in PEERS:
            rows = [m for m in every if (library, form, k, n, m) not in done]
            if not rows or installed[library] == "not installed" or time.monotonic() > until:
                continue
            found = {"library": library, "form": form, "k": k, "n": n}
            count = max(2, min(MOST_LAYERS, int(ROTATION_BYTES / (k * n * size))))
            built: list[Built] = []
            try:
                built = [build(k, n, device) for _ in range(1 if arguments.dry_run else count)]
                measure(found, built, rows, k, device)
            except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
                emit(found | {"error": f"{type(error).__name__}: {error}"[:300]})
            del built
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
