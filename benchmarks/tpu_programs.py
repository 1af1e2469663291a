"""Which program stands for a product in the static figures, and how its time is read.

Called by `benchmarks.tpu_static`. Our kernels of up to 64 rows are compiled at the product's own
size. The estimator needs gigabytes and minutes for the largest products, and both grow with the
cycles it counts; so for more rows, and for others' programs, one of fewer columns or rows, of whole
blocks, stands for the product, its time but for the first blocks' coming is multiplied, and the row
says so. Up to 16 rows, our kernels are one program, since blocks have 16 rows; so is bfloat16
(bytes bound it) from 2 to 16.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from benchmarks import tpu_floor, tpu_peers
from benchmarks.tpu_aot import Job, Static
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem, dtype_bytes
from jaxquant.pallas_kernels.tpu.chips import Chip
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_config

_INT8 = {"x_dtype": "int8", "x_scale": True}
# What each column is: fields of a problem. v7x multiplies fp8, not int8.
FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"codes": "int8", **_INT8},
    "w8a16 g128": {"codes": "int8", "group": 128},
    "w4a16 g128": {"codes": "int4", "group": 128},
    "w4a16 g32": {"codes": "int4", "group": 32},
    "w4a8 g128": {"codes": "int4", "group": 128, **_INT8},
    "w3a16 g128": {"codes": "int3", "group": 128},
    "w2a16 g128": {"codes": "int2", "group": 128},
    "fp8": {"codes": "float8_e4m3fn", "x_dtype": "float8_e4m3fn", "x_scale": True},
    "table4 g64": {"codes": "table4", "group": 64},
}
BASELINES = ("bf16", "xla int4 g128")
# Multiply-adds of the largest program that is compiled as it is, in cycles of the matrix units.
_MOST_CYCLES = 1_000_000
_MOST_ROWS, _FEW_ROWS, _LEAST_ROWS = 1024, 64, 16
_COLUMNS = 4096
# XLA keeps int4 in tiles of 64 rows and cuts them into tiles of 8 on the way to VMEM, by a transfer
# that its estimator does not know. What lies in tiles of 8 rows comes by one that it knows.
_TILE_ROWS = 8
# A step of one and of the other differ by the instructions that set off transfers, some 60.
_SAME_UNITS, _SET_OFF = 1.01, 80
_COMPUTE = ("MATMUL", "MATPUSH", "XLU", "VALU")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program and what it stands for.

    Attributes:
      label: a key of `FORMATS`, `PEERS`, or one of `BASELINES`.
      problem: the product it stands for.
      config: of our kernel, else None.
      job: what is compiled; its name is the program's identity.
      times: by how much its time is multiplied.
      like: of XLA's grouped int4, the same program with its codes in HBM as the product reads them:
        its estimate holds where the estimator refuses the program and both do `same_work`.
    """

    label: str
    problem: MatmulProblem
    config: MatmulConfig | None
    job: Job
    times: float
    like: Job | None = None


def program(chip: Chip, label: str, m: int, k: int, n: int) -> Program:
    """The program of a label at a size.

    Raises:
      Unsupported: no kernel of ours does it on this chip.
    """
    rows, columns = _size(chip, label, m, k, n)
    times = max(m / rows, 1) * n / columns
    size: dict[str, Any] = {"m": rows, "k": k, "n": columns}
    if label in FORMATS:
        problem = MatmulProblem(m, k, n, **FORMATS[label])
        config = choose_config(problem, chip)
        rows = min(rows, max(config.bm, m))  # 16, or 8 where a block has so few
        size["m"] = rows
        small = dataclasses.replace(problem, m=rows, n=columns)
        arguments = {"problem": dataclasses.asdict(small), "config": dataclasses.asdict(config)}
        arguments["chip"] = chip.name
        c = config
        name = (
            f"{label}|{rows}x{k}x{columns}|{c.bm}x{c.bk}x{c.bn} {c.scale} {c.reading} {c.operand}"
            f"{' stream' if c.stream else ''}"
        )
        return Program(
            label, problem, config, Job(name, "benchmarks.tpu_cases:chosen", arguments), times
        )
    maker, fields = "benchmarks.tpu_cases:bfloat16", {}
    problem = MatmulProblem(m, k, n, "int8")
    if label == "xla int4 g128":
        maker = "benchmarks.tpu_cases:xla"
        fields = {"codes": "int4", "group": 128, "x_dtype": "bfloat16"}
        problem = MatmulProblem(m, k, n, "int4", group=128)
    elif label in tpu_peers.PEERS:
        function, fields, same = tpu_peers.PEERS[label]
        maker, problem = f"benchmarks.tpu_peers:{function}", MatmulProblem(m, k, n, **FORMATS[same])
    refused = label == "xla int4 g128"
    job = Job(f"{label}|{rows}x{k}x{columns}", maker, size | fields, profile=not refused)
    like = None
    if refused:
        name = f"{job.name}|codes in tiles of {_TILE_ROWS} rows"
        like = Job(name, maker, size | fields, int4_rows=_TILE_ROWS)
    return Program(label, problem, None, job, times, like)


