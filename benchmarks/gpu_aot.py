"""What the CUDA compilers say about a program, without a GPU: registers, spills, instructions.

`measure(jobs)` compiles programs ahead of time for an H200 in a process of their own and reads what
Mosaic GPU dumps of each of its kernels (PTX and ptxas' report) and what XLA made of the rest. It
needs the CUDA plugin of jax, no GPU. Called by the tests and by `benchmarks.gpu_static`. Nothing
here is a measurement on hardware.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_aot import Job

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
TARGETS = Path(__file__).resolve().parent / "targets"
# What converting and scaling weights costs, by the first word of a PTX instruction.
_COUNTED = (
    "prmt",
    "lop3",
    "and",
    "or",
    "xor",
    "shl",
    "shr",
    "shf",
    "sub",
    "add",
    "fma",
    "mul",
    "mad",
    "cvt",
    "shfl",
    "selp",
    "bar",
    "mbarrier",
    "ld",
    "st",
    "ldmatrix",
    "stmatrix",
    "cp",
    "wgmma",
    "setmaxnreg",
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel as ptxas took it.

    Attributes:
      registers: a thread's.
      spills: bytes of spill stores and loads.
      complaints: ptxas' codes where it serializes wgmma, such as C7512 for want of registers. (With
        jaxlib 0.12 it also says C7504, setmaxnreg is ignored: that links kernels with nvJitLink, if
        it is installed, and so all warpgroups get an equal share of the registers. 0.11 does not.)
      stack: bytes of stack frame.
      shared: bytes of shared memory a block, dynamic and static.
      mma: tensor core instructions in the PTX by their shape and types.
      instructions: other PTX instructions by their first word.
    """

    registers: int = 0
    spills: int = 0
    complaints: list[str] = dataclasses.field(default_factory=list)
    stack: int = 0
    shared: int = 0
    mma: dict[str, int] = dataclasses.field(default_factory=dict)
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Static:
    """The compilers' account of one program.

    Attributes:
      name: the job's.
      error: what was refused and why, else None.
      kernels: the Mosaic GPU kernels in the program.
      custom_calls: targets of custom calls in the optimized HLO, with their counts.
      moves: copies, transposes and converts in the optimized HLO, as "op shape".
      temporaries: bytes of intermediate results.
      hlo: the optimized HLO.
    """

    name: str
    error: str | None = None
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    moves: list[str] = dataclasses.field(default_factory=list)
    temporaries: int = 0
    hlo: str = ""


def available() -> bool:
    """Whether jax's CUDA plugin, and a jax with Mosaic GPU's present interface, are installed."""
    import jax

    plugin = any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))
    return plugin and jax.__version_info__ >= (0, 11)


def measure(jobs: Sequence[Job], target: str = "h200") -> dict[str, Static]:
    """Compiles every job for a GPU, all in one process.

    Args:
      jobs: what to compile; names must differ.
      target: a file of `benchmarks/targets`, without its suffix.

    Returns:
      Results by name, also for programs that do not compile.

    Raises:
      RuntimeError: the process ended before the last job was done.
    """
    if len({job.name for job in jobs}) != len(jobs):
        raise ValueError("jobs must have different names")
    with tempfile.TemporaryDirectory() as folder:
        out, listing = Path(folder) / "out.jsonl", Path(folder) / "jobs.json"
        listing.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        dump = Path(folder) / "dump"
        dump.mkdir()
        environment = {**os.environ, **ENVIRONMENT, "MOSAIC_GPU_DUMP_TO": str(dump)}
        environment.pop("XLA_FLAGS", None)
        command = (sys.executable, "-m", "benchmarks.gpu_aot", target, str(listing), str(out))
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=False
        )
        lines = out.read_text().splitlines() if out.exists() else []
    results = [_from_json(line) for line in lines]
    if len(results) != len(jobs):
        raise RuntimeError(f"the compiler ended on {jobs[len(results)]}: {done.stderr[-2000:]}")
    return {r.name: r for r in results}


