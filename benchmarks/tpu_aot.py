"""What the TPU compiler says about a program, without a TPU: cycles, spills, units, VMEM.

`measure(jobs, chip)` compiles programs ahead of time with libtpu in processes of their own, one
flag setting each, and reads what the compiler dumps. Called by `benchmarks.tpu_static` and by the
tests. Nothing here is a measurement on hardware: cycles are the compiler's static estimate, which
is optimistic about memory. v4 has no cycle estimate, and on some kernels the estimator aborts;
there the schedule's bundles times the grid's steps stand in (`Static.source` says so).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import importlib
import importlib.metadata
import importlib.util
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

from benchmarks import tpu_schedule
from jaxquant.pallas_kernels.tpu.chips import CHIPS

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
NO_SCHEDULE = tpu_schedule.Schedule(0, {}, {}, 0)


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile.

    Attributes:
      name: how the result is found again.
      maker: "module:function"; called with `arguments`, returns `(fn, avals)`, or
        `(fn, avals, steps)` with the steps of the kernel's grid.
      arguments: keyword arguments, plain JSON.
      devices: for how many devices; if several, `maker` gets them as `devices` and its avals have
        shardings over them.
      int4_rows: rows of a tile in which arguments of int4 lie in HBM; 0 for the compiler's choice.
      profile: whether to ask for an estimate: the estimator aborts on some programs, and then all
        that share the process must be compiled again.
    """

    name: str
    maker: str
    arguments: dict[str, Any]
    devices: int = 1
    int4_rows: int = 0
    profile: bool = True


@dataclasses.dataclass(frozen=True)
class Static:
    """The compiler's account of one program.

    Attributes:
      name: the job's.
      chip: for which chip.
      error: what the compiler said if it refused, else None.
      cycles: estimated cycles of all operations together; None without an estimate.
      source: "estimate", "bundles x steps" (of a kernel) or "none".
      operations: estimated cycles by operation.
      sequence: the operations of the compiled program, one after the other: fields of
        `tpu_schedule.Operation` and the bundles of their schedules.
      bundles: instructions of the largest operation's schedule: one step of a kernel's grid, with
        what surrounds it.
      units: busy slots of each unit over its slots a bundle, in bundles.
      spills: stores and loads of spilled registers in the largest operation.
      conditional: its bundles that a condition may leave out of a step.
      vmem: VMEM bytes of the kernels; 0 without any.
      hbm_bytes: bytes the program accesses by the compiler's cost analysis.
      temporaries: HBM bytes of intermediate results.
      kernels: Pallas calls in the compiled program.
      gathers: all-gathers in it.
    """

    name: str
    chip: str
    error: str | None = None
    cycles: int | None = None
    source: str = "estimate"
    operations: dict[str, int] = dataclasses.field(default_factory=dict)
    sequence: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bundles: int = 0
    units: dict[str, float] = dataclasses.field(default_factory=dict)
    spills: int = 0
    conditional: int = 0
    vmem: int = 0
    hbm_bytes: int = 0
    temporaries: int = 0
    kernels: int = 0
    gathers: int = 0


