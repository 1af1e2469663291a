"""What users say about calibration: which operands are observed, and with which statistics.

Read by `insert_observers`, whose pass and whose `Observation` take `Observe` lines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jaxquant.core.recipe import Rule
from jaxquant.passes.histogram import Histogram, Percentile
from jaxquant.passes.moving_average import MovingAverage
from jaxquant.passes.row_statistics import Hessian, Reservoir
from jaxquant.passes.statistics import AbsMax, MeanAbs, MinMax, Statistic

STATISTICS: dict[str, Callable[[], Statistic]] = {
    "absmax": AbsMax,
    "minmax": MinMax,
    "mean": lambda: MeanAbs(channels=False),
    "moving_absmax": MovingAverage,
    "moving_minmax": lambda: MovingAverage(of_what="minmax"),
    "histogram": Histogram,
    "percentile": Percentile,
    "channel_absmax": lambda: AbsMax(channels=True),
    "channel_minmax": lambda: MinMax(channels=True),
    "channel_mean": MeanAbs,
    "hessian": Hessian,
    "reservoir": Reservoir,
}
"""The statistics that have names; give the object itself for other options."""


@dataclasses.dataclass(frozen=True)
class Observe:
    """One line of what to observe. All lines that match an operand add their statistics.

    Attributes:
      path: glob over paths, as in `jaxquant.Rule`. The input of a weight's product is named by the
        parameter's path; the operands of a product of two activations by its module and number:
        "layers/attention/dot_general_0/lhs".
      statistics: names (see `STATISTICS`) or `Statistic`s.
      op: "weight" for inputs of weights, "weightless" for products of two activations.
    """

    path: str = "**"
    statistics: tuple[Statistic, ...] = (AbsMax(),)
    op: Literal["weight", "weightless"] = "weight"

    def __post_init__(self) -> None:
        given = self.statistics
        many = [given] if isinstance(given, str | Statistic) else list(given)
        object.__setattr__(self, "statistics", tuple(map(_statistic, many)))
        if not self.statistics:
            raise ValueError(f"Observe({self.path!r}): statistics is empty")
        if self.op not in ("weight", "weightless"):
            raise ValueError(f"op={self.op!r} must be 'weight' or 'weightless'")
        self._glob  # noqa: B018  (an error in the glob is raised here)

    @property
    def _glob(self) -> Rule:
        return Rule(self.path, skip=True)

    def matches(self, path: str, weight: bool) -> bool:
        """Whether it is for this operand."""
        return weight == (self.op == "weight") and self._glob.matches_path(path)


def observe_rules(statistics: Any) -> tuple[Observe, ...]:
    """Reads what users write: a name, a `Statistic`, `Observe` lines, or globs with either.

    Raises:
      TypeError: it is none of these.
      ValueError: an unknown name (the known ones are listed).
    """
    if isinstance(statistics, Observe):
        return (statistics,)
    if isinstance(statistics, str | Statistic):
        return (Observe("**", (statistics,)),)  # type: ignore[arg-type]
    if isinstance(statistics, Mapping):
        return tuple(Observe(path, given) for path, given in statistics.items())
    if isinstance(statistics, Iterable):
        return tuple(rule for item in statistics for rule in observe_rules(item))
    raise TypeError(
        "statistics must be a name, a Statistic, an Observe, a sequence of these, or a mapping "
        f"from globs to them; got a {type(statistics).__name__}"
    )


def _statistic(given: Any) -> Statistic:
    if isinstance(given, Statistic):
        return given
    if isinstance(given, str) and given in STATISTICS:
        return STATISTICS[given]()
    raise ValueError(f"unknown statistic {given!r}. Known: {', '.join(STATISTICS)}")
