"""What the rules for TPU kernels choose, beside what they decide against, by static figures.

`python -m benchmarks.tpu_choices` writes results/tpu-choices.md: for each rule that docs/tpu.md
gives a figure for, a product with the config it gets and with one that differs in a few fields.
Times are read as in `benchmarks.tpu_static`: no hardware is timed. Needs libtpu; see
`benchmarks.tpu_aot`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.tpu_aot import Job, measure
from benchmarks.tpu_programs import FORMATS, Program, time_of
from benchmarks.tpu_static import RESULTS
from jaxquant.pallas_kernels.problem import MatmulProblem
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_config, fit

_E2M1 = {"codes": "table4", "e2m1": True}
_KINDS: dict[str, dict[str, Any]] = FORMATS | {
    "mxfp4": {**_E2M1, "group": 32},
    "nvfp4": {**_E2M1, "group": 16},
}
# Chip, format, m, k, n, and the fields that are otherwise.
Case = tuple[str, str, int, int, int, dict[str, Any]]
CASES: tuple[Case, ...] = (
    ("v5e", "w4a16 g128", 16, 4096, 4096, {"stream": False}),
    ("v6e", "w4a16 g128", 16, 4096, 4096, {"stream": False}),
    ("v6e", "w4a16 g128", 16, 8192, 28672, {"stream": False}),
    ("v6e", "w4a16 g128", 16, 8192, 28672, {"stream": False, "bk": 4096}),
    ("v5e", "w4a16 g128", 16, 4096, 4096, {"stream": False, "reading": "cast"}),
    ("v6e", "w4a16 g128", 16, 4096, 4096, {"operand": "bfloat16"}),
    ("v5p", "w4a16 g128", 8, 4096, 4096, {"operand": "bfloat16", "reading": "bits"}),
    ("v5p", "w4a16 g128", 16, 4096, 4096, {"operand": "int8", "reading": "cast"}),
    ("v5e", "w2a16 g128", 8, 4096, 4096, {"stream": False}),
    ("v4", "w4a16 g128", 64, 4096, 4096, {"reading": "cast"}),
    ("v4", "w8a16 g128", 16, 4096, 4096, {"reading": "cast"}),
    ("v5e", "w4a16 g32", 64, 4096, 4096, {"scale": "after"}),
    ("v6e", "w4a16 g128", 256, 4096, 4096, {"reading": "cast"}),
    ("v6e", "mxfp4", 64, 4096, 4096, {"scaled_in": "float32"}),
    ("v5e", "mxfp4", 64, 4096, 4096, {"scaled_in": "bfloat16"}),
    ("v5e", "nvfp4", 16, 4096, 4096, {"scale": "after"}),
    ("v5e", "w4a16 g128", 1024, 8192, 2048, {"bm": 512, "bn": 512}),
    ("v5e", "w8a8", 1024, 8192, 2048, {"bk": 4096}),
    ("v6e", "w4a16 g128", 32, 4096, 4096, {"operand": "int8", "reading": "cast"}),
    ("v6e", "w3a16 g128", 16, 4096, 4096, {"operand": "int8"}),
    ("v7x", "w2a16 g128", 16, 4096, 4096, {"reading": "nibbles"}),
    ("v5p", "w2a16 g128", 8, 8192, 28672, {"bk": 4096}),
    ("v5p", "w3a16 g128", 8, 8192, 28672, {"bk": 4096}),
    ("v5p", "w3a16 g128", 64, 8192, 28672, {"bk": 4096}),
    ("v5e", "w4a16 g128", 256, 4096, 4096, {"bn": 512}),
    ("v6e", "w4a16 g128", 256, 4096, 4096, {"bn": 512}),
    ("v5e", "w8a8", 1024, 4096, 4096, {"bm": 256}),
    ("v6e", "w8a8", 1024, 4096, 4096, {"bm": 256, "bn": 1024}),
    ("v6e", "w8a8", 1024, 4096, 4096, {"bm": 512}),
    ("v6e", "w4a16 g128", 1024, 4096, 4096, {"bm": 1024, "bn": 512}),
    ("v7x", "w4a16 g128", 1024, 4096, 14336, {"bm": 512}),
    ("v7x", "w4a16 g128", 1024, 4096, 14336, {"bm": 512, "bn": 1024}),
    ("v7x", "w4a16 g128", 1024, 8192, 4096, {"bm": 512, "bn": 1024}),
)


def _otherwise(problem: MatmulProblem, chip: str, changes: dict[str, Any]) -> MatmulConfig:
    """The chosen config but for these fields."""
    wanted = dataclasses.replace(choose_config(problem, CHIPS[chip]), **changes)
    config = fit(problem, CHIPS[chip], wanted)
    if config is None:
        raise ValueError(f"{changes} do not fit {chip}: {problem}")
    own = {name: value for name, value in changes.items() if name in ("stream", "scaled_in")}
    return dataclasses.replace(config, **own)  # which `fit` decides, too


def _row(case: Case) -> str:
    chip, label, m, k, n, changes = case
    problem = MatmulProblem(m, k, n, **_KINDS[label])
    configs = choose_config(problem, CHIPS[chip]), _otherwise(problem, chip, changes)
    fields = {"problem": dataclasses.asdict(problem), "chip": chip}
    items = [
        Program(
            label,
            problem,
            config,
            Job(
                name, "benchmarks.tpu_cases:chosen", fields | {"config": dataclasses.asdict(config)}
            ),
            1.0,
        )
        for name, config in zip(("chosen", "otherwise"), configs, strict=True)
    ]
    got = measure([item.job for item in items], chip)
    cells = [chip, label, f"{m} x {k} x {n}"]
    for item in items:
        time, spills = time_of(CHIPS[chip], item, got[item.job.name]), got[item.job.name].spills
        cells.append(
            time.bound
            if time.microseconds is None
            else f"{time.microseconds:.1f} us ({spills} spills)"
        )
    cells.append(", ".join(f"{name} = {value}" for name, value in changes.items()))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Compiles, prints, and writes after each row."""
    lines = ["| chip | format | m x k x n | chosen | otherwise | what is otherwise |"]
    lines.append("|---|---|---|---|---|---|")
    for case in CASES:
        lines.append(_row(case))
        print(lines[-1], flush=True)
        text = "\n".join(["# What the rules choose, and what they do not", "", *lines]) + "\n"
        (RESULTS / "tpu-choices.md").write_text(text)


if __name__ == "__main__":
    main()
