"""The spine's figures, each beside Qwix where it can do the work.

    pip install -e '.[bench]' && python -m benchmarks.spine

writes benchmarks/results/spine-jax-VERSION.json and .md. One figure alone: --only matmul.
"""

from __future__ import annotations

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


if __name__ == "__main__":
    harness.main("benchmarks.spine", FIGURES, TIMED, "spine")
