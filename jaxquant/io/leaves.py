"""Array leaves: what is written for each, what the manifest says of it, and the way back.

`save` and `restore` use it between the tree and Orbax. Values go to disk as they are; only what
the storage cannot hold is changed, always without loss: PRNG keys become their key data, uint4
becomes uint8, and arrays of size zero are not written at all. No array is ever made float.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.io.manifest import DTYPES, CheckpointError, LeafRecord


def describe(value: Any, path: str) -> tuple[LeafRecord, Any]:
    """The record of an array leaf, without its checksum, and the array that stands for it.

    Args:
      value: a jax or numpy array.
      path: its name.

    Returns:
      The record, and `value` itself or, for PRNG keys, the key data.

    Raises:
      TypeError: a tracer, or a dtype that a checkpoint cannot hold.
      ValueError: the array was deleted (donated).
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"cannot save {path!r}: it is a tracer; call save outside of jit")
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ValueError(f"cannot save {path!r}: the array was deleted or donated")
    kind, impl = "numpy", None
    if isinstance(value, jax.Array):
        kind = "jax"
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            kind, impl = "key", str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
    if value.dtype.name not in DTYPES:
        raise TypeError(f"cannot save {path!r}: arrays of {value.dtype} are not supported")
    record = LeafRecord(path, tuple(value.shape), value.dtype.name, kind, impl=impl)
    if kind == "numpy":
        # Plain memory in native byte order, whatever strides or foreign order it came with.
        native = value.dtype.newbyteorder("=")
        value = np.ascontiguousarray(value, native).reshape(record.shape)
    return record, value


def to_stored(array: Any, record: LeafRecord) -> Any:
    """The array that Orbax writes, of `record.stored_dtype`."""
    return array if record.stored_dtype == record.dtype else array.astype(record.stored_dtype)


def check_stored(array: Any, record: LeafRecord, where: str) -> None:
    """Checks that what Orbax gave back is what the manifest states.

    Raises:
      CheckpointError: another shape or dtype, or no array.
    """
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise CheckpointError(f"{where}: {record.path!r} holds no array")
    if tuple(array.shape) != record.shape or array.dtype.name != record.stored_dtype:
        raise CheckpointError(
            f"{where}: {record.path!r} holds {array.dtype.name}{list(array.shape)}; its metadata"
            f" states {record.stored_dtype}{list(record.shape)}"
        )


def from_stored(array: Any, record: LeafRecord) -> Any:
    """The inverse of `to_stored`: an array of `record.dtype`."""
    return array if record.stored_dtype == record.dtype else array.astype(jnp.dtype(record.dtype))


def to_leaf(array: Any, record: LeafRecord, where: str) -> Any:
    """The leaf of the tree: the array, or the PRNG keys whose data it is."""
    if record.kind != "key":
        return array
    try:
        return jax.random.wrap_key_data(array, impl=record.impl)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {record.path!r}: {error}") from error


def empty(record: LeafRecord, sharding: Any) -> Any:
    """The array of size zero that a record describes; nothing of it is on disk."""
    if record.kind == "numpy":
        return np.zeros(record.shape, jnp.dtype(record.dtype))
    return jax.device_put(jnp.zeros(record.shape, jnp.dtype(record.dtype)), sharding)


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractLeaf:
    """Stands for an array while a checkpoint is only being read about.

    Attributes:
      record: what the manifest states of it.
    """

    record: LeafRecord

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.record.leaf_shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype that the manifest states."""
        return jnp.dtype(self.record.dtype)
