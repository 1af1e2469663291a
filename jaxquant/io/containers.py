"""Trees as JSON and back: which container holds what, restored without a template.

`Encoder` turns a tree into nodes and a list of arrays; `Decoder` turns nodes into a tree, asking
its caller for each array. So one decoder serves `inspect` (arrays are only described), the choice
of shardings, and `restore`. A node is a JSON object with a "kind"; each kind is one `Codec`, in
`jaxquant.io.python_codecs`, `flax_codecs` and `qtensor_codec`. What is here knows no kind.

Nothing in a node is imported or executed. Classes (named tuples, NNX variable types) are looked
up among those the caller gives and in modules that are already loaded, and must be of the kind
that was saved.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Container, Iterable
from typing import Any, Protocol

from jaxquant.core.names import path_string
from jaxquant.io.manifest import MAX_DEPTH, CheckpointError, take

Path = tuple[Any, ...]
Node = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the tree an array stands, which decides its sharding and its row in a report.

    Attributes:
      path: keys from the root; the parts of a QTensor are its last key.
      weight: the outermost QTensor node around it, or None.
      axis_names: axis names a box or variable gives, or None.
      axis_rules: rules that map logical axis names to mesh axes, or None.
      logical: whether the names are logical ones, to be mapped by rules.
    """

    path: Path = ()
    weight: Node | None = None
    weight_path: Path = ()
    axis_names: tuple[Any, ...] | None = None
    axis_rules: tuple[Any, ...] | None = None
    logical: bool = False

    @property
    def name(self) -> str:
        """The path as users write it."""
        return path_string(self.path)

    def child(self, key: Any) -> Place:
        """The place of a child."""
        return dataclasses.replace(self, path=(*self.path, key))


class Codec(Protocol):
    """One kind of node."""

    @property
    def kind(self) -> str:
        """Its name in checkpoints."""

    @property
    def types(self) -> tuple[type, ...]:
        """Values of exactly these types are encoded by it."""

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        """The node of a value, without its kind."""

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        """The value of a node."""


_BY_KIND: dict[str, Codec] = {}
_BY_TYPE: dict[type, Codec] = {}
_BY_CHECK: list[tuple[Callable[[Any], bool], Codec]] = []


def register(codec: Codec, check: Callable[[Any], bool] | None = None) -> None:
    """Adds a kind of node; `check` says which values it takes beside those of its types."""
    if codec.kind in _BY_KIND or any(t in _BY_TYPE for t in codec.types):
        raise ValueError(f"node kind {codec.kind!r} or one of its types is registered already")
    _BY_KIND[codec.kind] = codec
    _BY_TYPE.update(dict.fromkeys(codec.types, codec))
    if check is not None:
        _BY_CHECK.append((check, codec))


class Encoder:
    """Turns a tree into nodes; collects its arrays and what nodes share.

    Attributes:
      arrays: the array leaves in the order in which nodes number them, with their places.
      qtypes: qtypes that occur, by name.
      op_rules: distinct rules of QTensors, as JSON.
    """

    def __init__(self) -> None:
        self.arrays: list[tuple[Place, Any]] = []
        self.qtypes: dict[str, Any] = {}
        self.op_rules: list[Any] = []

    def encode(self, value: Any, place: Place) -> Node:
        """The node of a value.

        Raises:
          TypeError: the value is of a type that a checkpoint cannot hold; names its path.
          ValueError: the tree is deeper than `MAX_DEPTH`.
        """
        if len(place.path) > MAX_DEPTH:
            raise ValueError(f"the tree is deeper than {MAX_DEPTH} at {place.name!r}")
        codec = _BY_TYPE.get(type(value))
        if codec is None:
            codec = next((c for check, c in _BY_CHECK if check(value)), None)
        if codec is None:
            raise TypeError(
                f"cannot save {place.name or 'the root'!r}: {type(value).__qualname__} is neither"
                " an array, a Python scalar, string or None, nor one of the containers"
                f" {', '.join(sorted(_BY_KIND))}"
            )
        return {"kind": codec.kind, **codec.encode(value, self, place)}

    def leaf(self, array: Any, place: Place) -> int:
        """Adds an array and gives its number."""
        self.arrays.append((place, array))
        return len(self.arrays) - 1


class Decoder:
    """Turns nodes into a tree.

    Args:
      leaf: called with the number and place of each array; its result becomes the leaf.
      leaves: how many arrays there are.
      op_rules: the manifest's table, decoded.
      qtypes: names of the qtypes that the manifest defines.
      classes: classes to find by name before loaded modules are searched.
      lenient: True to put a stand-in where a class is not found (`inspect`).
      where: name of the checkpoint, for messages.
    """

    def __init__(
        self,
        leaf: Callable[[int, Place], Any],
        leaves: int,
        *,
        op_rules: list[tuple[Any, ...]],
        qtypes: Container[str],
        classes: Iterable[type] = (),
        lenient: bool = False,
        where: str = "checkpoint",
    ) -> None:
        self._leaf = leaf
        self._unused = set(range(leaves))
        self._depth = 0
        self._classes = {class_name(c): c for c in classes}
        self.op_rules = op_rules
        self.qtypes = qtypes
        self.lenient = lenient
        self.where = where

    def run(self, root: Node) -> Any:
        """The whole tree.

        Raises:
          CheckpointError: a node is malformed, or an array is used twice or never.
        """
        tree = self.decode(root, Place())
        if self._unused:
            raise CheckpointError(f"{self.where}: metadata: {len(self._unused)} arrays are unused")
        return tree

    def decode(self, node: Any, place: Place) -> Any:
        """The value of a node."""
        kind = take(node, "kind", str, self.at(place))
        if kind not in _BY_KIND:
            raise CheckpointError(f"{self.at(place)}: unknown kind of container {kind!r}")
        # Not the length of the path: boxes add none.
        if self._depth > MAX_DEPTH:
            raise CheckpointError(f"{self.at(place)}: nested deeper than {MAX_DEPTH}")
        self._depth += 1
        value = _BY_KIND[kind].decode(node, self, place)
        self._depth -= 1
        return value

    def leaf(self, number: int, place: Place) -> Any:
        """The array with this number."""
        if number not in self._unused:
            raise CheckpointError(f"{self.at(place)}: array {number} is missing or used twice")
        self._unused.remove(number)
        return self._leaf(number, place)

    def find_class(self, name: str, accepts: Callable[[type], bool], place: Place) -> type | None:
        """The class of this name, or None where it is not found and `lenient` allows that.

        Raises:
          CheckpointError: not found, or not of the kind that was saved.
        """
        found: Any = self._classes.get(name)
        if found is None:
            module, _, qualname = name.partition(":")
            found = sys.modules.get(module)
            for part in qualname.split("."):
                found = getattr(found, part, None)
        if isinstance(found, type) and accepts(found):
            return found
        if self.lenient:
            return None
        raise CheckpointError(
            f"{self.at(place)} was saved as {name!r}, which is not loaded here or is another kind"
            " of class. Import its module first, or pass the class in restore(types=[...])"
        )

    def at(self, place: Place) -> str:
        """Checkpoint and path, for messages."""
        return f"{self.where}: metadata of {place.name or 'the root'!r}"


def class_name(cls: type) -> str:
    """How a class is named in a checkpoint."""
    return f"{cls.__module__}:{cls.__qualname__}"
