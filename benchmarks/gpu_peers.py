"""The same products in PyTorch libraries: gemlite, torchao, bitsandbytes, and bf16 by cuBLAS.

`benchmarks.gpu --peer-python PATH` runs this file with a Python of its own, in which PyTorch and
whichever of them are installed; it imports nothing of jaxquant. It reads a list of `[k, n, m]` on
its standard input and prints one line of JSON a result: microseconds of device time a call, by
PyTorch's profiler (CUPTI, as for JAX), over weights that together are several times the L2 cache.
What cannot be built or run is a result too, with the error.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

ROTATION_BYTES = 240 * 10**6
REPEATS = 7


def linear(k: int, n: int) -> Any:
    """A bias-free bfloat16 layer on the GPU."""
    import torch

    return torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="cuda")


def gemlite_int(bits: int, group: int) -> Callable[[int, int], Any]:
    """A group-quantized weight of gemlite's, with random codes."""

    def build(k: int, n: int) -> Any:
        import torch
        from gemlite import helper

        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.rand((n, k // group), dtype=torch.bfloat16, device="cuda")
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        make = {4: helper.A16W4_HQQ_INT, 2: helper.A16W2_HQQ_INT}[bits]
        return make(device="cuda:0", dtype=torch.bfloat16).from_weights(codes, scales, zeros)

    return build


def gemlite_layer(name: str) -> Callable[[int, int], Any]:
    """A layer that gemlite quantizes itself, by the name of its helper."""

    def build(k: int, n: int) -> Any:
        import torch
        from gemlite import helper

        make = getattr(helper, name)(device="cuda:0", dtype=torch.bfloat16)
        return make.from_linear(linear(k, n))

    return build


def torchao(config: Callable[[Any], Any], compiled: bool) -> Callable[[int, int], Any]:
    """A layer that torchao quantizes; its 8-bit forms are meant to be compiled."""

    def build(k: int, n: int) -> Any:
        import torch
        import torchao.quantization as quantization

        model = torch.nn.Sequential(linear(k, n))
        quantization.quantize_(model, config(quantization))
        return torch.compile(model, dynamic=False) if compiled else model

    return build


def bitsandbytes(bits: int) -> Callable[[int, int], Any]:
    """nf4 in blocks of 64, or LLM.int8()."""

    def build(k: int, n: int) -> Any:
        import bitsandbytes as bnb
        import torch

        if bits == 8:
            layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(
                k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
        return layer.to(torch.bfloat16).cuda()

    return build


# Names of formats as in `benchmarks.gpu_products`, and bytes a weight.
PEERS: list[tuple[str, str, float, Callable[[int, int], Any]]] = [
    ("torch", "bf16", 2, linear),
    ("gemlite", "w4a16 g128", 0.5, gemlite_int(4, 128)),
    ("gemlite", "w2a16 g64", 0.25, gemlite_int(2, 64)),
    ("gemlite", "w8a16", 1, gemlite_layer("A16W8_INT8")),
    ("gemlite", "w8a8", 1, gemlite_layer("A8W8_int8_dynamic")),
    ("gemlite", "fp8", 1, gemlite_layer("A8W8_fp8_dynamic")),
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
    ("bitsandbytes", "nf4 g64", 0.5, bitsandbytes(4)),
    ("bitsandbytes", "w8a8", 1, bitsandbytes(8)),
]


def device_microseconds(layers: list[Any], xs: list[Any]) -> float:
    """Median device time of a call, every layer called once on an input of its own."""
    import torch

    def run() -> None:
        for layer, x in zip(layers, xs, strict=True):
            layer(x)
        torch.cuda.synchronize()

    with torch.no_grad():
        run()  # compiles and tunes
        run()
        times = []
        for _ in range(REPEATS):
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                run()
            kernels = [e for e in profile.events() if e.device_type.name == "CUDA"]
            times.append(sum(e.device_time_total for e in kernels) / len(layers))
    return statistics.median(times)


def main() -> None:
    """Measures every peer at every shape that is asked for."""
    import torch

    versions = {"torch": torch.__version__}
    for name in ("gemlite", "torchao", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    print(json.dumps({"versions": versions}), flush=True)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for k, n, m in json.load(sys.stdin):
        by_shape.setdefault((k, n), []).append(m)
    for (k, n), rows in by_shape.items():
        for library, form, size, build in PEERS:
            if versions[library] == "not installed":
                continue
            found = {"library": library, "form": form, "k": k, "n": n}
            try:
                layers = [build(k, n) for _ in range(max(2, int(ROTATION_BYTES / (k * n * size))))]
            except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
                print(json.dumps(found | {"error": f"{type(error).__name__}: {error}"[:300]}))
                continue
            for m in rows:
                try:
                    xs = [torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for _ in layers]
                    result: dict[str, Any] = {"us": device_microseconds(layers, xs)}
                except Exception as error:  # noqa: BLE001
                    result = {"error": f"{type(error).__name__}: {error}"[:300]}
                print(json.dumps(found | {"m": m} | result), flush=True)
            del layers
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
