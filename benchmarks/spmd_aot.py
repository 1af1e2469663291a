"""What the TPU compiler makes of quantized products on slices, without a TPU.

`compile_all(jobs, topology)` compiles programs for a slice in a process of its own and reads the
compiled HLO: how many Pallas calls, and every collective with its bytes. Called by the tests; as a
script, `python -m benchmarks.spmd_aot`, it writes `benchmarks/results/spmd-aot.{json,md}`. No
time is measured or estimated here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_aot import ENVIRONMENT

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16}
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Job:
    """One program.

    Attributes:
      name: how the result is found again.
      arguments: of `maker`, plain JSON.
      maker: "module:function": `(devices, **arguments) -> (fn, avals)`.
    """

    name: str
    arguments: dict[str, Any]
    maker: str = "benchmarks.spmd_cases:product"


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of it.

    Attributes:
      name: the job's.
      error: what the compiler said if it refused, else None.
      kernels: Pallas calls.
      collectives: kind and bytes of the result on one device, of each in the program.
      weight_bytes: bytes of one device's part of all codes.
    """

    name: str
    error: str | None = None
    kernels: int = 0
    collectives: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    weight_bytes: int = 0

    def count(self, kind: str) -> int:
        """How many collectives of a kind."""
        return sum(own == kind for own, _ in self.collectives)

    def bytes(self, kind: str) -> int:
        """Bytes of the results of all collectives of a kind."""
        return sum(size for own, size in self.collectives if own == kind)


def compile_all(jobs: Sequence[Job], topology: str) -> dict[str, Program]:
    """Compiles every job for all devices of a slice, in one child process.

    Args:
      jobs: what to compile.
      topology: a name that `jax.experimental.topologies` takes, such as "v5e:4x4".

    Raises:
      RuntimeError: the process ended early.
    """
    with tempfile.TemporaryDirectory() as folder:
        listing, out = Path(folder) / "jobs.json", Path(folder) / "out.jsonl"
        listing.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("XLA_FLAGS", None)
        command = (sys.executable, "-m", "benchmarks.spmd_aot", "--child", topology)
        done = subprocess.run(
            (*command, str(listing), str(out)),
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = out.read_text().splitlines() if out.exists() else []
    if done.returncode or len(lines) != len(jobs):
        raise RuntimeError(f"compiling for {topology} ended early: {done.stderr[-2000:]}")
    programs = [Program(**json.loads(line)) for line in lines]
    return {program.name: program for program in programs}


def _work(topology: str, listing: str, out: str) -> None:
    """In the child: compiles each job and appends a line of JSON."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    for item in json.loads(Path(listing).read_text()):
        job = Job(**item)
        module, _, function = job.maker.partition(":")
        fn, avals = getattr(importlib.import_module(module), function)(devices, **job.arguments)
        try:
            program = _read(job.name, avals, _compile(fn, avals))
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
            program = Program(job.name, error=f"{type(error).__name__}: {error}"[:2000])
        with open(out, "a") as file:
            file.write(json.dumps(dataclasses.asdict(program)) + "\n")


def _compile(fn: Any, avals: Any) -> Any:
    import jax

    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(avals)}
    with jax.set_mesh(meshes.pop()):
        return jax.jit(fn).trace(*avals).lower(lowering_platforms=("tpu",)).compile()


def _read(name: str, avals: Any, compiled: Any) -> Program:
    import jax

    from jaxquant.core.qtensor import is_qtensor, storage_bytes

    text = compiled.as_text()
    weights = [w for w in jax.tree.leaves(avals, is_leaf=is_qtensor) if is_qtensor(w)]
    held = 0
    for w in weights:
        shards = w.codes.size // math.prod(w.codes.sharding.shard_shape(w.codes.shape))
        held += storage_bytes(w.codes) // shards
    return Program(
        name,
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        collectives=list(_collectives(text)),
        weight_bytes=held,
    )


def _collectives(text: str) -> Any:
    """Kind and bytes of the result of every collective in compiled HLO."""
    kinds = "|".join(_COLLECTIVES)
    for line in text.splitlines():
        found = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if found is None:
            continue
        shapes = re.findall(r"([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]", found[1])
        sizes = [
            math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8
            for dtype, dims in shapes
        ]
        # What starts a collective puts out its operand too, and it may do several at once.
        yield found[2], max(sizes) if found[3] else sum(sizes)


def _bits(dtype: str) -> int:
    return _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)


# Slices, the largest last of a generation, with the size of the mesh axis "model" on each.
SLICES = {
    "v5e:2x2": 2,
    "v5e:4x4": 4,
    "v5e:16x16": 16,
    "v6e:16x16": 16,
    "v5p:8x8x16": 16,
    "tpu7x:4x4x4": 8,
}


def jobs_for(topology: str) -> list[Job]:
    """What the script compiles for a slice: products of 4096 x 8192, experts, the decoder."""
    model = SLICES[topology]
    jobs = []
    for parallel in ("column", "row", "both"):
        for backward in (False, True):
            name = f"{parallel}, {'backward' if backward else 'forward'}"
            size = {"m": 2048, "k": 4096, "n": 8192, "model": model}
            jobs.append(Job(name, {**size, "parallel": parallel, "backward": backward}))
    size = {"m": 2048, "k": 4096, "n": 4096, "count": 64, "model": model}
    for backward in (False, True):
        name = f"64 experts, {'backward' if backward else 'forward'}"
        jobs.append(Job(name, {**size, "backward": backward}, "benchmarks.spmd_cases:experts"))
    size = {"m": 2048, "k": 4096, "n": 8192, "model": model}
    jobs.append(Job("gathered in shard_map", size, "benchmarks.spmd_cases:gathered"))
    for backward in (False, True):
        name = f"decoder, {'gradient' if backward else 'forward'}"
        jobs.append(
            Job(name, {"backward": backward, "batch": 2048}, "benchmarks.spmd_cases:decoder")
        )
    return jobs


def write(results: dict[str, dict[str, Program]]) -> None:
    """Writes `spmd-aot.json`, and a table beside it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    plain = {t: [dataclasses.asdict(p) for p in own.values()] for t, own in results.items()}
    text = json.dumps({"versions": versions, "slices": plain}, indent=1) + "\n"
    (RESULTS / "spmd-aot.json").write_text(text)
    head = ("slice", "program", "Pallas calls", "codes a device", *_COLLECTIVES)
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for topology, programs in results.items():
        for p in programs.values():
            moved = [f"{p.count(kind)} ({p.bytes(kind):,} B)" for kind in _COLLECTIVES]
            moved = [cell if cell[0] != "0" else "" for cell in moved]
            shown = (p.error and f"FAILED: {p.error}") or str(p.kernels)
            lines.append(" | ".join((topology, p.name, shown, f"{p.weight_bytes:,} B", *moved)))
    table = "\n".join(f"| {line} |" for line in lines)
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    (RESULTS / "spmd-aot.md").write_text(f"`python -m benchmarks.spmd_aot`, {made}\n\n{table}\n")


def main() -> None:
    """The script, and the child process of `compile_all`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, metavar=("TOPOLOGY", "JOBS", "OUT"))
    arguments = parser.parse_args()
    if arguments.child:
        _work(*arguments.child)
    else:
        write({topology: compile_all(jobs_for(topology), topology) for topology in SLICES})


if __name__ == "__main__":
    main()
