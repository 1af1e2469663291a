"""Configs that a search found better than the rules, read from data shipped with the package.

`tpu.heuristics.choose_config` asks `find` before it follows its rules. `benchmarks.tpu_tune` writes
`tables/<chip>.json` from static cycles and bytes; an entry that does not beat the rules by a margin
is not written. What is read is checked, since a table can be edited by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from importlib import resources
from typing import Any

from jaxquant.pallas_kernels.problem import STORAGE, MatmulProblem
from jaxquant.pallas_kernels.tpu.config import Reading, ScaleTime

# Entries are for products of up to so many rows, and the last for more; likewise for columns and
# contracted values. The search is done at these sizes.
ROWS = (16, 64, 256, 1024)
COLUMNS = (4096, 14336)
DEPTHS = (4096, 8192, 14336)

Key = tuple[str, str, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Blocks and order of operations for a kind of product.

    Attributes:
      codes: key of `STORAGE`.
      x_dtype: dtype name of x as the kernel gets it.
      group: contracted values that share a scale; 0 for a scale a column.
      rows: of `ROWS`.
      columns: of `COLUMNS`.
      depth: of `DEPTHS`.
      bm, bn, bk, scale, reading, operand: as in `MatmulConfig`.
      gain: time by the rules over the time of this, when it was searched.
    """

    codes: str
    x_dtype: str
    group: int
    rows: int
    columns: int
    depth: int
    bm: int
    bn: int
    bk: int
    scale: ScaleTime
    reading: Reading
    operand: str
    gain: float

    @property
    def key(self) -> Key:
        """What it is for."""
        return self.codes, self.x_dtype, self.group, self.rows, self.columns, self.depth


def find(problem: MatmulProblem, chip: str) -> Entry | None:
    """The entry for a product on a chip, if the search found one better than the rules.

    One that was found at fewer columns serves more: they are more steps of the same blocks.
    """
    entries, key = load(chip), key_of(problem)
    return entries.get(key) or entries.get((*key[:4], COLUMNS[0], key[5]))


def key_of(problem: MatmulProblem) -> Key:
    """Which entry is for a product."""
    p = problem
    group = 0 if p.groups == 1 else p.group
    sizes = bucket(p.m, ROWS), bucket(p.n, COLUMNS), bucket(p.k, DEPTHS)
    return p.codes, p.x_dtype, group, *sizes


def bucket(size: int, sizes: tuple[int, ...]) -> int:
    """The first of the sizes that is not smaller, else the last."""
    return next((s for s in sizes if size <= s), sizes[-1])


@functools.cache
def load(chip: str) -> dict[Key, Entry]:
    """A chip's table by key; empty if there is none.

    Raises:
      ValueError: an entry is not what it should be; says which and why.
    """
    file = resources.files(__package__) / "tables" / f"{chip}.json"
    return parse(file.read_text(), file.name) if file.is_file() else {}


def parse(text: str, name: str) -> dict[Key, Entry]:
    """The entries of a table's text by key.

    Raises:
      ValueError: as for `load`.
    """
    entries: dict[Key, Entry] = {}
    for number, fields in enumerate(json.loads(text)["entries"]):
        where = f"{name}, entry {number}"
        entry = _checked(fields, where)
        if entry.key in entries:
            raise ValueError(f"{where}: there is one for {entry.key} already")
        entries[entry.key] = entry
    return entries


def _checked(fields: dict[str, Any], where: str) -> Entry:
    names = {field.name for field in dataclasses.fields(Entry)}
    if set(fields) != names:
        raise ValueError(f"{where}: fields {sorted(set(fields) ^ names)} are missing or unknown")
    allowed = {
        "codes": tuple(STORAGE),
        "rows": ROWS,
        "columns": COLUMNS,
        "depth": DEPTHS,
        "scale": typing.get_args(ScaleTime),
        "reading": typing.get_args(Reading),
    }
    for name, values in allowed.items():
        if fields[name] not in values:
            raise ValueError(f"{where}: {name} is one of {values}, not {fields[name]!r}")
    for name, multiple in (("bm", 16), ("bn", 128), ("bk", 128), ("group", 32)):
        size = fields[name]
        if not isinstance(size, int) or size < (name != "group") or size % multiple:
            raise ValueError(f"{where}: {name} is a multiple of {multiple}, not {size!r}")
    return Entry(**fields)
