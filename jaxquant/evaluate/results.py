"""What a comparison found: plain frozen data, nothing that computes.

For: :class:`jaxquant.evaluate.report.Report` and everything that shows it (table, JSON, page). All
numbers are Python numbers; nothing here holds an array or a model.
"""

from __future__ import annotations

import dataclasses

from jaxquant.evaluate.bootstrap import Interval
from jaxquant.evaluate.latency import Ratio, Timing


@dataclasses.dataclass(frozen=True)
class Tail:
    """How a divergence is distributed over positions. ``worst`` has no interval: none is valid."""

    mean: Interval
    p50: Interval
    p99: Interval
    worst: float


@dataclasses.dataclass(frozen=True)
class Quality:
    """One candidate on one slice, or on all slices together.

    Attributes:
      examples: rows.
      positions: positions that count (tokens; for classifiers and values: rows).
      divergence: from the float model: KL(float || quantized) in nats, or the relative error
        ``|q - f| / |f|`` of values. None for the float model.
      agreement: share of positions with the float model's top-1.
      loss: mean over targets.
      loss_delta: paired difference of the loss to the float model's.
      perplexity: ``exp(loss)``, only for the library's own loss.
      accuracy: share of targets that are the top-1.
      sqnr_db: of values: ``10 log10(sum f^2 / sum (q - f)^2)`` over the slice.
      metrics: the user's metrics.
      metric_deltas: paired differences of these to the float model's.
    """

    examples: int
    positions: int
    divergence: Tail | None = None
    agreement: Interval | None = None
    loss: Interval | None = None
    loss_delta: Interval | None = None
    perplexity: Interval | None = None
    accuracy: Interval | None = None
    sqnr_db: Interval | None = None
    metrics: dict[str, Interval] = dataclasses.field(default_factory=dict)
    metric_deltas: dict[str, Interval] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WorstExample:
    """A position far from the float model, at most one per row.

    ``tokens`` is the context up to and with the position, cut to its last ones. The texts are what
    ``decode=`` made of the ids, or empty.
    """

    slice: str
    batch: int
    row: int
    position: int
    divergence: float
    float_top: int | None = None
    float_probability: float | None = None
    quantized_top: int | None = None
    quantized_probability: float | None = None
    target: int | None = None
    tokens: tuple[int, ...] = ()
    context_text: str = ""
    float_text: str = ""
    quantized_text: str = ""
    target_text: str = ""


@dataclasses.dataclass(frozen=True)
class Flag:
    """Non-finite outputs of a recipe: where, and how many positions."""

    recipe: str
    slice: str
    batch: int
    rows: tuple[int, ...]
    positions: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
      total: the whole tree, scales included, as measured.
      quantized: the QTensor leaves alone, scales included, as measured.
      quantized_float: the float leaves these stand for, as measured in the float tree.
      quantized_bf16: the same number of values at two bytes.
      total_bf16: the whole tree with every floating leaf at two bytes.
      total_float: the float tree as it is.
      leaves: how many QTensor leaves there are.
    """

    total: int
    quantized: int
    quantized_float: int
    quantized_bf16: int
    total_bf16: int
    total_float: int
    leaves: int


@dataclasses.dataclass(frozen=True)
class WeightError:
    """Signal to quantization noise of one quantized parameter, or of one layer of a stacked one."""

    path: str
    layer: int | None
    qtype: str
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time per call on the first batch; ``speedup`` is against the float model, round by round."""

    timing: Timing
    speedup: Ratio | None
    items_per_s: float
    trace_s: float
    compile_s: float


@dataclasses.dataclass(frozen=True)
class RecipeResult:
    """Everything about one candidate. The float model is one too, without divergences and weights.

    ``survival`` is the distribution of the divergence: pairs of a value and the share of positions
    above it.
    """

    name: str
    overall: Quality
    slices: dict[str, Quality]
    memory: Memory
    speed: Speed | None = None
    weights: tuple[WeightError, ...] = ()
    survival: tuple[tuple[float, float], ...] = ()
    worst: tuple[WorstExample, ...] = ()
    flags: tuple[Flag, ...] = ()
