"""Whether the GPU kernels are right on the chip at hand: one command, before any figure is taken.

`python -m benchmarks.gpu_check [--seconds 300]` draws random products (storages, groups, zero
points, epilogues, ragged edges), runs the kernel that dispatch would choose and variants of its
config, and compares with float64. Memory is filled with NaN before each run, so that what a kernel
leaves unwritten shows, and each program runs three times, to the same bits. Then the shipped
decoder's class decodes by kernels and by XLA. Counts and failures go to
benchmarks/results/gpu-check-<chip>.json; any failure is exit status 1. `--dry-run` checks XLA's
route in the kernels' place, on any machine: it checks this script and the oracle.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_timing import require_gpu
from jaxquant.pallas_kernels import packing, reference
from jaxquant.pallas_kernels.activation import GREATEST, ActQuant, quantize_activation
from jaxquant.pallas_kernels.gpu.chips import Chip, chip_of
from jaxquant.pallas_kernels.problem import PACKED, STORAGE, MatmulProblem, Unsupported
from tests.pallas_kernels.tpu.cases import TABLE, Case, make

RESULTS = Path(__file__).parent / "results"
_RUNS = 3
_CODES = ("int4", "int8", "int2", "int3", "table4", "float8_e4m3fn")
Run = Callable[[dict[str, Any]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to do a product.

    Attributes:
      name: e.g. the config.
      run: from the arrays of a case to the result.
      tolerance: of an error, relative to the sum of magnitudes.
    """

    name: str
    run: Run
    tolerance: float


def main() -> None:
    """Checks until the time is over; prints and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    require_gpu(arguments.dry_run, "gpu_check")
    kind = jax.devices()[0].device_kind
    chip = None if arguments.dry_run else chip_of(kind)
    if chip is None and not arguments.dry_run:
        raise SystemExit(f"there are no kernels for {kind}")
    counts: collections.Counter[str] = collections.Counter()
    failures = decoder_failures(chip) + ([] if chip is None else rows_failures())
    until = time.monotonic() + arguments.seconds
    seed = arguments.seed
    while seed == arguments.seed or time.monotonic() < until:
        problem = random_problem(np.random.default_rng(seed), small=chip is None)
        found = check(problem, seed, chip)
        counts.update(found[0])
        failures += found[1]
        seed += 1
    record = {
        "device": kind,
        "jax": jax.__version__,
        "seeds": [arguments.seed, seed],
        "counts": dict(counts),
        "failures": failures,
    }
    name = f"gpu-check-{'dry-run' if chip is None else chip.name}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / name).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if failures:
        raise SystemExit(1)


def random_problem(rng: np.random.Generator, small: bool = False) -> MatmulProblem:
    """A product of any supported kind; edges of m, n and k fall anywhere."""
    codes = str(rng.choice(_CODES))
    group = int(rng.choice([32, 64, 128])) if rng.random() < 0.8 else 0
    k = 128 * int(rng.integers(1, 5 if small else 33))
    if not group and rng.random() < 0.3:
        k += 32
    n = 16 * int(rng.integers(1, 9 if small else 80)) if rng.random() < 0.5 else 128
    m = int(rng.integers(1, 20 if small else 300))
    integer = codes in ("int4", "int8") and rng.random() < 0.4
    eight_bit = codes.startswith("float8") and rng.random() < 0.7
    x_dtype = "int8" if integer else codes if eight_bit else "bfloat16"
    flags = {name: bool(rng.random() < 0.25) for name in ("bias", "gate", "residual")}
    zero_point = codes in ("int4", "int8", "int3", "int2") and bool(rng.random() < 0.4)
    return MatmulProblem(
        m, k, n, codes, x_dtype, group, zero_point, x_scale=x_dtype != "bfloat16",
        out_dtype="float32", **({} if small else flags),
    )  # fmt: skip


def check(problem: MatmulProblem, seed: int, chip: Chip | None) -> tuple[list[str], list[str]]:
    """What was tried, by kind; and what was wrong."""
    case = make(problem, seed)
    done, wrong = [], []
    try:
        ways = [by_xla(problem)] if chip is None else list(by_kernels(problem, chip))
    except Unsupported as why:
        return [f"{problem.codes}: unsupported: {why}"], []
    for attempt in ways:
        done.append(f"{problem.codes} x {problem.x_dtype}")
        try:
            fault = compare(case, attempt)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the fault)
            fault = f"{type(error).__name__}: {error}"[:500]
        if fault:
            wrong.append(f"seed {seed}: {problem}: {attempt.name}: {fault}")
    return done, wrong


def compare(case: Case, attempt: Attempt) -> str:
    """What is wrong with the results, or ""."""
    run = jax.jit(attempt.run)
    results = []
    for _ in range(_RUNS):
        poison = [jnp.full(case.want.size, jnp.nan, jnp.float32) for _ in range(4)]
        jax.block_until_ready(poison)
        del poison
        results.append(np.asarray(run({k: v for k, v in case.arrays.items() if k != "table"})))
    if any(not np.array_equal(results[0], other, equal_nan=True) for other in results[1:]):
        return "runs differ"
    error = np.abs(results[0].astype(np.float64) - case.want)
    bound = attempt.tolerance * (1 + case.scale_of_errors)
    bad = ~(error <= bound)  # NaN is bad
    if not bad.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    first = f"{results[0][at]}, not {case.want[at]}, at {at}"
    return f"{bad.sum()} of {bad.size} are wrong; the first is {first}"


def by_kernels(problem: MatmulProblem, chip: Chip) -> Iterator[Attempt]:
    """The kernel as dispatch would run it, and with variants of the config."""
    from jaxquant.pallas_kernels.gpu.config import GpuConfig, shared_bytes
    from jaxquant.pallas_kernels.gpu.heuristics import choose_config
    from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul

    config = choose_config(problem, chip)

    def run(config: GpuConfig) -> Run:
        def fn(arrays: dict[str, Any]) -> jax.Array:
            own = {**arrays, "codes": arrays["codes"].T}
            table = TABLE if problem.codes == "table4" else None
            return quantized_matmul(**own, problem=problem, config=config, table=table)

        return fn

    rounded = config.scale == "before" or problem.codes == "table4"
    tolerance = 2.0**-8 if rounded else 2.0**-11 if "float8" in config.operand else 1e-5
    changes: list[dict[str, Any]] = [{}, {"split_k": 2}, {"split_k": 1}, {"stages": 2}]
    variants = dict.fromkeys(dataclasses.replace(config, **change) for change in changes)
    for variant in variants:
        if shared_bytes(problem, variant) <= chip.shared_bytes:
            yield Attempt(str(variant), run(variant), tolerance)


def by_xla(problem: MatmulProblem) -> Attempt:
    """XLA's route on the same arrays, without epilogues."""

    def fn(arrays: dict[str, Any]) -> jax.Array:
        codes = arrays["codes"]
        if problem.codes in PACKED:
            codes = packing.unpack(codes, STORAGE[problem.codes][1], 0, problem.k)
        if problem.codes == "table4":
            codes = jnp.asarray(TABLE, jnp.float32)[codes.astype(jnp.int32) + 8]
        x = jnp.asarray(arrays["x"]).astype(jnp.float32)
        return reference.dot_general(
            x * arrays.get("x_scale", jnp.float32(1)), codes, jnp.asarray(arrays["scale"]),
            arrays.get("zero_point"), dimension_numbers=(((1,), (0,)), ((), ())),
        )  # fmt: skip

    return Attempt("xla", fn, 1e-5)