def _size(chip: Chip, label: str, m: int, k: int, n: int) -> tuple[int, int]:
    """Rows and columns of the program that stands for a product."""
    rows, columns = min(m, _MOST_ROWS), n
    if label in FORMATS or (label == "bf16" and m > 1):
        rows = max(rows, _LEAST_ROWS)
    if label not in (*FORMATS, "xla int4 g128") and m <= _FEW_ROWS:
        columns = min(columns, _COLUMNS)
    while columns > _COLUMNS // 2 and _cycles(chip, rows, k, columns) > _MOST_CYCLES:
        columns //= 2
    return rows, columns


def _cycles(chip: Chip, rows: int, k: int, columns: int) -> float:
    return rows * k * columns / (chip.macs_per_cycle * chip.cores)


@dataclasses.dataclass(frozen=True)
class Time:
    """How long a program takes by the compiler's account.

    Attributes:
      microseconds: None if it does not compile.
      bound: what bounds it: "memory", a unit, or "waiting for blocks": neither would take as long,
        but the first block comes before any work, and each step waits for its own.
      at_least: the time is a lower bound, from schedules, bytes and multiply-adds.
      unwaited: of our kernels, the time if no step waited for its blocks; else None.
      model: microseconds by XLA's cost model, where that is all the compiler says; else None.
      in_turn: of XLA's grouped int4, microseconds of the program as it stands, its operations one
        after the other: a weight that is copied to VMEM is there before the product begins; else
        None.
    """

    microseconds: float | None
    bound: str
    at_least: bool = False
    unwaited: float | None = None
    model: float | None = None
    in_turn: float | None = None


def same_work(one: Static, other: Static) -> bool:
    """Whether two programs have the same operations, with the same work for each unit."""
    if [op["name"] for op in one.sequence] != [op["name"] for op in other.sequence]:
        return False
    for a, b in zip(one.sequence, other.sequence, strict=True):
        if a["steps"] != b["steps"] or abs(a["bundles"] - b["bundles"]) > _SET_OFF:
            return False
    busy = [(one.units.get(u, 0.0), other.units.get(u, 0.0)) for u in _COMPUTE]
    return all(max(pair) <= min(pair) * _SAME_UNITS for pair in busy)


def time_of(chip: Chip, item: Program, static: Static, like: Static | None = None) -> Time:
    """Reads the time of a program's product out of what the compiler said.

    Args:
      chip: for which chip.
      item: the program and what it stands for.
      static: what the compiler said of it.
      like: what it said of `item.like`.
    """
    if static.error:
        return Time(None, static.error.splitlines()[0][:80])
    if static.cycles is None and like is not None and like.cycles and same_work(static, like):
        static = dataclasses.replace(static, cycles=like.cycles, operations=like.operations)
    memory = moved(item) / (chip.hbm_bandwidth * chip.cores) * 1e6
    unit = max(static.units, key=lambda name: static.units[name], default="")
    if item.label.startswith("tokamax"):
        return Time(_pipeline(chip, item, static, memory), unit, at_least=True)
    if static.cycles is not None:
        first = _first_blocks(chip, item, static)
        compute = first + (static.cycles / chip.clock * 1e6 - first) * item.times
        unwaited, at_least = None, False
        if item.config is not None:
            if static.source != "estimate" and chip.name != "v4":  # the estimator aborted
                once = _once(item, static)
                compute = _two_buffers(_steps(item), static, chip, memory, once)
                at_least = compute < _matrix(chip, item)  # a bundle may take several cycles
                compute = max(compute, _matrix(chip, item))
            busy = _busy(chip, item, static)
            unwaited = min(max(busy, memory), max(compute, memory))
            if busy < memory < compute:
                unit = "waiting for blocks"
        bound = unit if compute > memory else "memory"
        in_turn = _in_turn(chip, item, static) if item.label in BASELINES[1:] else None
        return Time(max(compute, memory), bound, at_least, unwaited=unwaited, in_turn=in_turn)
    p, rate = item.problem, chip.clock * chip.cores / 1e6
    macs = p.m * p.k * p.n / chip.macs_per_cycle / rate
    bandwidth = chip.hbm_bandwidth * chip.cores / 1e6
    one_by_one = item.times * sum(
        max(op["bundles"] * op["steps"] / rate, op["bytes"] / bandwidth) for op in static.sequence
    )
    model = item.times * sum(op["cycles"] for op in static.sequence) / chip.clock * 1e6
    least, bound = max((memory, "memory"), (macs, "MATMUL"), (one_by_one, unit))
    return Time(least, bound, at_least=True, model=model or None, in_turn=least)


