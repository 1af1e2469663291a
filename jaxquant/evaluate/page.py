"""The report as one self-contained HTML page: no scripts, no network, light and dark.

For: :class:`jaxquant.evaluate.report.Report`. Every text that came from a user (names, decoded
tokens, commands) is escaped here or in :mod:`jaxquant.evaluate.svg`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxquant.evaluate import format as fmt
from jaxquant.evaluate import plots, svg
from jaxquant.evaluate.columns import Column, cost_columns, quality_columns
from jaxquant.evaluate.results import WorstExample
from jaxquant.evaluate.style import STYLE
from jaxquant.evaluate.table import counted

if TYPE_CHECKING:
    from jaxquant.evaluate.report import Report


def render_page(report: Report) -> str:
    """The whole page as text."""
    sections = [
        _section("Overview", _overview(report)),
        _section("Quality against bytes", _legend(report) + _wide(plots.quality_plot(report))),
        _section("By slice", _slices(report)) if len(report.slices) > 1 else "",
        _section(
            f"The tail of the {report.divergence}", _legend(report) + _wide(plots.tail_plot(report))
        ),
        _section("Error of each quantized weight", _weights(report)),
        _section("Worst examples", _worst(report)) if any(r.worst for r in report.recipes) else "",
        _section("How this was measured", _environment(report)),
    ]
    title = html.escape(report.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{title}</h1>{_subtitle(report)}</header>{_alarm(report)}"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _wide(body: str) -> str:
    """Scrolls by itself on a narrow screen."""
    return f'<div class="wide">{body}</div>'


def _subtitle(report: Report) -> str:
    env = report.environment
    names = ", ".join(result.name for result in report.recipes)
    text = (
        f"{names} against the float model · {counted(report.float_model.overall)} · measured on "
        f"{env['platform']} ({env['device']}, {env['processor']}), jax {env['jax']}, "
        f"{env['measured']}"
    )
    return f"<p>{html.escape(text)}</p>"


def _alarm(report: Report) -> str:
    alarms = [note for note in report.notes() if note.startswith("NOT FINITE")]
    items = "".join(f"<p>{html.escape(note)}</p>" for note in alarms)
    return f'<div class="alarm" role="alert">{items}</div>' if alarms else ""


def _legend(report: Report) -> str:
    chips = "".join(
        f'<span class="chip" style="--c:{svg.series(i)}">{html.escape(r.name)}</span>'
        for i, r in enumerate(report.recipes)
    )
    return f'<div class="legend">{chips}</div>'


def _overview(report: Report) -> str:
    everyone = (report.float_model, *report.recipes)
    quality = quality_columns(report, [result.overall for result in everyone])
    return (
        _table(report, quality) + "<h3>Cost</h3>" + _table(report, cost_columns(report, everyone))
    )


def _table(report: Report, columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in columns)
    rows = []
    for index, result in enumerate((report.float_model, *report.recipes)):
        chip = f' class="chip" style="--c:{svg.series(index - 1)}"' if index else ""
        cells = "".join(_cell(*cells[index]) for _, cells in columns)
        rows.append(f"<tr><th><span{chip}>{html.escape(result.name)}</span></th>{cells}</tr>")
    return (
        '<div class="wide"><table><thead><tr><th>recipe</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: str, spread: str) -> str:
    small = f"<small>{html.escape(spread)}</small>" if spread else ""
    return f"<td>{html.escape(value)}{small}</td>"


def _slices(report: Report) -> str:
    everyone = (report.float_model, *report.recipes)
    panels, tables = [], []
    width = 530 if len(report.slices) in (2, 4) else 352
    for name in report.slices:
        found = [result.slices[name] for result in everyone]
        title = f"{html.escape(name)} <small>{html.escape(counted(found[0]))}</small>"
        plot = plots.quality_plot(report, name, width)
        panels.append(f"<figure><h3>{title}</h3>{plot}</figure>")
        body = _table(report, quality_columns(report, found))
        tables.append(f"<details><summary>{title}</summary>{body}</details>")
    grid = f'<div class="panels" style="--panel:{width - 52}px">{"".join(panels)}</div>'
    every = f"<h3>Every number of a slice</h3>{''.join(tables)}"
    return _legend(report) + grid + _matrix(report) + every


def _matrix(report: Report) -> str:
    """Recipes against slices: the mean divergence, its interval, its p99."""
    columns: list[Column] = []
    for name in report.slices:
        cells = []
        for result in (report.float_model, *report.recipes):
            quality = result.slices[name]
            tail = quality.divergence
            mean, spread = fmt.with_range(tail.mean if tail else None)
            more = [] if tail is None else [f"p99 {fmt.number(tail.p99.value)}"]
            if quality.agreement is not None:
                more.append(f"same {fmt.percent(quality.agreement.value, 1)}")
            cells.append((mean, "\n".join(filter(None, (spread, *more)))))
        columns.append((name, cells))
    return f"<h3>{html.escape(report.divergence)} mean by slice</h3>{_table(report, columns)}"


def _weights(report: Report) -> str:
    aside = (
        '<p class="aside">Signal to quantization noise of the stored weight against the float '
        "weight at its path; a dot per layer. A recipe that rescales or rotates weights "
        "(SmoothQuant, AWQ, Hadamard) shows low here though the model's function is kept.</p>"
    )
    return _legend(report) + _wide(plots.weights_plot(report)) + aside


def _worst(report: Report) -> str:
    parts = []
    found = [(i, result) for i, result in enumerate(report.recipes) if result.worst]
    first = max(result.worst[0].divergence for _, result in found)
    for index, result in found:
        items = "".join(_example(report, w) for w in result.worst)
        head = f"{report.divergence} up to {fmt.number(result.worst[0].divergence)}"
        parts.append(
            f"<details{' open' if result.worst[0].divergence == first else ''}><summary>"
            f'<span class="chip" style="--c:{svg.series(index)}">{html.escape(result.name)}</span> '
            f"<small>{html.escape(head)}</small></summary><ol>{items}</ol></details>"
        )
    return "".join(parts)


def _example(report: Report, w: WorstExample) -> str:
    place = f"{w.slice} · batch {w.batch}, row {w.row}"
    if w.tokens or w.position:
        place += f", position {w.position}"
    facts = f"{report.divergence} {fmt.number(w.divergence)}"
    context = ""
    if w.tokens:
        shown = w.context_text or " ".join(map(str, w.tokens))
        context = f'<div class="context">{html.escape(shown)}<span class="caret"></span></div>'
    change = ""
    if w.float_top is not None:
        change = (
            f'<div class="change">float {_token(w.float_text, w.float_top)} '
            f"{fmt.percent(w.float_probability, 1)} → quantized "
            f"{_token(w.quantized_text, w.quantized_top)} {fmt.percent(w.quantized_probability, 1)}"
            + ("" if w.target is None else f" · truth {_token(w.target_text, w.target)}")
            + "</div>"
        )
    head = f"<p><b>{html.escape(facts)}</b> <small>{html.escape(place)}</small></p>"
    return f"<li>{head}{context}{change}</li>"


def _token(text: str, token: int | None) -> str:
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") if text else str(token)
    return f"<code>{html.escape(shown)}</code>"


def _environment(report: Report) -> str:
    rows = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>"
        for key, value in report.environment.items()
        if key != "command"
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes())
    command = html.escape(report.environment["command"])
    return f"<ul>{notes}</ul><dl>{rows}</dl><h3>Command</h3><pre>{command}</pre>"
