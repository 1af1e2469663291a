"""The only file that talks to Orbax: arrays and one metadata file, written at once or not at all.

`jaxquant.io.orbax` decides what is written and what it means. Here a checkpoint is a directory with
two Orbax items: "arrays", a flat dict from numbers to arrays, and "manifest", one JSON file. Names
on disk are made here, never read from metadata, so no checkpoint can point outside of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from jaxquant.io.manifest import FORMAT, MAX_BYTES, CheckpointError, LeafRecord

ARRAYS = "arrays"
MANIFEST = "manifest"
_MANIFEST_FILE = "metadata"  # the name Orbax's JSON handler gives its file
_NEW, _OLD = ".jaxquant-new", ".jaxquant-old"
# Orbax counts its operations for the whole process: of two that overlap, in two threads, one looks
# for directories that the other was to make.
_ONE_AT_A_TIME = threading.RLock()
# Arrays are written in chunks of at most this size, so that a restore onto a finer mesh reads
# (and decompresses) little more than its parts.
_CHUNK_BYTES = 1 << 26
# zstd codes runs in blocks of 128 KiB of at least 3 bytes: nothing on disk expands further.
_MAX_EXPANSION = (1 << 17) // 3


def write(path: str, arrays: Sequence[Any], envelope: dict[str, Any], *, overwrite: bool) -> None:
    """Writes a checkpoint; until it is complete nothing is under its name.

    Args:
      path: its directory.
      arrays: jax and numpy arrays of non-zero size.
      envelope: the sealed manifest.
      overwrite: whether a checkpoint that is there already may be replaced.

    Raises:
      FileExistsError: something is there and may not be replaced.
    """
    with _ONE_AT_A_TIME:
        _write(_path(path), arrays, envelope, overwrite)


def _write(
    final: epath.Path, arrays: Sequence[Any], envelope: dict[str, Any], overwrite: bool
) -> None:
    exists = final.exists()
    if exists:
        _check_replaceable(final, overwrite)
    target = final.parent / (final.name + _NEW) if exists else final
    items: dict[str, Any] = {MANIFEST: ocp.args.JsonSave(envelope)}
    if arrays:
        tree = {_name(i): array for i, array in enumerate(arrays)}
        save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in tree}
        items[ARRAYS] = ocp.args.PyTreeSave(tree, save_args=save_args)
    # Not replica-parallel: that would slice replicated arrays on the devices before it writes them,
    # one compilation a shape and device, and slicing makes all NaNs of float8_e5m2 one NaN.
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    largest = max((array.nbytes for array in arrays), default=0)
    with _quiet(), contextlib.closing(_checkpointer(registry, largest)) as checkpointer:
        checkpointer.save(target, ocp.args.Composite(**items), force=exists)
    if exists:
        _replace(final, target)


def read_manifest(path: str) -> bytes:
    """The bytes of the metadata file.

    Raises:
      CheckpointError: there is none, or it is longer than any that was written.
    """
    root = _path(path)
    if not root.exists():
        left = [n for n in (_OLD, _NEW) if (root.parent / (root.name + n) / MANIFEST).exists()]
        hint = ""
        if left:
            hint = f"; an interrupted overwrite left {', '.join(root.name + n for n in left)} there"
        raise CheckpointError(f"{path}: no such checkpoint{hint}")
    file = root / MANIFEST / _MANIFEST_FILE
    if not root.is_dir() or not file.exists():
        raise CheckpointError(f"{path} is not a jaxquant checkpoint: {MANIFEST} is missing in it")
    try:
        if file.stat().length > MAX_BYTES:
            raise CheckpointError(f"{path}: its metadata is longer than {MAX_BYTES} bytes")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read its metadata: {error}") from error


def read_arrays(
    path: str, records: Sequence[LeafRecord], shardings: Sequence[Sharding | None]
) -> list[Any]:
    """Reads the arrays, each device its own part.

    Args:
      path: directory of the checkpoint.
      records: what the manifest states of each array, in the order of `write`.
      shardings: where each jax array goes; None for numpy arrays.

    Returns:
      Arrays as stored, in order. Their dtypes are those on disk, whatever the records state.

    Raises:
      CheckpointError: arrays are missing, cut, unreadable, or of another shape.
    """
    if not records:
        return []
    _check_plausible(path, records)
    restore_args = {}
    for i, (record, sharding) in enumerate(zip(records, shardings, strict=True)):
        if sharding is None:
            restore_args[_name(i)] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            # No dtype: given one, Orbax would convert without a word.
            restore_args[_name(i)] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=record.shape, strict=True
            )
    args = ocp.args.PyTreeRestore(item=dict.fromkeys(restore_args, 0), restore_args=restore_args)
    failures: list[Exception] = []
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, _PatientArrayHandler(failures)), (np.ndarray, _PatientNumpyHandler(failures))
    )
    largest = max(r.size * jnp.dtype(r.dtype).itemsize for r in records)
    try:
        with (
            _ONE_AT_A_TIME,
            _quiet(),
            contextlib.closing(_checkpointer(registry, largest)) as checkpointer,
        ):
            found = checkpointer.restore(_path(path), ocp.args.Composite(**{ARRAYS: args}))[ARRAYS]
            jax.block_until_ready(found)
        if failures:
            raise failures[0]
    except MemoryError:
        raise
    except Exception as error:
        # Cut or altered files surface as many types, from Orbax, its storage and Python.
        text = str(error) or type(error).__name__
        text = text if len(text) <= 500 else text[:500] + " ..."
        raise CheckpointError(f"{path}: cannot read its arrays: {text}") from error
    return [found[name] for name in restore_args]


class _Patient:
    """Mixed into a type handler: where one read fails, waits for the others before it tells.

    Orbax lets a failure through while other reads are running, and closes its event loop under
    them; each then prints a traceback of its own, some time later. So failures are kept until all
    reads have ended, and placeholders are returned.
    """

    def __init__(self, failures: list[Exception]) -> None:
        super().__init__()
        self._failures = failures

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        """As the handler's own, but never raises."""
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 -- raised by `read_arrays`
            self._failures.append(error)
            await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)
            return [np.zeros(())] * len(infos)