def available() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compiler() -> str:
    """What made a schedule, as "libtpu 0.0.52, jax 0.12.0": jax lowers kernels, libtpu compiles."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("libtpu", "jax"))


def measure(jobs: Sequence[Job], chip: str, *, profile: bool = True) -> dict[str, Static]:
    """Compiles every job for a chip, all in one process unless the compiler aborts.

    Args:
      jobs: what to compile; names must differ.
      chip: a key of `CHIPS`.
      profile: ask for cycle estimates; where that aborts the process, the rest goes on in another
        one, and the job at fault is compiled again without them.

    Returns:
      Results by name, also for programs that do not compile.

    Raises:
      RuntimeError: the process ended without saying which job was at fault.
    """
    if len({job.name for job in jobs}) != len(jobs):
        raise ValueError("jobs must have different names")
    profile = profile and chip != "v4"  # "only supported on" later chips, says libtpu
    results: dict[str, Static] = {}
    left = [job for job in jobs if job.profile or not profile]
    if len(left) < len(jobs):
        results |= measure([job for job in jobs if not job.profile], chip, profile=False)
    while left:
        got, log = _run(left, chip, profile)
        results |= got
        done, left = left, [job for job in left if job.name not in got]
        if not left:
            break
        if not profile:
            raise RuntimeError(f"the compiler ended on {left[0]} for {chip}: {log[-2000:]}")
        if len(left) == len(done) or left[0].name not in results:
            culprit, left = left[0], left[1:]
            results |= measure([culprit], chip, profile=False)
    return results


def _run(jobs: Sequence[Job], chip: str, profile: bool) -> tuple[dict[str, Static], str]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        listing = Path(folder) / "jobs.json"
        listing.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        flags = [f"--xla_jf_dump_to={folder}/dump", "--xla_jf_dump_llo_text=true"]
        flags.append("--xla_jf_dump_llo_pass_label_regex=.*(per-bundle|final_bundles).*")
        if profile:
            flags.append(f"--xla_jf_dump_static_llo_profile_to={folder}/profile")
        environment = {**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": " ".join(flags)}
        environment.pop("XLA_FLAGS", None)
        command = (sys.executable, "-m", "benchmarks.tpu_aot", chip, str(listing), str(out), folder)
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=False
        )
        lines = out.read_text().splitlines() if out.exists() else []
    results = [Static(**json.loads(line)) for line in lines]
    return {r.name: r for r in results}, done.stderr


def _work(chip: str, listing: str, out: str, folder: str) -> None:
    """In the child: compiles each job and appends a line of JSON."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
    for item in json.loads(Path(listing).read_text()):
        job = Job(**item)
        for stale in glob.glob(f"{folder}/dump/*") + glob.glob(f"{folder}/profile/*"):
            os.remove(stale)
        module, _, function = job.maker.partition(":")
        devices = topology.devices[: job.devices]
        given = job.arguments | ({"devices": devices} if job.devices > 1 else {})
        fn, avals, *steps = getattr(importlib.import_module(module), function)(**given)
        try:
            compiled = compile_for(fn, avals, devices[0], job.int4_rows)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
            result = Static(job.name, chip, error=f"{type(error).__name__}: {error}"[:2000])
        else:
            result = _read(job.name, chip, compiled, folder, math.prod(steps))
        with open(out, "a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def compile_for(fn: Any, avals: Any, device: Any, int4_rows: int = 0) -> Any:
    """`fn` compiled for a device that need not be there.

    Args:
      fn: function of arrays.
      avals: its arguments, ShapeDtypeStructs in any tree; those with a sharding keep it.
      device: of a topology description.
      int4_rows: as of `Job`.

    Returns:
      The compiled program.
    """
    import jax
    from jax.experimental.layout import Format, Layout

    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(aval: Any) -> Any:
        where = aval.sharding or sharding
        if int4_rows and aval.dtype == "int4":  # rows of a tile, eight of them a 32-bit word
            where = Format(Layout((0, 1), ((int4_rows, 128), (8, 1)), 4), where)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=where)

    avals = jax.tree.map(placed, avals)
    meshes = {getattr(a.sharding, "mesh", None) for a in jax.tree.leaves(avals)} - {None}
    around = contextlib.nullcontext() if meshes else on_tpu(device)
    with around:
        lowered = jax.jit(fn).trace(*avals).lower(lowering_platforms=("tpu",))
    return lowered.compile()


@contextlib.contextmanager
def on_tpu(device: Any) -> Any:
    """Within it, kernels are traced for this kind of device."""
    import jax

    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind,
        num_cores=getattr(device, "num_cores", 1),
        platform="tpu",
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def _read(name: str, chip: str, compiled: Any, folder: str, steps: int) -> Static:
    text = compiled.as_text()
    plans = tpu_schedule.schedules(f"{folder}/dump")
    sequence = tpu_schedule.operations(text)
    largest = max(plans.values(), key=lambda plan: plan.bundles, default=NO_SCHEDULE)
    profile = tpu_schedule.profile(f"{folder}/profile")
    cycles, source = (sum(profile.values()), "estimate") if profile else (None, "none")
    if cycles is None and largest.bundles and steps:
        cycles, source = largest.bundles * steps, "bundles x steps"
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    memory = compiled.memory_analysis()
    return Static(
        name,
        chip,
        cycles=cycles,
        source=source,
        operations=profile,
        sequence=[
            dataclasses.asdict(op) | {"bundles": plans[op.name].bundles if op.name in plans else 0}
            for op in sequence
        ],
        bundles=largest.bundles,
        units=largest.units,
        spills=largest.spills,
        conditional=largest.conditional,
        vmem=tpu_schedule.vmem_used(text),
        hbm_bytes=int(cost.get("bytes accessed", 0)),
        temporaries=int(memory.temp_size_in_bytes) if memory is not None else 0,
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        gathers=len(re.findall(r"all-gather(?:-start)?\(", text)),
    )


def main() -> None:
    """The child process; see `measure`."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("chip", "listing", "out", "folder"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    _work(arguments.chip, arguments.listing, arguments.out, arguments.folder)


if __name__ == "__main__":
    main()
