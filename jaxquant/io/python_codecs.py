"""Python's own containers and values, named tuples, and arrays, as nodes of a checkpoint.

The codecs register themselves with `jaxquant.io.containers`; those of Flax share the functions for
keys and items. Python values stand in the manifest itself as text that loses nothing: floats in
hexadecimal, so that NaN, infinities and -0.0 come back.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.io.containers import Decoder, Encoder, Node, Place, class_name, register
from jaxquant.io.manifest import DTYPES, MAX_DEPTH, CheckpointError, take

# -- keys of mappings ----------------------------------------------------------------------------


def encode_key(key: Any, place: Place) -> Any:
    """A mapping's key as JSON: strings, integers, booleans, None, and tuples of them."""
    if key is None or type(key) in (str, int, bool):
        return key
    if type(key) is tuple:
        return {"tuple": [encode_key(part, place) for part in key]}
    raise TypeError(
        f"cannot save {place.name or 'the root'!r}: its key {key!r} is a {type(key).__name__};"
        " keys may be strings, integers, booleans, None and tuples of them"
    )


def decode_key(key: Any, where: str, depth: int = 0) -> Any:
    """The inverse of `encode_key`."""
    if isinstance(key, dict) and depth < MAX_DEPTH:
        return tuple(decode_key(part, where, depth + 1) for part in take(key, "tuple", list, where))
    if key is None or type(key) in (str, int, bool):
        return key
    raise CheckpointError(f"{where}: malformed key {key!r}")


def encode_items(items: Iterable[tuple[Any, Any]], encoder: Encoder, place: Place) -> list[Any]:
    """Keys and child nodes of a mapping, in its order."""
    return [
        [encode_key(key, place), encoder.encode(value, place.child(key))] for key, value in items
    ]


def decode_items(node: Node, decoder: Decoder, place: Place) -> dict[Any, Any]:
    """The mapping that `encode_items` wrote."""
    result: dict[Any, Any] = {}
    for item in take(node, "items", list, decoder.at(place)):
        if not isinstance(item, list) or len(item) != 2:
            raise CheckpointError(f"{decoder.at(place)}: malformed item")
        key = decode_key(item[0], decoder.at(place))
        if key in result:
            raise CheckpointError(f"{decoder.at(place)}: the key {key!r} occurs twice")
        result[key] = decoder.decode(item[1], place.child(key))
    return result


# -- containers, then values ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MappingCodec:
    """A mapping that its class makes of a dict."""

    kind: str
    cls: type

    @property
    def types(self) -> tuple[type, ...]:
        """The mapping's class."""
        return (self.cls,)

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        """Keys and children, in order."""
        return {"items": encode_items(value.items(), encoder, place)}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        """The mapping."""
        return self.cls(decode_items(node, decoder, place))


@dataclasses.dataclass(frozen=True)
class _Sequence:
    kind: str
    cls: type

    @property
    def types(self) -> tuple[type, ...]:
        return (self.cls,)

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        return {"items": [encoder.encode(v, place.child(i)) for i, v in enumerate(value)]}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        items = take(node, "items", list, decoder.at(place))
        return self.cls(decoder.decode(item, place.child(i)) for i, item in enumerate(items))


class _NamedTuple:
    kind = "namedtuple"
    types: tuple[type, ...] = ()

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        items = encode_items(value._asdict().items(), encoder, place)
        return {"class": class_name(type(value)), "items": items}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        fields = decode_items(node, decoder, place)
        names = tuple(fields)

        def accepts(cls: type) -> bool:
            return issubclass(cls, tuple) and getattr(cls, "_fields", None) == names

        cls = decoder.find_class(take(node, "class", str, decoder.at(place)), accepts, place)
        # tuple.__new__, not the class itself: a constructor may do anything.
        return tuple(fields.values()) if cls is None else tuple.__new__(cls, fields.values())


@dataclasses.dataclass(frozen=True)
class _Value:
    """A Python leaf that stands in the manifest itself, as text."""

    kind: str
    cls: type
    to_text: Callable[[Any], str]
    from_text: Callable[[str], Any]

    @property
    def types(self) -> tuple[type, ...]:
        return (self.cls,)

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        del encoder, place
        return {"value": self.to_text(value)}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        text = take(node, "value", str, decoder.at(place))
        try:
            return self.from_text(text)
        except (ValueError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{decoder.at(place)}: malformed {self.kind}: {error}") from error


_SCALARS: dict[str, np.dtype] = {name: jnp.dtype(name) for name in DTYPES}


class _NumpyScalar:
    kind = "numpy scalar"
    types: tuple[type, ...] = ()

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        del encoder
        if value.dtype.name not in _SCALARS:
            raise TypeError(f"cannot save {place.name!r}: a numpy scalar of {value.dtype}")
        return {"dtype": value.dtype.name, "value": np.asarray(value).tobytes().hex()}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        name = take(node, "dtype", str, decoder.at(place))
        text = take(node, "value", str, decoder.at(place))
        try:
            return np.frombuffer(bytes.fromhex(text), _SCALARS[name]).reshape(())[()]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{decoder.at(place)}: malformed scalar: {error}") from error


class _Array:
    kind = "array"
    types: tuple[type, ...] = ()

    def encode(self, value: Any, encoder: Encoder, place: Place) -> Node:
        return {"leaf": encoder.leaf(value, place)}

    def decode(self, node: Node, decoder: Decoder, place: Place) -> Any:
        return decoder.leaf(take(node, "leaf", int, decoder.at(place)), place)


def _complex_text(value: complex) -> str:
    return f"{value.real.hex()} {value.imag.hex()}"


def _complex_value(text: str) -> complex:
    real, imag = text.split(" ")
    return complex(float.fromhex(real), float.fromhex(imag))


register(MappingCodec("dict", dict))
register(MappingCodec("OrderedDict", collections.OrderedDict))
register(_Sequence("list", list))
register(_Sequence("tuple", tuple))
register(_NamedTuple(), lambda x: isinstance(x, tuple) and hasattr(x, "_fields"))
register(_Value("None", type(None), lambda _: "", lambda _: None))
register(_Value("bool", bool, str, {"True": True, "False": False}.__getitem__))
register(_Value("int", int, hex, lambda text: int(text, 16)))
register(_Value("float", float, float.hex, float.fromhex))
register(_Value("complex", complex, _complex_text, _complex_value))
register(_Value("str", str, str, str))
register(_Value("bytes", bytes, bytes.hex, bytes.fromhex))
register(_NumpyScalar(), lambda x: isinstance(x, np.generic))
register(_Array(), lambda x: isinstance(x, jax.Array) or type(x) is np.ndarray)
