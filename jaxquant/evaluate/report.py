"""The result of a comparison, and the ways to show it.

For: users of :func:`jaxquant.compare`. The report holds numbers and text only: it can be kept, sent
and shown without the models. The table is in :mod:`jaxquant.evaluate.table`, the page in
:mod:`jaxquant.evaluate.page`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

from jaxquant.evaluate.bootstrap import Interval
from jaxquant.evaluate.page import render_page
from jaxquant.evaluate.reading import READ_AS, Kind
from jaxquant.evaluate.rebuild import rebuild
from jaxquant.evaluate.results import Flag, RecipeResult
from jaxquant.evaluate.table import render_table, table_text

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`jaxquant.compare` measured.

    Attributes:
      title: as given.
      kind: how the outputs were read: "tokens", "classes" or "values".
      float_model: the float model's own result.
      recipes: one result per recipe, in the order given.
      environment: platform, versions, time and command.
      settings: resamples, level, seed, and the batch that was timed.
    """

    title: str
    kind: Kind
    float_model: RecipeResult
    recipes: tuple[RecipeResult, ...]
    environment: dict[str, str]
    settings: dict[str, Any]

    def __getitem__(self, recipe: str) -> RecipeResult:
        """The result of a recipe by name ("float" for the float model)."""
        for result in (self.float_model, *self.recipes):
            if result.name == recipe:
                return result
        known = ", ".join(result.name for result in (self.float_model, *self.recipes))
        raise KeyError(f"no recipe {recipe!r} in this report; it has {known}")

    @property
    def slices(self) -> tuple[str, ...]:
        """Slice names, in the order given."""
        return tuple(self.float_model.slices)

    @property
    def flags(self) -> tuple[Flag, ...]:
        """Every batch on which a recipe's outputs were not finite."""
        return tuple(flag for result in self.recipes for flag in result.flags)

    @property
    def divergence(self) -> str:
        """What the divergence is, as a column title."""
        return "relative error" if self.kind == "values" else "KL"

    def notes(self) -> list[str]:
        """What a reader must know to read the numbers, as sentences."""
        level = f"{self.settings['level']:.0%}"
        notes = [f"Outputs were read as {READ_AS[self.kind]}."]
        if self.settings["resamples"]:
            notes.append(
                f"Brackets are {level} bootstrap intervals over examples "
                f"({self.settings['resamples']} resamples, seed {self.settings['seed']}); the "
                "maximum has none."
            )
        few = [name for name, q in self.float_model.slices.items() if q.examples < 20]
        if few and self.settings["resamples"]:
            notes.append(f"Fewer than 20 examples, so too narrow an interval: {', '.join(few)}.")
        notes.append(
            "Bytes are those the device reports, scales included. This holds for "
            f"{self.environment['platform']} with jax {self.environment['jax']} and says nothing "
            "of other "
            "platforms."
        )
        if self.float_model.speed is not None:
            notes.append(
                f"Times are medians of interleaved, blocked calls on a batch of "
                f"{self.settings['latency_batch']}, compilation apart, on "
                f"{self.environment['device']}."
            )
        for flag in self.flags:
            rows = ", ".join(map(str, flag.rows[:8])) + (", …" if len(flag.rows) > 8 else "")
            notes.append(
                f"NOT FINITE: recipe {flag.recipe!r}, slice {flag.slice!r}, batch {flag.batch}: "
                f"{flag.positions} positions (rows {rows}); they count as infinitely far."
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, numbers and strings; "inf" and "nan" are strings."""
        return {"format": FORMAT_VERSION, **_plain(self), "notes": self.notes()}

    def to_json(self, indent: int | None = 1) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Rebuilds a report from :meth:`to_json`, to show or render it again.

        Raises:
          ValueError: if the text is of another format version.
        """
        data = json.loads(text)
        if data.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"report format {data.get('format')!r}; this version reads format {FORMAT_VERSION}"
            )
        return rebuild(cls, data)

    def save_json(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes :meth:`to_json` and returns the path."""
        path = pathlib.Path(path)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    def to_html(self) -> str:
        """One self-contained HTML page: no network, no scripts, light and dark."""
        return render_page(self)

    def save_html(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes :meth:`to_html` and returns the path."""
        path = pathlib.Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path

    def __rich__(self) -> Any:
        return render_table(self)

    def __str__(self) -> str:
        return table_text(self)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Interval) and value.low is None:
        return {"value": _plain(value.value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
