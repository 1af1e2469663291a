"""What `inspect` shows of a checkpoint: a table for people, JSON for programs.

Built from the manifest alone. Bytes are those of the arrays at their real width; the bytes on disk
beside them are measured and include compression and Orbax's own files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from jaxquant.core.names import path_string
from jaxquant.core.recipe import ActScheme, Recipe
from jaxquant.io.containers import Place
from jaxquant.io.manifest import CheckpointError, LeafRecord, Manifest


@dataclasses.dataclass(frozen=True)
class CheckpointRow:
    """One weight or plain array of a checkpoint.

    Attributes:
      path: its name.
      shape: its logical shape.
      dtype: the dtype it has, or that a quantized weight stands for.
      qtype: storage type of a quantized weight, else None.
      act: what its op does with the input, in words, else None.
      before: what it does with the input first, in words: factors, a Hadamard matrix; else None.
      arrays: how many arrays hold it.
      nbytes: bytes of these arrays at real width, scales included.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    qtype: str | None
    act: str | None
    before: str | None
    arrays: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
      path: its directory.
      version: format version.
      writer: versions of the packages that wrote it.
      container: kind of the root ("dict", "nnx.Module" ...).
      recipe: the recipe it was quantized with, or None.
      metadata: what the user stored with it.
      rows: its weights and arrays, in the order of the tree.
      nbytes: bytes of all arrays at real width.
      disk_bytes: bytes of its files.
    """

    path: str
    version: int
    writer: dict[str, str]
    container: str
    recipe: Recipe | None
    metadata: Any
    rows: tuple[CheckpointRow, ...]
    nbytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        recipe = None if self.recipe is None else self.recipe.to_json()
        rows = [{**dataclasses.asdict(row), "shape": list(row.shape)} for row in self.rows]
        return {**fields, "recipe": recipe, "rows": rows}

    def __rich__(self) -> Group:
        """The table, with a line of totals above it."""
        table = Table(box=None, pad_edge=False)
        for name in ("path", "shape", "stored as", "input"):
            table.add_column(name, overflow="fold")
        table.add_column("bytes", justify="right")
        for row in self.rows:
            stored = row.dtype if row.qtype is None else f"{row.qtype} (for {row.dtype})"
            shape = "x".join(map(str, row.shape)) or "scalar"
            done = ", then ".join(filter(None, (row.before, row.act)))
            table.add_row(Text(_printable(row.path)), shape, stored, done, f"{row.nbytes:,}")
        recipe = "none recorded" if self.recipe is None else self.recipe.name
        if self.recipe is not None and self.recipe.transforms:
            recipe += f" with {', '.join(map(str, self.recipe.transforms))}"
        writer = ", ".join(f"{name} {version}" for name, version in self.writer.items())
        quantized = sum(row.qtype is not None for row in self.rows)
        head = (
            f"{self.path}: {self.container}, format {self.version}, recipe {_printable(recipe)}\n"
            f"{quantized} quantized weights, {len(self.rows) - quantized} other arrays:"
            f" {self.nbytes:,} bytes; {self.disk_bytes:,} on disk;"
            f" written by {_printable(writer)}"
        )
        return Group(Text(head), table)

    def __str__(self) -> str:
        """The table as text."""
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def make_info(
    where: str, manifest: Manifest, places: dict[int, Place], disk_bytes: int
) -> CheckpointInfo:
    """Groups the arrays of a manifest into weights.

    Args:
      where: the checkpoint's directory.
      manifest: its metadata.
      places: where in the tree each array stands.
      disk_bytes: measured bytes of its files.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, place in places.items():
        key = place.path if place.weight is None else place.weight_path
        groups.setdefault(key, []).append(number)
    rows = []
    for path, numbers in groups.items():
        records = [manifest.leaves[n] for n in numbers]
        weight = places[numbers[0]].weight
        act = None if weight is None or weight["act"] is None else weight["act"]
        rows.append(
            CheckpointRow(
                path=path_string(path),
                shape=records[0].leaf_shape if weight is None else tuple(weight["shape"]),
                dtype=_dtype(records[0]) if weight is None else weight["dtype"],
                qtype=None if weight is None else weight["qtype"],
                act=None if act is None else str(ActScheme.from_json(act)),
                before=None if weight is None else _before(weight),
                arrays=len(records),
                nbytes=sum(record.nbytes for record in records),
            )
        )
    try:
        recipe = None if manifest.recipe is None else Recipe.from_json(manifest.recipe)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: malformed recipe: {error}") from error
    return CheckpointInfo(
        path=where,
        version=manifest.version,
        writer={str(k): str(v) for k, v in manifest.writer.items()},
        container=str(manifest.tree.get("kind")),
        recipe=recipe,
        metadata=manifest.metadata,
        rows=tuple(rows),
        nbytes=sum(record.nbytes for record in manifest.leaves),
        disk_bytes=disk_bytes,
    )


def _before(weight: Any) -> str | None:
    """What a stored weight does with its op's input before anything else."""
    factor, turn = weight.get("input_factor"), weight.get("input_turn")
    done = []
    if factor is not None and factor.get("kind") != "None":
        done.append("factors")
    if turn is not None:
        done.append(f"H{turn['size']}")
    return ", ".join(done) or None


def _dtype(record: LeafRecord) -> str:
    return record.dtype if record.impl is None else f"key<{record.impl}>"


def _printable(text: str) -> str:
    """Text from a file, without control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
