"""The four slices of training text, split into training and held-out documents.

The split is by whole documents and comes before everything else, the tokenizer included: some
books of the Bible, some modules of the standard library, unseen seeds of the synthetic slices.
Training needs the sources on the machine; the held-out text also ships as files (`shipped.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence

from jaxquant.models import synthetic

SLICES = ("english", "python", "arithmetic", "json")

HELD_OUT_BOOKS = ("Ruth", "Est", "Eccl", "Jonah", "Dan", "Phi", "Jas")
HELD_OUT_MODULES = (
    "calendar.py", "cmd.py", "colorsys.py", "csv.py", "fractions.py", "graphlib.py", "heapq.py",
    "queue.py", "sched.py", "shlex.py", "textwrap.py",
)  # fmt: skip

_TRAIN_SEED, _HELD_OUT_SEED = 0, 1
_SYNTHETIC_TRAIN, _SYNTHETIC_HELD_OUT = 4_000_000, 120_000

# Tests, generated tables, data in Python's clothes, and whatever is not the library itself.
_SKIPPED_DIRECTORIES = frozenset(
    ("__pycache__", "ensurepip", "encodings", "idlelib", "lib2to3", "pydoc_data",
     "site-packages", "dist-packages", "test", "tests", "turtledemo")
)  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True)
class Slice:
    """The documents of one slice.

    Attributes:
      name: one of `SLICES`.
      train: documents to train on.
      held_out: documents never trained on, nor seen by the tokenizer's training.
      source: where the text came from, with versions.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    source: str

    def summary(self) -> dict[str, str | int]:
        """Sizes and SHA-256 of both halves, to be recorded beside the weights."""
        record: dict[str, str | int] = {"source": self.source}
        for half in ("train", "held_out"):
            documents = getattr(self, half)
            data = "\0".join(documents).encode()
            record[f"{half}_documents"] = len(documents)
            record[f"{half}_bytes"] = len(data)
            record[f"{half}_sha256"] = hashlib.sha256(data).hexdigest()
        return record


def load_slice(name: str) -> Slice:
    """Reads or generates one slice.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
      FileNotFoundError: the source text is not installed; the message says how to get it.
    """
    loaders: dict[str, Callable[[], Slice]] = {
        "english": _english, "python": _python, "arithmetic": _arithmetic, "json": _json,
    }  # fmt: skip
    if name not in loaders:
        raise ValueError(f"unknown slice {name!r}; known slices: {', '.join(SLICES)}")
    return loaders[name]()


def join_documents(documents: Sequence[str]) -> str:
    """One text of many documents, with an ASCII record separator between them."""
    return "\x1e".join(documents)


def split_documents(text: str) -> list[str]:
    """The documents of `join_documents`."""
    return text.split("\x1e")


def _english() -> Slice:
    """The King James Version, one document a chapter, as printed by Debian's `bible` program."""
    program = shutil.which("bible")
    if program is None:
        raise FileNotFoundError(
            "the English slice is the King James Version (public domain) as Debian packages it, "
            "and the `bible` program that prints it was not found. Install both with: "
            "apt-get install bible-kjv bible-kjv-text"
        )
    printed = subprocess.run(
        [program, "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in printed.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+?)(\d+):\d+ (.*)", line)
        if match is None:
            raise ValueError(f"unexpected line from {program}: {line!r}")
        chapters.setdefault((match[1], match[2]), []).append(match[3])
    missing = set(HELD_OUT_BOOKS) - {book for book, _ in chapters}
    if missing:
        raise ValueError(f"{program} printed no book named {sorted(missing)}")
    halves: tuple[list[str], list[str]] = ([], [])
    for (book, chapter), verses in chapters.items():
        document = f"{book} {chapter}\n" + "\n".join(verses) + "\n"
        halves[book in HELD_OUT_BOOKS].append(document)
    return Slice("english", tuple(halves[0]), tuple(halves[1]), "Debian bible-kjv-text (KJV)")


def _python() -> Slice:
    """The standard library of the running interpreter, one document a module."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    halves: tuple[list[str], list[str]] = ([], [])
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(
            d for d in subdirectories
            if d not in _SKIPPED_DIRECTORIES and not d.startswith(_SKIPPED_PREFIXES)
        )  # fmt: skip
        for file in sorted(files):
            if not file.endswith(".py") or file.startswith(_SKIPPED_PREFIXES):
                continue
            path = pathlib.Path(directory, file)
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                name = path.relative_to(root).as_posix()
                halves[name in HELD_OUT_MODULES].append(text)
    if len(halves[1]) != len(HELD_OUT_MODULES):
        raise FileNotFoundError(
            f"{root} lacks some of the held-out modules {HELD_OUT_MODULES}; the Python slice needs "
            "the sources of the standard library"
        )
    version = ".".join(map(str, sys.version_info[:3]))
    return Slice(
        "python", tuple(halves[0]), tuple(halves[1]), f"CPython {version} standard library"
    )


def _arithmetic() -> Slice:
    return Slice(
        "arithmetic",
        tuple(synthetic.arithmetic_documents(_TRAIN_SEED, _SYNTHETIC_TRAIN)),
        tuple(synthetic.arithmetic_documents(_HELD_OUT_SEED, _SYNTHETIC_HELD_OUT)),
        "synthetic",
    )


def _json() -> Slice:
    return Slice(
        "json",
        tuple(synthetic.json_documents(_TRAIN_SEED, _SYNTHETIC_TRAIN)),
        tuple(synthetic.json_documents(_HELD_OUT_SEED, _SYNTHETIC_HELD_OUT)),
        "synthetic",
    )