def rows_failures() -> list[str]:
    """The quantization of activations in one launch: scales to the bit, codes but for ties."""
    from jaxquant.pallas_kernels.gpu.quantize_rows import quantize_rows

    wrong = []
    for dtype in GREATEST:
        for k in (128, 640, 4096, 5504, 28672):
            x = jax.random.normal(jax.random.key(k), (33, k), jnp.bfloat16)
            x = x.at[3].set(0).at[5, k // 2].set(jnp.nan)
            codes, scale = jax.jit(functools.partial(quantize_rows, dtype=dtype))(x)
            act = ActQuant(dtype, (1,))
            want, want_scale = jax.jit(functools.partial(quantize_activation, act=act))(x)
            if not np.isnan(scale[5, 0]):
                wrong.append(f"quantize_rows: {dtype}, k = {k}: a NaN is lost")
            pair = [np.delete(np.asarray(c, np.float32), 5, 0) for c in (scale, want_scale)]
            if not np.array_equal(*pair):
                wrong.append(f"quantize_rows: scales of {dtype}, k = {k}")
            pair = [np.delete(np.asarray(c, np.float32), 5, 0) for c in (codes, want)]
            step = 1.0 if dtype == "int8" else 2.0**-2 * np.maximum(np.abs(pair[1]), 2.0**-6)
            if not (np.abs(pair[0] - pair[1]) <= step).all() or (pair[0] != pair[1]).mean() > 1e-3:
                wrong.append(f"quantize_rows: codes of {dtype}, k = {k}")
    return wrong


def decoder_failures(chip: Chip | None) -> list[str]:
    """A prepared decoder by kernels against the same by XLA: logits of a prompt and a step."""
    import jaxquant as jq
    from benchmarks.gpu_decoder import SMALL
    from jaxquant.models import linen

    model = jq.quantize("w4a16_g128")(linen.Decoder(SMALL))
    tokens = jnp.arange(24).reshape(2, 12)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    quantized = jq.ptq(model, variables, tokens, progress=False)
    ready = jq.prepare(quantized, "cuda")
    want = jq.compile(model, quantized, tokens, implementation="xla")(quantized, tokens)
    wrong = []
    for name, tree in (("prepared", ready), ("as restored", quantized)):
        got = jax.jit(model.apply)(tree, tokens)
        error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
        if not error <= (2.0**-5 if chip is not None else 2.0**-6):
            wrong.append(f"decoder, {name}: logits differ by {error:.4f} of the largest")
    return wrong


if __name__ == "__main__":
    main()
