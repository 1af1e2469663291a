"""The metadata of a checkpoint: what it states, how it is sealed, and how it is distrusted.

`save` builds a `Manifest` and seals it; `restore` and `inspect` open it before any array is read.
A manifest may come from anywhere, so everything in it is checked by type and range, nothing in it
names a file, and nothing is imported or executed because of it. The nodes of the tree are checked
where they are decoded (`jaxquant.io.containers`).

On disk it is one JSON object of four members: format, version, sha256, and the manifest itself as
JSON *text*, over whose bytes the digest runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from jaxquant.io import checksum

FORMAT = "jaxquant checkpoint"
# 2: QTensors have act_ops, input_factor and input_turn, without which a reader of format 1 would
# give other values. Format 1 lacks them, and is read.
VERSION = 2
# The deepest tree that is saved or restored, and the longest manifest that is read.
MAX_DEPTH = 100
MAX_BYTES = 1 << 29

# dtypes of arrays in a checkpoint, and those that are stored as another one since Orbax's storage
# lacks them (the bits are widened, none is lost).
_DTYPES = """
    bool int4 int8 int16 int32 int64 uint4 uint8 uint16 uint32 uint64 float16 bfloat16 float32
    float64 complex64 complex128 float8_e3m4 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz
    float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn
"""
DTYPES = frozenset(_DTYPES.split())
STORED_AS = {"uint4": "uint8"}
KINDS = ("jax", "numpy", "key")


class CheckpointError(ValueError):
    """A checkpoint is missing, cut, altered, of another format, or not what was asked for."""


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What the manifest states of one array.

    Attributes:
      path: name of the leaf, for messages and reports.
      shape: its shape; for key arrays that of the key data.
      dtype: its dtype's name; for key arrays that of the key data.
      kind: "jax", "numpy" or "key" (a PRNG key array).
      checksum: 16 hexadecimal digits, see `jaxquant.io.checksum`.
      impl: for key arrays, the name of the generator.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    checksum: str = ""
    impl: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the leaf: key arrays have one axis less than their data."""
        return self.shape[:-1] if self.kind == "key" else self.shape

    @property
    def nbytes(self) -> int:
        """Bytes at real width: int4 takes half a byte an element."""
        return -(-self.size * checksum.element_bits(self.dtype) // 8)

    @property
    def stored_dtype(self) -> str:
        """The dtype under which Orbax holds it."""
        return STORED_AS.get(self.dtype, self.dtype)

    @classmethod
    def from_json(cls, data: Any, where: str) -> LeafRecord:
        """Checks and reads one record."""
        record = cls(
            path=take(data, "path", str, where),
            shape=tuple(take(data, "shape", list, where)),
            dtype=take(data, "dtype", str, where),
            kind=take(data, "kind", str, where),
            checksum=take(data, "checksum", str, where),
            impl=take(data, "impl", (str, type(None)), where),
        )
        where = f"{where} ({record.path!r})"
        if len(record.shape) > 32 or not all(
            type(n) is int and 0 <= n < 2**48 for n in record.shape
        ):
            raise CheckpointError(f"{where}: {list(record.shape)} is no shape")
        if record.dtype not in DTYPES:
            raise CheckpointError(f"{where}: unknown dtype {record.dtype!r}")
        if record.kind not in KINDS or (record.kind == "key") != (record.impl is not None):
            raise CheckpointError(f"{where}: unknown kind of array {record.kind!r}")
        if not re.fullmatch("[0-9a-f]{16}", record.checksum):
            raise CheckpointError(f"{where}: malformed checksum {record.checksum!r}")
        return record


@dataclasses.dataclass
class Manifest:
    """Everything a checkpoint says about itself.

    Attributes:
      tree: the root node, see `jaxquant.io.containers`.
      leaves: one record an array; nodes refer to them by index.
      qtypes: definitions of the qtypes that occur, by name, as the writer knew them.
      op_rules: distinct `QTensor.op_rules`, each a list of rules as JSON.
      recipe: the recipe as JSON, or None.
      metadata: the user's own JSON value.
      writer: versions of the packages that wrote it.
      version: format version.
    """

    tree: Any
    leaves: list[LeafRecord]
    qtypes: dict[str, Any]
    op_rules: list[Any]
    recipe: Any
    metadata: Any
    writer: dict[str, str]
    version: int = VERSION

    def seal(self) -> dict[str, Any]:
        """The JSON object that goes to disk."""
        body = dataclasses.asdict(self)
        version = body.pop("version")
        text = json.dumps(body, allow_nan=False, separators=(",", ":"))
        if len(text) > MAX_BYTES:
            raise ValueError(f"the manifest takes {len(text)} bytes; at most {MAX_BYTES} are read")
        return {"format": FORMAT, "version": version, "sha256": _digest(text), "manifest": text}

    @classmethod
    def open(cls, raw: bytes, where: str) -> Manifest:
        """Reads what `seal` wrote.

        Args:
          raw: bytes of the file.
          where: name of the checkpoint, for messages.

        Raises:
          CheckpointError: no manifest, altered, of a newer format, or malformed.
        """
        envelope = _parse(raw, where)
        if not isinstance(envelope, dict) or envelope.get("format") != FORMAT:
            raise CheckpointError(f"{where} is not a jaxquant checkpoint: its metadata is other's")
        version = take(envelope, "version", int, where)
        if version > VERSION:
            raise CheckpointError(
                f"{where} has format version {version}; this jaxquant reads up to {VERSION}."
                " Upgrade jaxquant"
            )
        if version < 1:
            raise CheckpointError(f"{where}: no such format version: {version}")
        text = take(envelope, "manifest", str, where)
        if take(envelope, "sha256", str, where) != _digest(text):
            raise CheckpointError(f"{where}: the metadata was altered (its sha256 differs)")
        body = _parse(text, where)
        where = f"{where}: metadata"
        leaves = take(body, "leaves", list, where)
        return cls(
            tree=take(body, "tree", dict, where),
            leaves=[LeafRecord.from_json(x, f"{where}: leaf {i}") for i, x in enumerate(leaves)],
            qtypes=take(body, "qtypes", dict, where),
            op_rules=take(body, "op_rules", list, where),
            recipe=take(body, "recipe", (dict, type(None)), where),
            metadata=take(body, "metadata", object, where),
            writer=take(body, "writer", dict, where),
            version=version,
        )


def take(data: Any, name: str, kind: Any, where: str) -> Any:
    """Member `name` of a JSON object, which must be of type `kind` (bool is no int here).

    Raises:
      CheckpointError: `data` is no object, or the member is missing or of another type.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(data).__name__}")
    if name not in data:
        raise CheckpointError(f"{where}: {name!r} is missing")
    value = data[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise CheckpointError(f"{where}: {name!r} is of type {type(value).__name__}")
    return value


def jsonable(value: Any, name: str) -> Any:
    """The value, which must come back from JSON as it was.

    Raises:
      TypeError: it would not (tuples, integer keys, arrays, NaN ...).
    """
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name} must be plain JSON: {error}") from error
    if not same or not _plain(value):
        raise TypeError(
            f"{name} must be plain JSON (dicts with string keys, lists, strings, finite numbers,"
            " booleans, None)"
        )
    return value


def _plain(value: Any) -> bool:
    """Whether every container and leaf is of an exact JSON type (True == 1 fools equality)."""
    if type(value) is dict:
        return all(type(key) is str and _plain(child) for key, child in value.items())
    if type(value) is list:
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _parse(raw: bytes | str, where: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the metadata is not JSON: {error}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