class _PatientArrayHandler(_Patient, ocp.type_handlers.ArrayHandler):
    """Reads jax arrays."""


class _PatientNumpyHandler(_Patient, ocp.type_handlers.NumpyHandler):
    """Reads numpy arrays."""


def disk_bytes(path: str) -> int:
    """Bytes of all files of a checkpoint."""
    return _tree_bytes(_path(path))


def _check_plausible(path: str, records: Sequence[LeafRecord]) -> None:
    """Refuses arrays too large to have come from the files there, before memory is asked for."""
    root = _path(path) / ARRAYS
    if not root.is_dir():
        raise CheckpointError(f"{path}: {ARRAYS} is missing in it")
    held = _tree_bytes(root)
    stated = sum(record.nbytes for record in records)
    if stated > held * _MAX_EXPANSION:
        raise CheckpointError(
            f"{path}: its metadata states {stated:,} bytes of arrays, which cannot have come from"
            f" {held:,} bytes on disk"
        )


def _check_replaceable(final: epath.Path, overwrite: bool) -> None:
    if not overwrite:
        raise FileExistsError(f"{final} exists; save(..., overwrite=True) replaces a checkpoint")
    if final.is_dir() and not any(final.iterdir()):
        return
    file = final / MANIFEST / _MANIFEST_FILE
    if not file.exists() or FORMAT.encode() not in file.read_bytes()[:4096]:
        raise FileExistsError(f"{final} is not a jaxquant checkpoint; it is not overwritten")


def _replace(final: epath.Path, new: epath.Path) -> None:
    """Puts the new checkpoint in the place of the old one, which is deleted last."""
    old = final.parent / (final.name + _OLD)
    if jax.process_index() == 0:
        if old.exists():
            old.rmtree()
        final.rename(old)
        new.rename(final)
        old.rmtree()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxquant save {final}")


def _checkpointer(registry: Any, largest: int) -> ocp.Checkpointer:
    """Checkpointer with every setting that decides the format given, not left to defaults.

    Args:
      registry: type handlers.
      largest: bytes of the largest array on the host (int4 takes a byte there), of which a few
        may be on their way at a time. Without a bound, all are: one more copy of everything.
    """
    gigabytes = 2 + 2 * largest // 10**9
    arrays = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=False,
        use_compression=True,
        type_handler_registry=registry,
        save_device_host_concurrent_gb=gigabytes,
        restore_concurrent_gb=gigabytes,
    )
    items = {ARRAYS: arrays, MANIFEST: ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items))


def _name(number: int) -> str:
    return f"{number:06d}"


def _path(path: str) -> epath.Path:
    # Orbax wants absolute paths; remote ones ("gs://...") are. Links are followed: what replaces a
    # checkpoint takes the place of the directory, not of a link to it.
    return epath.Path(path if "://" in path else os.path.realpath(os.path.expanduser(path)))


def _tree_bytes(root: epath.Path) -> int:
    if not root.is_dir():
        return int(root.stat().length)
    return sum(_tree_bytes(child) for child in root.iterdir())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's log lines off the user's terminal; what matters is raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
