"""What was timed on a chip: the fastest config of a product, or that XLA was faster.

`benchmarks/gpu_tune.py` writes a table for the chip at hand; it ships as `tables/<chip>.json`, and
`gpu.heuristics` and `gpu.select` ask `find` before they go by rules. A table is not trusted: what
is not as it should be is an error that names the file and the entry. No table: no entries.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
import typing
from collections.abc import Sequence
from typing import Any

from jaxquant.pallas_kernels.gpu.chips import CHIPS, Chip
from jaxquant.pallas_kernels.gpu.config import GpuConfig
from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem

VERSION = 1
# An entry serves shapes whose k and n together differ by no more than this factor.
_NEAR = 2.0


class TableError(ValueError):
    """A table that cannot be trusted; names the file and the entry."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One product that was timed.

    Attributes:
      codes: a key of `problem.STORAGE`.
      x_dtype: as in `MatmulProblem`.
      group: contracted values that share a scale; 0 for a scale a column.
      zero_point: whether there are zero points.
      experts: weights that rows are grouped by; 0 for a product with one weight.
      outliers: columns of x in bfloat16 beside the int8 product (LLM.int8()'s capacity); else 0.
      k: contracted values.
      n: columns.
      m: rows of x; the entry serves fewer rows as well, down to the next entry.
      config: the fastest one; None where XLA was faster than all.
      microseconds: of the fastest kernel.
      xla_microseconds: of XLA's route.
    """

    codes: str
    x_dtype: str
    group: int
    zero_point: bool
    experts: int
    outliers: int
    k: int
    n: int
    m: int
    config: GpuConfig | None
    microseconds: float
    xla_microseconds: float

    def __post_init__(self) -> None:
        wrong = [f for f in ("k", "n", "m") if getattr(self, f) < 1]
        wrong += [
            f
            for f in ("microseconds", "xla_microseconds")
            if not (math.isfinite(getattr(self, f)) and getattr(self, f) > 0)
        ]
        wrong += [f for f in ("group", "experts", "outliers") if getattr(self, f) < 0]
        wrong += ["codes"] * (self.codes not in STORAGE)
        if wrong:
            shown = ", ".join(f"{f} = {getattr(self, f)!r}" for f in wrong)
            raise ValueError(f"{shown} cannot be")
        if (self.config is None) != (self.xla_microseconds < self.microseconds):
            raise ValueError("there is no config exactly where XLA was faster")


def entry_of(
    problem: MatmulProblem,
    config: GpuConfig,
    microseconds: float,
    xla_microseconds: float,
    *,
    experts: int = 0,
    outliers: int = 0,
) -> Entry:
    """The entry for a product that was timed."""
    fastest = config if microseconds <= xla_microseconds else None
    times = float(microseconds), float(xla_microseconds)
    kind = *_format(problem), experts, outliers
    return Entry(*kind, problem.k, problem.n, problem.m, fastest, *times)


def find(
    problem: MatmulProblem, chip: Chip, *, experts: int = 0, outliers: int = 0
) -> Entry | None:
    """The entry that serves a product on a chip, if its table has one.

    Of the entries of the same format and of the shape that is nearest (k, n and the experts
    together within a factor of two), the one with the fewest rows that are no fewer, else the one
    with most.

    Args:
      problem: the product; of all rows, if they are grouped by expert.
      chip: where it runs.
      experts: how many weights rows are grouped by, if they are.
      outliers: LLM.int8()'s capacity, if the product is that.

    Raises:
      TableError: the chip's table is damaged.
    """
    return nearest(problem, table(chip.name), experts=experts, outliers=outliers)


def nearest(
    problem: MatmulProblem, entries: Sequence[Entry], *, experts: int = 0, outliers: int = 0
) -> Entry | None:
    """`find` among given entries."""

    def kind(e: Entry) -> Any:
        return (e.codes, e.x_dtype, e.group, e.zero_point), e.experts > 0, e.outliers

    wanted = _format(problem), experts > 0, outliers
    same = [e for e in entries if kind(e) == wanted]
    if not same:
        return None

    def distance(entry: Entry) -> float:
        pairs = (entry.k, problem.k), (entry.n, problem.n), (entry.experts, experts)
        return sum(abs(math.log2(a / b)) for a, b in pairs if b)

    least = min(map(distance, same))
    if least > math.log2(_NEAR):
        return None
    same = [e for e in same if distance(e) == least]
    return min(
        (e for e in same if e.m >= problem.m),
        key=lambda e: e.m,
        default=max(same, key=lambda e: e.m),
    )


def _format(problem: MatmulProblem) -> tuple[str, str, int, bool]:
    group = 0 if problem.groups == 1 else problem.group
    return problem.codes, problem.x_dtype, group, problem.zero_point


@functools.cache
def table(chip: str) -> tuple[Entry, ...]:
    """The entries that ship for a chip; none, if it has no table.

    Raises:
      TableError: the table is damaged.
    """
    file = importlib.resources.files(__package__ or "") / "tables" / f"{chip}.json"
    return parse(file.read_text(), str(file), chip) if file.is_file() else ()


def render(entries: Sequence[Entry], chip: str, environment: dict[str, Any]) -> str:
    """A table as text; `environment` says with what and how it was measured."""
    rows = [json.dumps(dataclasses.asdict(entry)) for entry in entries]
    head = {"version": VERSION, "chip": chip, "environment": environment}
    body = ",\n".join(rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "entries": [\n{body}\n]\n}}\n'


def parse(text: str, where: str, chip: str) -> tuple[Entry, ...]:
    """The entries of a table.

    Args:
      text: what `render` wrote.
      where: the file's name, for errors.
      chip: the chip that it must be of.

    Raises:
      TableError: it is no such table.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{where} is no JSON: {error}") from error
    keys = {"version", "chip", "environment", "entries"}
    if not isinstance(data, dict) or set(data) != keys or not isinstance(data["entries"], list):
        raise TableError(f"{where}: a table has exactly {', '.join(sorted(keys))}")
    if data["version"] != VERSION:
        raise TableError(f"{where}: version {data['version']!r}; this jaxquant reads {VERSION}")
    if data["chip"] != chip or chip not in CHIPS:
        raise TableError(f"{where} is of the chip {data['chip']!r}, not {chip!r}")
    return tuple(_entry(item, f"{where}: entry {i}") for i, item in enumerate(data["entries"]))


def _entry(item: Any, where: str) -> Entry:
    try:
        return _build(Entry, item)
    except (ValueError, TypeError) as error:
        raise TableError(f"{where}: {error}") from error


def _build(cls: Any, item: Any) -> Any:
    """A dataclass from a mapping of exactly its fields, each of the field's type."""
    hints = typing.get_type_hints(cls)
    if not isinstance(item, dict) or set(item) != set(hints):
        raise ValueError(f"{cls.__name__} has exactly the fields {', '.join(hints)}")
    return cls(**{name: _value(name, item[name], hint) for name, hint in hints.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
    if hint == GpuConfig | None:
        return None if value is None else _build(GpuConfig, value)
    if typing.get_origin(hint) is typing.Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")
        return value
    if type(value) is not hint:
        raise ValueError(f"{name} must be of type {hint.__name__}, not {value!r}")
    return value
