"""The spine's figures, each beside Qwix where it can do the work.

    pip install -e '.[bench]' && python -m benchmarks.spine

writes benchmarks/results/spine-jax-VERSION.json and .md. One figure alone: --only matmul.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax

from benchmarks import harness, memory, quality, speed

FIGURES = {
    "matmul": speed.matmul,
    "forward": speed.forward,
    "tracing": speed.tracing,
    "sizes": memory.sizes,
    "quantizing": memory.quantizing,
    "quality": quality.quality,
}
TIMED = ("matmul", "forward", "tracing", "quantizing")  # run twice; the others have no noise


def main() -> None:
    """Runs the figures asked for and writes the results."""
    parser = argparse.ArgumentParser(description="Measures the spine's figures.")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument(
        "--quick", action="store_true", help="small shapes; checks the script itself"
    )
    parser.add_argument("--in-process", choices=FIGURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        figure = FIGURES[args.in_process](args.quick)
        print(json.dumps(dataclasses.asdict(figure)))
        return
    runs: dict[str, list[harness.Figure]] = {}
    for name in args.only:
        runs[name] = [harness.in_own_process(name, args.quick) for _ in range(1 + (name in TIMED))]
        print("\n".join(harness.table(runs[name][0].rows)))
        print([figure.met for figure in runs[name]], flush=True)
    if args.quick:
        return
    command = "python -m benchmarks.spine"  # or some of the figures, with --only
    for path in harness.write(f"spine-jax-{jax.__version__}", runs, command):
        print(path)


if __name__ == "__main__":
    main()
