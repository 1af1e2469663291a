"""Whether the GPU kernels are right on the chip at hand: one command, before any figure is taken.

`python -m benchmarks.gpu_check [--seconds 400]` does, in this order: every format of
`gpu_formats` at shapes of decoding and prefill, the quantization of activations, the shipped
decoder's class by kernels and by XLA; and then, until the time is over, random products (storages,
groups, zero points, epilogues, ragged edges), rows grouped by expert and LLM.int8(), with variants
of their configs. `gpu_oracle` judges. Several processes share the pieces; one that hangs or dies
loses its piece only (`gpu_supervise`), and the same command again goes on. Counts and failures go
to benchmarks/results/gpu-check-<chip>.json; any failure is exit status 1. `--dry-run` checks XLA's
route in the kernels' place, on any machine: it checks this script and the oracle.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_oracle, gpu_oracle_grouped
from benchmarks.gpu_formats import FORMATS
from benchmarks.gpu_supervise import Journal, digest, key_of, leave_if_broken, supervise
from benchmarks.gpu_timing import require_gpu
from jaxquant.pallas_kernels.activation import BYTES
from jaxquant.pallas_kernels.gpu.chips import Chip, chip_of
from jaxquant.pallas_kernels.problem import MatmulProblem

RESULTS = Path(__file__).parent / "results"
_ROWS = (16, 300, 1, 64)
_ROW_LENGTHS = (128, 640, 4096, 5504, 28672)
_PROCESSES = 4
# Seconds in which no piece takes place, its compilation included, unless it hangs.
_PATIENCE = 150.0


def main() -> None:
    """Checks until the time is over; prints and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--seeds", type=int, default=1000, help="random products of each kind")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--journal", type=Path, default=None, help="folder of what is done")
    parser.add_argument("--share", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # processes share the GPU
    if arguments.share is not None:
        work(arguments.journal, arguments.share, arguments.seeds, here())
        return
    if arguments.dry_run:
        path = arguments.out / "gpu-check-dry-run.jsonl"
        path.unlink(missing_ok=True)
        work(path, 0, 1, None, processes=1)
        finish([Journal(path)], "dry-run", arguments.out)
        return
    own = f"jaxquant-gpu-check-{digest('.py')}"
    folder = arguments.journal or Path(tempfile.gettempdir()) / own
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--seeds", str(arguments.seeds)]

    def one(share: int) -> Journal:
        path = folder / f"{share}.jsonl"
        own = [*command, "--share", str(share), "--journal", str(path)]
        return supervise(own, path, arguments.seconds, _PATIENCE)

    with ThreadPoolExecutor(_PROCESSES) as pool:
        journals = list(pool.map(one, range(_PROCESSES)))
    finish(journals, "", arguments.out)


def here() -> Chip:
    """The chip at hand.

    Raises:
      SystemExit: there is none that kernels are for.
    """
    require_gpu(False, "gpu_check")
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None:
        raise SystemExit(f"there are no kernels for {jax.devices()[0].device_kind}")
    return chip


def pieces(seeds: int, small: bool) -> Iterator[dict[str, Any]]:
    """What is checked, the most important first."""
    if not small:
        for m in _ROWS:
            for name in FORMATS:
                yield {"kind": "format", "name": name, "m": m}
        for dtype in BYTES:
            for k in _ROW_LENGTHS:
                yield {"kind": "rows", "dtype": dtype, "k": k}
    yield {"kind": "decoder"}
    for seed in range(seeds):
        for kind in ("llm_int8", "experts", "random"):
            yield {"kind": kind, "seed": seed}


def work(
    path: Path, share: int, seeds: int, chip: Chip | None, processes: int = _PROCESSES
) -> None:
    """In a child: every piece of its share that is not in the journal yet."""
    journal = Journal(path)
    here = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    journal.once("environment", lambda: here)
    for index, piece in enumerate(pieces(seeds, chip is None)):
        if index % processes == share:
            wrong = journal.once(key_of(**piece), lambda piece=piece: found_in(piece, chip))[
                "wrong"
            ]
            if wrong and chip is not None:
                leave_if_broken()


def found_in(piece: dict[str, Any], chip: Chip | None) -> dict[str, list[str]]:
    """What was tried in a piece, and what was wrong."""
    try:
        done, wrong = _try(piece, chip)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the fault)
        done, wrong = [piece["kind"]], [f"{piece}: {type(error).__name__}: {error}"[:500]]
    return {"done": done, "wrong": wrong}


def _try(piece: dict[str, Any], chip: Chip | None) -> tuple[list[str], list[str]]:
    kind, small = piece["kind"], chip is None
    if kind == "format":
        problem = format_problem(piece["name"], piece["m"])
        return gpu_oracle.check(problem, 0, chip, variants=False)
    if kind == "rows":
        return ["quantize_rows"], gpu_oracle.check_rows(piece["dtype"], piece["k"])
    if kind == "decoder":
        return ["decoder"], decoder_failures(chip)
    if kind == "llm_int8":
        return gpu_oracle_grouped.check_llm_int8(piece["seed"], chip)
    rng = np.random.default_rng(piece["seed"])
    if kind == "experts":
        product, sizes = gpu_oracle_grouped.random_ragged(rng, small)
        return gpu_oracle_grouped.check_ragged(product, sizes, piece["seed"], chip)
    return gpu_oracle.check(gpu_oracle.random_problem(rng, small), piece["seed"], chip)


def format_problem(name: str, m: int) -> MatmulProblem:
    """A format of `gpu_formats` at a shape with a ragged last tile of columns."""
    return MatmulProblem(m, 2048, 1040, out_dtype="float32", **FORMATS[name][0])


def finish(journals: list[Journal], name: str, out: Path) -> None:
    """Puts the journals together, writes and prints them.

    Raises:
      SystemExit: something was wrong.
    """
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    environment: dict[str, Any] = {}
    for journal in journals:
        for key, result in journal.results.items():
            if key == "environment":
                environment = result
            elif "died" in result:
                failures.append(f"{key}: {result['died']}")
            else:
                counts.update(result["done"])
                failures += result["wrong"]
    record = {**environment, "counts": dict(sorted(counts.items())), "failures": failures}
    chip = chip_of(environment.get("device", ""))
    name = name or (chip.name if chip else "unknown")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"gpu-check-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if failures:
        raise SystemExit(1)


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
