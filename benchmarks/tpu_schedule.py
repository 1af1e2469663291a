"""Reads what the TPU compiler says about one compiled program: its text, schedules and profile.

Called by `benchmarks.tpu_aot` in the child process that compiled the program. Three accounts of
time come out, from the best to the weakest:

* the profile: estimated cycles by operation, with the transfers a Pallas pipeline makes. libtpu
  has none for v4 and aborts on fusions that read int4 in XLA's own layout ("Unsupported DMA
  direction for latency modeling: dma-general"; `benchmarks.tpu_programs` asks another way);
* XLA's cost model: `estimated_cycles` in the configuration of each fusion, which chose its window;
* schedules: the bundles of one step times the steps. A bundle may take several cycles and a
  schedule may hold inner loops, so this bounds the time from below.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from pathlib import Path
from typing import Any

UNITS = ("MATMUL", "MATPUSH", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")
_ENTRY = re.compile(r"^ENTRY .*?^\}", re.MULTILINE | re.DOTALL)
_OPERATION = re.compile(
    r"^ *(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z-]+)\((.*?)\)(.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"([a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
# Regions of fewer bundles than this set off transfers, or wait for them.
_REGION = 64
_FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One operation's schedule.

    Attributes:
      bundles: instructions of one step, with what surrounds it.
      units: busy slots of each unit over its slots a bundle, in bundles.
      slots: slots a bundle, of each unit.
      spills: stores and loads of spilled registers.
      conditional: bundles of the regions within a step that a condition may leave out.
    """

    bundles: int
    units: dict[str, float]
    slots: dict[str, int]
    spills: int
    conditional: int = 0


def schedules(folder: str) -> dict[str, Schedule]:
    """The schedules that were dumped below `folder`, by the operation's name."""
    found = {}
    left_out = {
        _named(path, "-final_bundles"): conditional(Path(path).read_text().splitlines())
        for path in glob.glob(f"{folder}/*-final_bundles.txt")
    }
    for path in glob.glob(f"{folder}/*final_hlo-static-per-bundle-utilization.txt"):
        stem = Path(path).name
        if "<late-" in stem or "-TLP-" in stem:  # what surrounds the program
            continue
        name = _named(path, "-final_hlo")
        lines = Path(path).read_text().splitlines()
        at = lines.index("== UTILIZATION:")
        names = [n.strip() for n in lines[at - 2].split(",")]
        slots = dict(zip(names, map(int, lines[at - 1].split()), strict=True))
        rows = [list(map(int, line.split())) for line in lines[at + 1 :] if line.strip()]
        sums = dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))
        units = {n: round(sums[n] / max(slots[n], 1), 1) for n in UNITS if n in sums}
        spills = sums.get("VSTORE:SPILL", 0) + sums.get("VLOAD:FILL", 0)
        own = {n: slots[n] for n in units}
        found[name] = Schedule(len(rows), units, own, spills, left_out.get(name, 0))
    return found


def _named(path: str, end: str) -> str:
    """The operation's name in that of a dumped file: number, operation, number of the pass."""
    return Path(path).name.partition("-")[2].rpartition(end)[0].rpartition("-")[0]


def conditional(lines: list[str]) -> int:
    """Bundles that a condition may leave out of a step: of regions of some size within another.

    Args:
      lines: a schedule's bundles, as the compiler prints them: a branch names the region that
        begins where it leads to.
    """
    bundles = [line for line in lines if re.match(r" *0x[0-9a-f]+ ", line)]
    regions = []
    for start, bundle in enumerate(bundles):
        for target in _BRANCH.findall(bundle):
            label = re.compile(rf"region {target}\b")
            rest = enumerate(bundles[start + 1 :], start + 1)
            end = next((i for i, line in rest if " PF: " in line and label.search(line)), None)
            if end is not None:
                regions.append((start, end))
    return sum(
        end - start
        for start, end in regions
        if end - start >= _REGION and any(s < start and end <= e for s, e in regions)
    )


def profile(folder: str) -> dict[str, int]:
    """Estimated cycles by operation, from the profiles dumped below `folder`."""
    operations: dict[str, int] = {}
    for path in glob.glob(f"{folder}/*.textproto"):
        text = Path(path).read_text()
        for op, cycles in re.findall(r'hlo_op_name: "(.*?)"\s+estimated_cycles: (\d+)', text):
            operations[op] = operations.get(op, 0) + int(cycles)
    return operations


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, as XLA's cost model sees it.

    Attributes:
      name: of the operation.
      cycles: what the cost model says, 0 if it says nothing.
      steps: how often its schedule runs.
      bytes: of its operands and results in HBM (those that live in VMEM cost no bandwidth).
    """

    name: str
    cycles: int
    steps: int
    bytes: int


def operations(text: str) -> list[Operation]:
    """What a compiled program does, one after the other.

    Args:
      text: `compiled.as_text()`.

    Returns:
      The operations of its entry computation that move or compute something.
    """
    entry = _ENTRY.search(text)
    if entry is None:
        return []
    sizes: dict[str, int] = {}
    found = []
    for name, result, kind, operands, rest in _OPERATION.findall(entry.group()):
        sizes[name] = _hbm_bytes(result)
        if kind in _FREE or kind.endswith("-start"):
            continue
        moved = sizes[name] + sum(sizes.get(o, 0) for o in re.findall(r"%([\w.-]+)", operands))
        cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
        bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', rest)
        steps = math.prod(map(int, re.findall(r"\d+", bounds.group(1)))) if bounds else 1
        found.append(Operation(name, int(cycles.group(1)) if cycles else 0, max(steps, 1), moved))
    return found


def least_cycles(found: list[Operation], plans: dict[str, Schedule]) -> int:
    """Bundles times steps of every operation that has a schedule: they run one after the other."""
    return sum(plans[op.name].bundles * op.steps for op in found if op.name in plans)


def vmem_used(text: str) -> int:
    """The largest VMEM scratch that an operation of a compiled program takes."""
    sizes = [
        int(size)
        for part in re.findall(r"used_scoped_memory_configs\D{0,8}(\[[^\]]*\])", text)
        for size in re.findall(r'"size":"?(\d+)', part)
    ]
    return max(sizes, default=0)


def _hbm_bytes(arrays: str) -> int:
    """Bytes of the arrays in a result's type that lie in HBM: no memory space, or S(0)."""
    total = 0.0
    for dtype, shape, layout in _ARRAY.findall(arrays):
        if re.search(r"S\([1-9]", layout):
            continue
        bits: Any = re.search(r"\d+", dtype)
        total += math.prod(int(n) for n in shape.split(",") if n) * int(bits.group()) / 8
    return int(total)
