"""Dumps: the program after each pass as a readable jaxpr, with what changed.

On while `dump(directory)` says so, or while ``JAXQUANT_DUMP=directory`` is set. Each run of a
pipeline gets a folder of its own; in it each pass a numbered file with its options, its time, its
notes and the jaxpr, and a ``.diff`` against the program before. Called by the `PassManager`.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxquant.passes.program import Program

_directory: Path | None = None


@contextlib.contextmanager
def dump(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside the context every pipeline writes its programs to ``directory``.

    Only pipelines that run are dumped: a compiled function that JAX or `jaxquant.transform` has
    cached is not traced again.

    Args:
      directory: made if it does not exist.

    Yields:
      The directory.
    """
    global _directory
    before, _directory = _directory, Path(directory)
    try:
        yield _directory
    finally:
        _directory = before


def wanted() -> Path | None:
    """The directory that dumps go to at present, or None."""
    named = os.environ.get("JAXQUANT_DUMP")
    return _directory or (Path(named) if named else None)


def start(title: str, program: Program) -> Dump | None:
    """A dump of one run of a pipeline, or None where none is asked for."""
    directory = wanted()
    return Dump(directory, title, program) if directory else None


class Dump:
    """The files of one run.

    Args:
      directory: the folder that holds the runs.
      title: part of the name of this run's folder.
      program: the program before the first pass.
    """

    def __init__(self, directory: Path, title: str, program: Program) -> None:
        self._folder = _new_folder(directory, re.sub(r"[^A-Za-z0-9_.-]+", "_", title))
        self._number = 0
        self._text = ""
        self._save("input", _describe(program), program)

    def write(self, step: Any, program: Program, record: Any) -> None:
        """Writes the program after a pass, and the difference to the one before it."""
        heading = [
            f"# {step!r}",
            f"# {record.seconds * 1e3:.2f} ms, verified in {record.verify_seconds * 1e3:.2f} ms; "
            + ("changed" if record.changed else "jaxpr unchanged"),
            *(f"# {line}" for note in record.notes for line in note.splitlines()),
            *_describe(program),
        ]
        self._save(step.name, heading, program)

    def _save(self, name: str, heading: list[str], program: Program) -> None:
        before, self._text = self._text, str(program.jaxpr)
        stem = f"{self._number:02d}-{name}"
        text = "\n".join([*heading, "", self._text, ""])
        (self._folder / f"{stem}.txt").write_text(text, encoding="utf-8")
        if self._number:
            lines = "\n".join(difference(before, self._text))
            (self._folder / f"{stem}.diff").write_text(lines + "\n", encoding="utf-8")
        self._number += 1


def difference(before: str, after: str) -> list[str]:
    """Lines that differ, marked - and +, with three lines around them.

    A variable's name is no difference: JAX names variables in order, so that one new equation
    renames all that follow.
    """
    old, new = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(
        None, [_nameless(x) for x in old], [_nameless(x) for x in new], autojunk=False
    )
    lines: list[str] = []
    for group in matcher.get_grouped_opcodes(3):
        lines.append(f"@@ -{group[0][1] + 1} +{group[0][3] + 1} @@")
        for tag, a, b, c, d in group:
            if tag == "equal":
                lines += [f"  {line}" for line in new[c:d]]
            else:
                lines += [f"- {line}" for line in old[a:b]] + [f"+ {line}" for line in new[c:d]]
    return lines


def _nameless(line: str) -> str:
    return re.sub(r"\b[a-z]{1,3}\b(?!=)", "%", line)


def _describe(program: Program) -> list[str]:
    named = [f"{i}: {x.path} {x.part or ''}" for i, x in enumerate(program.inputs) if x.path]
    facts = ", ".join(sorted(program.facts)) or "none"
    return [
        f"# stage {program.stage}; facts: {facts}",
        *(f"# input {text}".rstrip() for text in named),
    ]


def _new_folder(directory: Path, title: str) -> Path:
    for number in itertools.count():
        folder = directory / f"{number:03d}-{title}"
        if any(directory.glob(f"{number:03d}-*")):
            continue
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another process took it
            continue
        return folder
    raise AssertionError("unreachable")
