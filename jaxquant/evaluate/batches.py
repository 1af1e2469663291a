"""Slices and batches as the user gives them, made uniform and checked.

For: :mod:`jaxquant.evaluate.compare`. A slice is an iterable of batches and is walked exactly once,
so a generator does. A batch is one array, a tuple of positional arguments, or a mapping of keyword
arguments. Arrays among the arguments are traced; everything else (``train=False``, ``method=``) is
static. Nothing here runs a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.frontends.batches import call_arguments, check_batches

_TOKEN_NAMES = ("tokens", "input_ids", "token_ids", "ids", "inputs", "x")


@dataclasses.dataclass(frozen=True)
class Call:
    """A batch as the model's arguments: ``fn(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def split(self) -> tuple[list[Any], tuple[Any, ...]]:
        """Splits into the arrays, and a hashable key of all else (structure and static values)."""
        leaves, treedef = jax.tree.flatten((self.args, self.kwargs))
        arrays = [leaf for leaf in leaves if is_array(leaf)]
        statics = tuple(_ARRAY if is_array(leaf) else leaf for leaf in leaves)
        return arrays, (treedef, statics)

    def describe(self) -> str:
        """The arrays as text, for the report."""
        arrays = self.split()[0]
        return ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays)


class _Array:
    """Stands for an array in the static key of a call."""


_ARRAY = _Array()


def join(key: tuple[Any, ...], arrays: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inverse of :meth:`Call.split`: positional and keyword arguments."""
    treedef, statics = key
    left = iter(arrays)
    return jax.tree.unflatten(treedef, [next(left) if s is _ARRAY else s for s in statics])


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a batch is traced (an array of any library) rather than static."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def named_slices(data: Any) -> dict[str, Iterable[Any]]:
    """Reads ``data`` as slices.

    Args:
      data: a mapping of slice name to an iterable of batches, or one iterable of batches (named
        "all").

    Returns:
      Slice name to its iterable of batches, in order.

    Raises:
      TypeError: where a name is no string, or where an array stands for an iterable of batches.
      ValueError: where there is no slice.
    """
    slices = data if isinstance(data, Mapping) else {"all": data}
    if not slices:
        raise ValueError("compare got no data: give at least one slice of batches")
    for name, batches in slices.items():
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"slice names are non-empty strings; got {name!r} ({type(name).__name__})"
            )
        check_batches(batches, f"slice {name!r}")
    return dict(slices)


def as_call(batch: Any, where: str) -> Call:
    """Reads a batch as the model's arguments.

    Args:
      batch: an array, a tuple of positional arguments, or a mapping of keyword arguments.
      where: the slice and batch, for errors.

    Raises:
      TypeError: where it is none of these, or holds no array.
    """
    call = Call(*call_arguments(batch, where))
    if not call.split()[0]:
        raise TypeError(f"{where}: the batch holds no array")
    return call


def find_tokens(call: Call, shape: tuple[int, ...]) -> Any | None:
    """Finds the integer array of a shape among a call's arguments: the tokens a model reads.

    Args:
      call: the batch.
      shape: ``(B, T)``, the leading axes of the logits.

    Returns:
      The array or None. Of several, the first named like tokens, else the first positional one; a
      choice between several keyword arguments of other names is not made.
    """
    positional = [a for a in call.args if _is_tokens(a, shape)]
    named = {name: a for name, a in call.kwargs.items() if _is_tokens(a, shape)}
    for name in _TOKEN_NAMES:
        if name in named:
            return named[name]
    if positional:
        return positional[0]
    return next(iter(named.values())) if len(named) == 1 else None


def per_example(value: Any, rows: int, what: str, where: str) -> tuple[np.ndarray, bool]:
    """Reads what a metric returned.

    Args:
      value: ``[B]`` numbers, one per example, or one scalar for the batch.
      rows: the batch's number of examples.
      what: the metric's name, for errors.
      where: the slice and batch, for errors.

    Returns:
      float64 ``[B]`` and True, or ``[1]`` and False for a scalar.

    Raises:
      ValueError: for any other shape.
    """
    numbers = np.asarray(value, dtype=np.float64)
    if numbers.ndim == 0:
        return numbers[None], False
    if numbers.shape != (rows,):
        raise ValueError(
            f"{where}: metric {what!r} returned shape {numbers.shape}; it returns one number per "
            "example "
            f"({rows},) or one scalar"
        )
    return numbers, True


def _is_tokens(leaf: Any, shape: tuple[int, ...]) -> bool:
    return (
        is_array(leaf)
        and tuple(leaf.shape) == shape
        and jax.dtypes.issubdtype(leaf.dtype, np.integer)
    )
