"""4-bit tables and int4 inputs on TPU by static figures, beside what XLA makes of the same product.

`python -m benchmarks.tpu_formats` writes results/tpu-formats.md: for 4096 x 4096 the time of our
kernel, of XLA's own lowering, and of bfloat16 weights; and dynamic quantization of few rows in
front, by XLA and by the kernel. For many rows a quarter of the columns stands for all. Times are
read as in `benchmarks.tpu_static`: no hardware is timed. Needs libtpu; see `benchmarks.tpu_aot`.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_aot import Job, measure
from benchmarks.tpu_programs import Program, Time, time_of
from benchmarks.tpu_static import RESULTS
from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_config

_SIZE, _FEW_ROWS, _PART = 4096, 64, 1024
_INT4 = {"codes": "int4", "x_dtype": "int4", "x_scale": True}
# By what is stored: the fields of our problem; qtype, group and input scheme of XLA's.
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4 g64": ({"codes": "table4", "group": 64}, {"qtype": "nf4", "group": 64}),
    "mxfp4": (
        {"codes": "table4", "group": 32, "e2m1": True},
        {"qtype": "mxfp4", "group": 32},
    ),
    "nvfp4": (
        {"codes": "table4", "group": 16, "e2m1": True},
        {"qtype": "nvfp4", "group": 16},
    ),
    "w4a4": (_INT4, {"qtype": "int4", "group": 0, "act": "int4"}),
    "w4a4 g128": ({**_INT4, "group": 128}, {"qtype": "int4", "group": 128, "act": "int4"}),
}
_PRODUCT = "benchmarks.tpu_formats:xla_product"
_NOTE = (
    "Microseconds by the TPU compiler's static account (no hardware was timed): the larger of"
    " estimated cycles and bytes moved once. `>=`: the estimator aborts, and this is a lower bound,"
    " operation by operation. 16 rows stand for 1 to 16: a block has 16."
)


def xla_product(m: int, n: int, qtype: str, group: int, act: str = "") -> tuple[Any, Any, int]:
    """XLA's own lowering of `quantized_dot_general` with a weight of 4096 rows."""
    struct, kind = jax.ShapeDtypeStruct, get_qtype(qtype)
    scale: Any = struct((_SIZE // (group or _SIZE), n), jnp.dtype(kind.scale_dtype or "float32"))
    if kind.scale_qtype:  # nvfp4: E4M3 over one number
        inner = get_qtype(kind.scale_qtype)
        codes = struct(scale.shape, jnp.dtype(inner.storage))
        scale = QTensor(codes, struct((1, 1), jnp.float32), qtype=inner, dtype=scale.dtype)
    weight = QTensor(
        struct((_SIZE, n), jnp.dtype(kind.storage)),
        scale,
        act=ActScheme(act) if act else None,
        qtype=kind,
        dtype=jnp.dtype("bfloat16"),
    )

    def fn(x: jax.Array, w: QTensor) -> jax.Array:
        return quantized_dot_general(x, w, (((1,), (0,)), ((), ())), implementation="xla")

    return fn, (struct((m, _SIZE), jnp.bfloat16), weight), 0


def programs(chip: Chip, m: int) -> dict[str, Program | str]:
    """What is compiled for so many rows, by what it is; or why our kernel is not."""
    n = _SIZE if m <= _FEW_ROWS else _PART
    times = _SIZE / n
    size = {"m": m, "k": _SIZE, "n": n}
    floats = Job(f"bf16 {m}", "benchmarks.tpu_cases:bfloat16", size)
    whole = MatmulProblem(m, _SIZE, _SIZE, "int8")
    found: dict[str, Program | str] = {"bf16": Program("bf16", whole, None, floats, times)}
    for label, (fields, stored) in FORMATS.items():
        problem = MatmulProblem(m, _SIZE, _SIZE, **fields)
        theirs = Job(f"xla {label} {m}", _PRODUCT, {"m": m, "n": n, **stored})
        found[f"xla {label}"] = Program(f"xla {label}", problem, None, theirs, times)
        try:
            found[label] = _ours(chip, label, problem, choose_config(problem, chip), n)
        except Unsupported as why:
            found[label] = str(why)
    return found


def _ours(chip: Chip, label: str, problem: MatmulProblem, config: MatmulConfig, n: int) -> Program:
    part = dataclasses.replace(problem, n=n)
    arguments = {
        "problem": dataclasses.asdict(part),
        "config": dataclasses.asdict(config),
        "chip": chip.name,
    }
    job = Job(f"{label} {problem.m}", "benchmarks.tpu_cases:chosen", arguments)
    return Program(label, problem, config, job, problem.n / n)


def _row(chip: Chip, m: int) -> list[str]:
    items = programs(chip, m)
    got = measure([i.job for i in items.values() if isinstance(i, Program)], chip.name)
    times = {
        name: time_of(chip, item, got[item.job.name])
        for name, item in items.items()
        if isinstance(item, Program)
    }
    cells = [chip.name, str(m), _shown(times["bf16"])]
    for label in FORMATS:
        item = items[label]
        ours = item if isinstance(item, str) else _shown(times[label])
        if isinstance(item, Program) and item.config is not None:
            ours += f" ({item.config.reading}, {item.config.operand}, {item.config.scale})"
        cells += [ours, _shown(times[f"xla {label}"])]
    return cells


def _shown(time: Time) -> str:
    if time.microseconds is None:
        return f"does not compile: {time.bound}"
    return f"{'>= ' * time.at_least}{time.microseconds:.1f}"


def _in_front(chip: Chip) -> str:
    cells = [chip.name]
    jobs = [
        Job(str(kernel), "benchmarks.tpu_cases:quantize_in_front", arguments)
        for kernel in (False, True)
        for arguments in [{"m": 16, "k": _SIZE, "dtype": "int8", "kernel": kernel}]
    ]
    got = measure(jobs, chip.name)
    return _line([*cells, *(str(got[job.name].cycles) for job in jobs)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Compiles, prints, and writes after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    chips = ["v6e", "v5e", "v7x", "v5p", "v4"]
    parser.add_argument("--chips", nargs="+", default=chips, choices=chips)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 1024])
    given = parser.parse_args()
    head = ["chip", "rows", "bf16 weights", *(c for f in FORMATS for c in (f, f"XLA, {f}"))]
    lines = [_line(head), _line(["---"] * len(head))]
    front = ["", "Quantizing 16 x 4096 to int8, estimated cycles:", ""]
    front += ["| chip | XLA | kernel |", "|---|---|---|"]
    front += [_in_front(CHIPS[chip]) for chip in given.chips if chip != "v4"]
    title = f"# 4-bit tables and int4 inputs, {_SIZE} x {_SIZE}"
    for m in given.rows:
        for chip in given.chips:
            lines.append(_line(_row(CHIPS[chip], m)))
            print(lines[-1], flush=True)
            page = [title, "", _NOTE, "", *lines, *front]
            (RESULTS / "tpu-formats.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