def _first_blocks(chip: Chip, item: Program, static: Static) -> float:
    """Microseconds in which the first blocks come: nothing hides them, and they come once.

    Of programs that are not ours: a step's share of what each operation reads and writes.
    """
    p, c = item.problem, item.config
    if c is None:
        moves = [op for op in static.sequence if op["bundles"]]
        first = sum(op["bytes"] / op["steps"] for op in moves)
    else:
        first = c.bm * c.bk * dtype_bytes(p.x_dtype) + c.bk * c.bn * STORAGE[p.codes][1] / 8
        first += 4 * p.groups * c.bn
    return first / (chip.hbm_bandwidth * chip.cores) * 1e6


def _in_turn(chip: Chip, item: Program, static: Static) -> float:
    """Microseconds of operations that follow each other, each by its estimate and its bytes.

    Of a program of fewer columns, what is copied of x is so once for all columns; the first blocks
    of the others come once.
    """
    bandwidth, given = chip.hbm_bandwidth * chip.cores, item.job.arguments
    total = -(item.times - 1) * _first_blocks(chip, item, static)
    for op in static.sequence:
        time = max(static.operations.get(op["name"], 0) / chip.clock, op["bytes"] / bandwidth)
        copy = not op["bundles"] and op["bytes"] == 2 * given["m"] * given["k"]
        total += time * (max(item.problem.m / given["m"], 1) if copy else item.times) * 1e6
    return total


def _busy(chip: Chip, item: Program, static: Static) -> float:
    """Microseconds of our kernel's instructions and multiply-adds, if they never waited."""
    assert item.config is not None
    once = _once(item, static)
    bundles = (static.bundles - once) * _steps(item) + once
    instructions = bundles / chip.clock / chip.cores * 1e6
    return max(instructions, _matrix(chip, item))


def _matrix(chip: Chip, item: Program) -> float:
    """Microseconds that the multiply-adds of our kernel need."""
    assert item.config is not None
    return tpu_floor.floor(item.problem, item.config.operand, chip).times["matrix"]


def _steps(item: Program) -> int:
    """Steps of our kernel's grid, of all cores together."""
    p, c = item.problem, item.config
    assert c is not None
    return math.ceil(p.m / c.bm) * math.ceil(p.n / c.bn) * (p.k // c.bk)


def moved(item: Program) -> int:
    """Bytes that the product must move once."""
    p = item.problem
    if item.label == "bf16":
        return 2 * (p.m * p.k + p.k * p.n + p.m * p.n)
    return p.least_bytes


def _pipeline(chip: Chip, item: Program, static: Static, memory: float) -> float:
    """The time of tokamax's kernel: its grid is dynamic, so the profile sees no loop.

    What two buffers allow at best: a block arrives, then each step computes while the next block
    comes, and the last one only computes. Blocks are in the kernel's name.
    """
    tiles = re.search(r"tm_(\d+)-tk_(\d+)-tn_(\d+)", " ".join(op["name"] for op in static.sequence))
    if tiles is None:
        return memory
    p, (tm, tk, tn) = item.problem, map(int, tiles.groups())
    steps = math.ceil(p.m / tm) * math.ceil(p.k / tk) * math.ceil(p.n / tn)
    return _two_buffers(steps, static, chip, memory)


def _once(item: Program, static: Static) -> int:
    """Bundles that only the first step has: where x is one block, what is made of it is made once.

    Several cores begin wherever they like, and have no such condition.
    """
    p, c = item.problem, item.config
    assert c is not None
    return static.conditional if p.m <= c.bm and p.k == c.bk and not c.parallel else 0


def _two_buffers(steps: int, static: Static, chip: Chip, memory: float, once: int = 0) -> float:
    """Microseconds of a pipeline: a first block arrives, then each step's work hides the next.

    Cores share the steps and the bandwidth. Of the bundles of a step, `once` are the first one's.
    """
    steps = math.ceil(steps / chip.cores)
    block, step = memory / steps, (static.bundles - once) / chip.clock * 1e6
    prepared = step + once / chip.clock * 1e6
    if steps == 1:
        return block + prepared
    return block + max(prepared, block) + (steps - 2) * max(step, block) + step
