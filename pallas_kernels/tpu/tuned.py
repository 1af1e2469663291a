"""Blocks that beat the rules of `tpu.heuristics`, by the compiler's static estimate.

Written by `python -m benchmarks.tpu_static --tune`; read by `choose_config`. Keys: chip, codes,
dtype of x, when scales are applied, "decode" or "prefill". Values: (bm, bn, bk).
"""

from __future__ import annotations

TUNED: dict[tuple[str, str, str, str, str], tuple[int, int, int]] = {}
