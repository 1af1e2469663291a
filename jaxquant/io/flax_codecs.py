"""Flax's containers in a checkpoint: FrozenDict, partitioning boxes, NNX states and variables.

A module is not stored, only its state: `restore` puts it into a model that the caller builds. The
mesh that a box may name belongs to the machine that saved it and is restored as None. Metadata of
an NNX variable that is no plain value (hooks, initializers) cannot be stored: `save` warns, and a
model given to `restore` has its own.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import PartitionSpec

from jaxquant.io.containers import Decoder, Encoder, Node, Place, class_name, register
from jaxquant.io.manifest import MAX_DEPTH, CheckpointError, take
from jaxquant.io.python_codecs import (
    MappingCodec,
    decode_items,
    decode_key,
    encode_items,
    encode_key,
)

# Metadata by which variables name the mesh axes of their value; older Flax used the second.
_AXIS_METADATA = ("out_sharding", "sharding_names")


@dataclasses.dataclass(frozen=True)
class _BoxCodec:
    """`nn.Partitioned` or `nn.LogicallyPartitioned`."""

    kind: str
    cls: Any
    logical: bool

    @property
    def types(self) -> tuple[type, ...]:
        return (self.cls,)

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        node = {
            "names": encode_static(value.names),
            "rules": encode_static(value.rules) if self.logical else None,
        }
        return {**node, "value": encoder.encode(value.value, place)}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        where = decoder.at(place)
        names = decode_static(take(node, "names", object, where), where)
        rules = decode_static(take(node, "rules", object, where), where)
        inside = _with_axes(place, names, rules, self.logical)
        value = decoder.decode(take(node, "value", dict, where), inside)
        return self.cls(value, names, **({"rules": rules} if self.logical else {}))


class _StateCodec:
    kind = "nnx.State"
    types: tuple[type, ...] = (nnx.State,)

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        return {"items": encode_items(value.raw_mapping.items(), encoder, place)}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        return nnx.State(decode_items(node, decoder, place))


class _VariableCodec:
    kind = "nnx.Variable"
    types: tuple[type, ...] = ()

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        metadata, omitted = {}, []
        for name, entry in value.get_metadata().items():
            try:
                metadata[name] = encode_static(entry)
            except TypeError:
                omitted.append(name)
        if omitted:
            warnings.warn(
                f"{place.name!r}: metadata {', '.join(omitted)} of the {type(value).__name__} is"
                " not saved: it is no plain value",
                stacklevel=2,
            )
        return {
            "class": class_name(type(value)),
            "metadata": metadata,
            "value": encoder.encode(value.get_value(), place),
        }

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        where = decoder.at(place)
        metadata = {
            name: decode_static(entry, where)
            for name, entry in take(node, "metadata", dict, where).items()
        }
        names = next((metadata[n] for n in _AXIS_METADATA if metadata.get(n)), None)
        rules = metadata.get("sharding_rules")
        inside = _with_axes(place, names, rules, logical=bool(rules))
        value = decoder.decode(take(node, "value", dict, where), inside)

        def accepts(cls: type) -> bool:
            return issubclass(cls, nnx.Variable)

        found: Any = decoder.find_class(take(node, "class", str, where), accepts, place)
        cls = nnx.Variable if found is None else found
        required = dict.fromkeys(getattr(cls, "required_metadata", ()), False)
        return cls.from_metadata(value, {**required, **metadata, "hijax": False})


class _ModuleCodec:
    kind = "nnx.Module"
    types: tuple[type, ...] = ()

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        if place.path:
            raise TypeError(
                f"cannot save {place.name!r}: an NNX module inside of a tree. Save the module"
                " itself, or its nnx.state"
            )
        state = nnx.split(value)[1]
        return {"class": class_name(type(value)), "state": encoder.encode(state, place)}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        # Only the state is there; `restore` puts it into the caller's model.
        return decoder.decode(take(node, "state", dict, decoder.at(place)), place)


def encode_static(value: Any) -> Any:
    """A plain Python value as JSON: scalars, strings, tuples, lists, dicts, PartitionSpecs.

    Raises:
      TypeError: anything else.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, PartitionSpec):
        return {"spec": [encode_static(entry) for entry in value]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [encode_static(entry) for entry in value]}
    if type(value) is dict:
        return {"dict": [[encode_key(k, Place()), encode_static(v)] for k, v in value.items()]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode_static(node: Any, where: str, depth: int = 0) -> Any:
    """The inverse of `encode_static`."""
    if node is None or type(node) in (bool, int, str):
        return node
    if isinstance(node, dict) and len(node) == 1 and depth < MAX_DEPTH:
        ((kind, entries),) = node.items()
        try:
            if kind == "float":
                return float.fromhex(entries)
            if kind == "dict":
                return {
                    decode_key(k, where): decode_static(v, where, depth + 1) for k, v in entries
                }
            if kind in ("tuple", "list", "spec") and isinstance(entries, list):
                values = [decode_static(entry, where, depth + 1) for entry in entries]
                if kind == "list":
                    return values
                return tuple(values) if kind == "tuple" else PartitionSpec(*values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: malformed {kind}: {error}") from error
    raise CheckpointError(f"{where}: malformed value")


def _with_axes(place: Place, names: Any, rules: Any, logical: bool) -> Place:
    if not isinstance(names, (tuple, list, PartitionSpec)):
        return place
    return dataclasses.replace(
        place,
        axis_names=tuple(names),
        axis_rules=tuple(rules) if isinstance(rules, (tuple, list)) else None,
        logical=logical,
    )


register(MappingCodec("FrozenDict", FrozenDict))
register(_BoxCodec("nn.Partitioned", nn.Partitioned, logical=False))
register(_BoxCodec("nn.LogicallyPartitioned", nn.LogicallyPartitioned, logical=True))
register(_StateCodec())
register(_VariableCodec(), lambda x: isinstance(x, nnx.Variable))
register(_ModuleCodec(), lambda x: isinstance(x, nnx.Module))
