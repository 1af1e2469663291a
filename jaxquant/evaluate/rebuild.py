"""Rebuilds nested frozen dataclasses from plain JSON data, by their type annotations.

For: ``Report.from_json``. Only the annotations that :mod:`jaxquant.evaluate.results` uses are
known.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


def rebuild(kind: Any, data: Any) -> Any:
    """Makes a value of type ``kind`` of JSON data; "inf" and "nan" become floats again.

    Args:
      kind: a dataclass or an annotation made of tuples, dicts, unions with None and plain types.
      data: what ``json.loads`` gave for it; keys that are no fields are ignored.

    Raises:
      ValueError: where a field without a default is missing.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [f for f in dataclasses.fields(kind) if f.name in data]
        try:
            return kind(**{f.name: rebuild(hints[f.name], data[f.name]) for f in fields})
        except TypeError as error:
            raise ValueError(f"not a stored {kind.__name__}: {error}") from error
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return rebuild(inner, data)
    if origin is dict:
        return {key: rebuild(args[1], value) for key, value in data.items()}
    if origin is tuple:
        inner = [args[0]] * len(data) if args[-1] is Ellipsis else args
        return tuple(rebuild(one, value) for one, value in zip(inner, data, strict=True))
    return float(data) if kind is float else data
