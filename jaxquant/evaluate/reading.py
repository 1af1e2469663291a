"""What a model's outputs are: next-token logits, class logits, or plain values.

For: :mod:`jaxquant.evaluate.compare`. The first batch of the float model settles the kind; every
later batch and every recipe must agree with it. Nothing here computes a score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.evaluate.batches import Call, find_tokens, is_array

Kind = Literal["tokens", "classes", "values"]

READ_AS = {
    "tokens": "next-token logits [rows, positions, vocabulary]",
    "classes": "class logits [rows, classes]",
    "values": "plain values, not logits (relative error stands in for KL)",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """One batch as the scores need it.

    Attributes:
      rows: the number of examples ``B``.
      logits: ``[B, P, V]``, or None for values.
      leaves: floating arrays ``[B, ...]`` of the output where it is values; may be empty.
      targets: ``[B, P]`` int32, negative where there is none.
      mask: ``[B, P]`` bool, the positions that count.
      tokens: ``[B, P]`` the input tokens, or None.
    """

    rows: int
    logits: jax.Array | None
    leaves: tuple[jax.Array, ...]
    targets: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray | None


@dataclasses.dataclass
class Reader:
    """Reads outputs; the fields are the options of :func:`jaxquant.compare` of the same names."""

    outputs: Kind | Literal["auto"] = "auto"
    logits: Callable[[Any], Any] | None = None
    targets: Callable[[Any], Any] | None = None
    mask: Callable[[Any], Any] | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        if self.outputs not in ("auto", *READ_AS):
            raise ValueError(f"outputs is one of auto, {', '.join(READ_AS)}; got {self.outputs!r}")

    def read(self, batch: Any, call: Call, outputs: Any, where: str) -> Reading:
        """Reads the float model's outputs of one batch, and the batch's targets, mask and tokens.

        Raises:
          ValueError: where the outputs do not fit the kind asked for or met before, or targets or
            mask do not fit the outputs.
        """
        array = self._logits_of(outputs)
        kind = self._kind(call, array, where)
        if self.kind not in (None, kind):
            raise ValueError(f"{where}: outputs are {READ_AS[kind]}; before they were {self.kind}")
        self.kind = kind
        if kind == "values" or array is None:
            return self._read_values(batch, outputs if array is None else array, where)
        logits = _flat(array)
        rows, positions = logits.shape[:2]
        _require_rows(rows * positions, where)
        lead = tuple(array.shape[:-1])
        tokens = find_tokens(call, lead) if kind == "tokens" else None
        tokens = None if tokens is None else np.asarray(tokens).astype(np.int32).reshape(rows, -1)
        mask = self._mask(batch, lead, rows, positions, where)
        if self.targets is not None:
            targets = _shaped(self.targets(batch), lead, "targets", where).reshape(rows, positions)
            if not np.issubdtype(targets.dtype, np.integer):
                raise ValueError(f"{where}: targets are integers; got {targets.dtype}")
            targets = np.where(mask, targets, -1)
        elif tokens is not None:
            targets = np.full((rows, positions), -1, np.int32)
            targets[:, :-1] = np.where(mask[:, 1:] & mask[:, :-1], tokens[:, 1:], -1)
        else:
            targets = np.full((rows, positions), -1, np.int32)
        if (targets >= logits.shape[-1]).any():
            raise ValueError(
                f"{where}: target {int(targets.max())} is outside of the {logits.shape[-1]} "
                "classes of "
                f"the logits {tuple(array.shape)}"
            )
        return Reading(rows, logits, (), targets.astype(np.int32), mask, tokens)

    def again(self, outputs: Any, reading: Reading, name: str, where: str) -> Reading:
        """Reads a recipe's outputs of the same batch; they must have the float outputs' shapes."""
        array = self._logits_of(outputs)
        if reading.logits is None:
            leaves = _float_leaves(outputs if array is None else array)
            leaves = tuple(_rowed(leaf, reading.rows) for leaf in leaves)
            _same_shapes(
                [leaf.shape for leaf in reading.leaves], [x.shape for x in leaves], name, where
            )
            return dataclasses.replace(reading, leaves=leaves)
        shape = None if array is None else tuple(array.shape)
        size = () if shape is None else (shape[0], math.prod(shape[1:-1]), shape[-1])
        _same_shapes([reading.logits.shape], [size], name, where)
        assert array is not None
        return dataclasses.replace(reading, logits=_flat(array))

    def _logits_of(self, outputs: Any) -> jax.Array | None:
        """The array that holds the logits, or None where it is not clear which does."""
        if self.logits is not None:
            found = self.logits(outputs)
            if not is_array(found):
                raise TypeError(f"logits= returns an array; got a {type(found).__name__}")
            return jnp.asarray(found)
        if is_array(outputs):
            return outputs
        found = outputs.get("logits") if isinstance(outputs, Mapping) else None
        found = getattr(outputs, "logits", None) if found is None else found
        return found if is_array(found) else None

    def _kind(self, call: Call, array: jax.Array | None, where: str) -> Kind:
        floating = array is not None and jnp.issubdtype(array.dtype, jnp.floating)
        shape = tuple(array.shape) if array is not None and floating else ()
        if self.outputs != "auto":
            least = {"tokens": 3, "classes": 2, "values": 0}[self.outputs]
            if len(shape) < least:
                given = "no single array" if array is None else f"{array.dtype}{list(array.shape)}"
                raise ValueError(
                    f"{where}: outputs={self.outputs!r} needs a floating array of at least "
                    f"{least} axes; got {given}; give logits= to pick it"
                )
            return self.outputs
        if len(shape) == 3:
            found = self.targets is not None or find_tokens(call, shape[:2]) is not None
            return "tokens" if found else "values"
        return "classes" if len(shape) == 2 and shape[1] > 1 else "values"

    def _mask(
        self, batch: Any, lead: tuple[int, ...], rows: int, positions: int, where: str
    ) -> np.ndarray:
        if self.mask is None:
            return np.ones((rows, positions), bool)
        mask = _shaped(self.mask(batch), lead, "mask", where)
        return mask.astype(bool).reshape(rows, positions)

    def _read_values(self, batch: Any, outputs: Any, where: str) -> Reading:
        leaves = _float_leaves(outputs)
        leads = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
        rows = leads.pop() if len(leads) == 1 else None
        rows = 1 if rows is None else rows
        _require_rows(rows, where)
        leaves = tuple(_rowed(leaf, rows) for leaf in leaves)
        mask = self._mask(batch, (rows,), rows, 1, where)
        return Reading(rows, None, leaves, np.full((rows, 1), -1, np.int32), mask, None)


def _require_rows(rows: int, where: str) -> None:
    if not rows:
        raise ValueError(f"{where}: the batch is empty: the outputs have no row")


def _float_leaves(outputs: Any) -> tuple[jax.Array, ...]:
    leaves = (leaf for leaf in jax.tree.leaves(outputs) if is_array(leaf))
    return tuple(jnp.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


def _rowed(leaf: jax.Array, rows: int) -> jax.Array:
    return leaf if leaf.ndim and leaf.shape[0] == rows else leaf.reshape(1, -1)


def _flat(logits: jax.Array) -> jax.Array:
    """``[B, ..., V]`` to ``[B, P, V]``."""
    return logits.reshape(logits.shape[0], math.prod(logits.shape[1:-1]), logits.shape[-1])


def _shaped(value: Any, lead: tuple[int, ...], what: str, where: str) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != lead:
        raise ValueError(f"{where}: {what} has shape {array.shape}; the outputs need {lead}")
    return array


def _same_shapes(ours: list[Any], theirs: list[Any], name: str, where: str) -> None:
    if [tuple(x) for x in ours] != [tuple(x) for x in theirs]:
        raise ValueError(
            f"{where}: recipe {name!r} returned outputs of shapes {[tuple(x) for x in theirs]}; "
            f"the float model's have {[tuple(x) for x in ours]}"
        )
