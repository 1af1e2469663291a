"""`insert_observers`: calibration as extra outputs of a pure function, for given parameters.

The result is an ordinary function that can be jitted, vmapped and sharded: statistics inside a scan
over stacked layers come out stacked like the layers, those inside other loops and branches are
merged. Called where the parameters and their statistics are known already (by ptq, for static
ranges); `insert_observers` has the pass, with rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxquant.passes import observer_control as observer_control  # enters its rules
from jaxquant.passes.observer import Observer
from jaxquant.passes.program import Program
from jaxquant.passes.statistics import Statistic


def insert_observers(
    program: Program, statistics: Mapping[str, Statistic]
) -> Callable[..., dict[str, Any]]:
    """A pure function that gives statistics of what the observed parameters are multiplied with.

    Args:
      program: the float program.
      statistics: for each parameter path to observe, what is collected; none that draws.

    Returns:
      ``observed(*flat_inputs) -> {path: state}``. A parameter that scans stack has one leading
      axis a scan, outermost first; one that meets no product is absent.

    Raises:
      ValueError: a path is no parameter of the program.
    """
    unknown = set(statistics) - set(program.parameters)
    if unknown:
        raise ValueError(f"not parameters of the program: {', '.join(sorted(unknown))}")

    def select(path: str, weight: bool) -> Sequence[Statistic]:
        return (statistics[path],) if weight and path in statistics else ()

    def observed(*inputs: Any) -> dict[str, Any]:
        _, found = Observer(program, select).observe(inputs)
        return {path: states[statistics[path].name] for path, states in found.items()}

    return observed
