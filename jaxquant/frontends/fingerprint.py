"""A hashable key for a Linen module and the static arguments of a call.

Two calls with equal keys run the same computation, so an eager call may reuse what an earlier one
compiled. Unlike `hash(module)`, containers are compared by content and ``1``, ``True`` and
``1.0`` differ. Functions and other plain objects count by identity or their own ``__eq__``, as
for the static arguments of `jax.jit`: do not mutate a config object between calls.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

_LARGEST_ARRAY = 1 << 16  # bytes; a larger constant is not worth hashing at every call


class UnhashableError(TypeError):
    """A value without a key; the message names the field and its type."""


def fingerprint(value: Any) -> Hashable:
    """The key of a value.

    Args:
      value: an unbound Linen module, or anything a call may hold as a static argument.

    Raises:
      UnhashableError: it holds an array or another object that cannot be hashed.
    """
    return _fingerprint(value, "", {})


def _fingerprint(value: Any, where: str, seen: dict[int, int]) -> Hashable:
    items: Iterator[Hashable]
    if isinstance(value, nn.Module):
        return _module(value, where, seen)
    if isinstance(value, float):
        return (type(value), value.hex())
    if isinstance(value, Mapping):
        items = ((k, _fingerprint(v, f"{where}[{k!r}]", seen)) for k, v in value.items())
        return (type(value), tuple(items))
    if isinstance(value, tuple | list):
        items = (_fingerprint(v, f"{where}[{i}]", seen) for i, v in enumerate(value))
        return (type(value), tuple(items))
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return (type(value), _fingerprint(parts, where, seen))
    if inspect.ismethod(value):
        return (type(value), value.__func__, _fingerprint(value.__self__, where, seen))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value))
        items = ((n, _fingerprint(v, f"{where}.{n}", seen)) for n, v in fields)
        return (type(value), tuple(items))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        if value.nbytes > _LARGEST_ARRAY:
            raise UnhashableError(f"{where or 'value'}: an array of {value.nbytes:,} bytes")
        return (type(value), value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, jax.Array):
        raise UnhashableError(f"{where or 'value'}: a jax.Array")
    try:
        hash(value)
    except TypeError:
        raise UnhashableError(f"{where or 'value'}: a {type(value).__name__}") from None
    return (type(value), value)


def _module(module: nn.Module, where: str, seen: dict[int, int]) -> Hashable:
    if module.scope is not None:
        raise UnhashableError(f"{where or 'module'}: a bound {type(module).__name__}")
    if id(module) in seen:  # the same instance twice shares parameters; an equal one does not
        return (type(module), seen[id(module)])
    seen[id(module)] = len(seen)
    fields = (f.name for f in dataclasses.fields(module) if f.init and f.name != "parent")
    return (
        type(module),
        tuple((n, _fingerprint(getattr(module, n), f"{where}.{n}", seen)) for n in fields),
    )