def _from_json(line: str) -> Static:
    fields = json.loads(line)
    return Static(**fields | {"kernels": [Kernel(**k) for k in fields["kernels"]]})


def _work(target: str, listing: str, out: str) -> None:
    """In the child: compiles each job and appends a line of JSON."""
    from jax.experimental import topologies

    text = (TARGETS / f"{target}.textproto").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    folder = os.environ["MOSAIC_GPU_DUMP_TO"]
    for item in json.loads(Path(listing).read_text()):
        job = Job(**item)
        for stale in glob.glob(f"{folder}/*"):
            os.remove(stale)
        module, _, function = job.maker.partition(":")
        try:
            fn, avals, *_ = getattr(importlib.import_module(module), function)(**job.arguments)
            compiled = compile_for(fn, avals, topology.devices[0])
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
            result = Static(job.name, error=f"{type(error).__name__}: {error}"[:2000])
        else:
            result = _read(job.name, compiled, folder)
        with open(out, "a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def compile_for(fn: Any, avals: Any, device: Any) -> Any:
    """`fn` compiled for a device that need not be there.

    Args:
      fn: function of arrays, perhaps a jitted one.
      avals: its arguments, ShapeDtypeStructs in any tree; those with a sharding keep it.
      device: of a topology description.

    Returns:
      The compiled program.
    """
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    avals = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or sharding), avals
    )
    with on_gpu():
        lowered = jax.jit(fn).trace(*avals).lower(lowering_platforms=("cuda",))
    return lowered.compile()


@contextlib.contextmanager
def on_gpu(kind: str = "NVIDIA H200", cores: int = 132) -> Iterator[None]:
    """Within it, kernels are traced for this kind of device."""
    import jax

    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def _read(name: str, compiled: Any, folder: str) -> Static:
    text = compiled.as_text()
    moves = re.findall(r"= (\S+) (copy|transpose|convert|copy-start)\(", text)
    memory = compiled.memory_analysis()
    stems = sorted(path[: -len(".ptx")] for path in glob.glob(f"{folder}/*.ptx"))
    return Static(
        name,
        kernels=[_read_kernel(stem) for stem in stems],
        custom_calls=dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
        moves=[f"{op} {shape}" for shape, op in moves],
        temporaries=int(memory.temp_size_in_bytes) if memory is not None else 0,
        hlo=text,
    )


def _read_kernel(stem: str) -> Kernel:
    ptx = Path(f"{stem}.ptx").read_text()
    # (jaxlib 0.12 does not always write both; a figure that is missing is 0, and shared memory is
    # never that.)
    report, resources = (
        path.read_text(errors="replace") if path.exists() else ""
        for path in (Path(f"{stem}.ptxas"), Path(f"{stem}.resources.txt"))
    )
    words = Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*)[.\s]", ptx, re.MULTILINE))
    mma = r"(?:wgmma\.mma_async[\w.]*?aligned|mma\.sync[\w.]*?aligned[\w.]*?)\.(m\d+n\d+k\d+[\w.]*)"
    return Kernel(
        registers=_largest(r"Used (\d+) registers", report),
        spills=sum(
            int(stores) + int(loads)
            for stores, loads in re.findall(
                r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
            )
        ),
        complaints=sorted(set(re.findall(r"\((C75\d\d)\)[^\n]*serialized", report))),
        stack=_largest(r"(\d+) bytes stack frame", report),
        shared=_largest(r"smem_scratch_bytes=(\d+)", resources)
        + _largest(r"(\d+) bytes smem", report),
        mma=dict(Counter(re.findall(mma, ptx))),
        instructions={word: words[word] for word in _COUNTED if words[word]},
    )


def _largest(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)


def main() -> None:
    """The child process; see `measure`."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("target", "listing", "out"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    _work(arguments.target, arguments.listing, arguments.out)


if __name__ == "__main__":
    main()
