"""Checkpoints of quantized models: `save`, `restore`, `inspect`.

A checkpoint describes itself: it is restored without a template, to the containers, dtypes and
static fields that were saved; every array is checked against a checksum of its bits. Called by
users and the command line. Values are never made float on the way. The format is described in
docs/checkpoints.md; a change of it is a new `VERSION` in `jaxquant.io.manifest`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Iterable
from typing import Any

import jax

from jaxquant.algorithms.prepare import check_platform, lay_out_tree
from jaxquant.core.recipe import Recipe, get_recipe
from jaxquant.io import flax_codecs, leaves, python_codecs, qtensor_codec, storage
from jaxquant.io.checksum import checksums
from jaxquant.io.containers import Decoder, Encoder, Place
from jaxquant.io.info import CheckpointInfo, make_info
from jaxquant.io.manifest import CheckpointError, LeafRecord, Manifest, jsonable
from jaxquant.io.nnx_model import match_model, model_classes, put_into_model
from jaxquant.io.placement import Placement, make_placer

__all__ = ["inspect", "restore", "save"]

_PathLike = str | os.PathLike[str]
assert python_codecs and flax_codecs  # importing them registers their containers


def save(
    path: _PathLike,
    tree: Any,
    *,
    recipe: Recipe | str | None = None,
    metadata: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a tree or an NNX model as a checkpoint, completely or not at all.

    Args:
      path: directory to make; local, or remote where Orbax can write ("gs://...").
      tree: Linen variables, an `nnx.Module` or `nnx.State`, or any tree of dicts, FrozenDicts,
        lists, tuples, named tuples, partitioning boxes and None, with arrays, QTensors, PRNG keys
        and Python scalars as leaves. Sharded arrays are written by the devices that hold them.
      recipe: the recipe it was quantized with, for the record.
      metadata: anything that is plain JSON, for the record.
      overwrite: whether to replace a checkpoint that is there. The old one stays until the new
        one is complete.

    Raises:
      FileExistsError: the path exists, and `overwrite` is False or it is no checkpoint.
      TypeError: a leaf or container that a checkpoint cannot hold; names its path.
      ValueError: a QTensor breaks an invariant, or an array was deleted.
    """
    metadata = jsonable(metadata, "metadata")
    recipe_json = None if recipe is None else get_recipe(recipe).to_json()
    encoder = Encoder()
    root = encoder.encode(tree, Place())
    described = [leaves.describe(value, place.name) for place, value in encoder.arrays]
    digests = checksums([array for _, array in described])
    records = [
        dataclasses.replace(record, checksum=digest)
        for (record, _), digest in zip(described, digests, strict=True)
    ]
    manifest = Manifest(
        root, records, encoder.qtypes, encoder.op_rules, recipe_json, metadata, _writer()
    )
    stored = [
        leaves.to_stored(array, record)
        for record, (_, array) in zip(records, described, strict=True)
        if record.size
    ]
    storage.write(os.fspath(path), stored, manifest.seal(), overwrite=overwrite)


def restore(
    path: _PathLike,
    *,
    model: Any = None,
    sharding: Placement = None,
    verify: bool = True,
    types: Iterable[type] = (),
    prepare: str | None = None,
) -> Any:
    """Reads a checkpoint back, to exactly what was saved.

    Args:
      path: its directory.
      model: for NNX, the model (or `nnx.eval_shape` of it) to put the values into; the result is
        a new model and this one stays as it was. Without it the checkpoint of a model comes back
        as its `nnx.State`.
      sharding: where arrays go. What is given speaks of the model's float weights; the codes and
        scales of a QTensor follow their weight. One of

        * None: the default device;
        * a `jax.sharding.Sharding`, for all arrays;
        * a `Mesh`: the axis names of boxes and NNX variables are the specs;
        * `(mesh, specs)`: specs is a PartitionSpec for all, a tree of them like the model's, or a
          mapping from path globs ("layers/*/kernel") to them; other arrays are replicated;
        * a function from a weight's path and `jax.ShapeDtypeStruct` to a Sharding or None.

        Numpy arrays and Python scalars stay on the host.
      verify: whether to check every array against its checksum (a pass over the data on the
        devices). The metadata is always checked.
      types: classes of named tuples and NNX variables that are in no loaded module.
      prepare: a platform for whose kernels quantized weights are laid out at once; see
        `jaxquant.prepare`. None: as they are stored.

    Returns:
      The tree, or with `model` a new model.

    Raises:
      CheckpointError: no checkpoint, cut, altered, of a newer format, not what its metadata
        states, or not for this model.
      ValueError: `sharding` does not fit the arrays; `prepare` is an unknown platform.
    """
    where = os.fspath(path)
    platform = None if prepare is None else check_platform(prepare)
    manifest = Manifest.open(storage.read_manifest(where), where)
    classes = (*types, *model_classes(model))
    places: dict[int, Place] = {}
    abstract = [leaves.AbstractLeaf(record) for record in manifest.leaves]
    described = _decode(manifest, where, classes, places, abstract)
    if model is not None:
        match_model(model, described, where)  # what can be known is checked before data is read

    placer, finish = make_placer(sharding)
    shardings = [
        None if record.kind == "numpy" else placer(record, places[i])
        for i, record in enumerate(manifest.leaves)
    ]
    finish()
    _check_64_bit(manifest.leaves, where)
    arrays = _read(where, manifest.leaves, shardings, verify)
    values = [
        leaves.to_leaf(array, record, where)
        for array, record in zip(arrays, manifest.leaves, strict=True)
    ]
    del arrays
    tree = _decode(manifest, where, classes, {}, values)
    if platform is not None:
        tree = lay_out_tree(tree, platform, donate=True)  # nobody else has these arrays
    return tree if model is None else put_into_model(model, tree, where)


def inspect(path: _PathLike) -> CheckpointInfo:
    """What a checkpoint says about itself: nothing is read but its metadata.

    Raises:
      CheckpointError: as `restore`, for what the metadata alone can tell.
    """
    where = os.fspath(path)
    manifest = Manifest.open(storage.read_manifest(where), where)
    places: dict[int, Place] = {}
    abstract = [leaves.AbstractLeaf(record) for record in manifest.leaves]
    _decode(manifest, where, (), places, abstract, lenient=True)
    return make_info(where, manifest, places, storage.disk_bytes(where))


def _decode(
    manifest: Manifest,
    where: str,
    classes: Iterable[type],
    places: dict[int, Place],
    values: list[Any],
    lenient: bool = False,
) -> Any:
    """The tree with `values` as its arrays; fills in their places."""
    qtensor_codec.check_definitions(manifest.qtypes, where)
    rules = [qtensor_codec.decode_rules(rules, where) for rules in manifest.op_rules]

    def leaf(number: int, place: Place) -> Any:
        places[number] = place
        return values[number]

    decoder = Decoder(
        leaf,
        len(values),
        op_rules=rules,
        qtypes=manifest.qtypes,
        classes=classes,
        lenient=lenient,
        where=where,
    )
    return decoder.run(manifest.tree)


def _read(where: str, records: list[LeafRecord], shardings: list[Any], verify: bool) -> list[Any]:
    """All arrays, checked against their records."""
    filled = [i for i, record in enumerate(records) if record.size]
    stored = storage.read_arrays(
        where, [records[i] for i in filled], [shardings[i] for i in filled]
    )
    arrays: list[Any] = [None] * len(records)
    for position, i in enumerate(filled):
        leaves.check_stored(stored[position], records[i], where)
        arrays[i] = leaves.from_stored(stored[position], records[i])
        stored[position] = None  # so that a converted array does not live twice
    for i, record in enumerate(records):
        if not record.size:
            arrays[i] = leaves.empty(record, shardings[i])
    if verify:
        wrong = [
            record.path
            for record, digest in zip(records, checksums(arrays), strict=True)
            if record.checksum != digest
        ]
        if wrong:
            shown = ", ".join(map(repr, wrong[:5])) + (" ..." if len(wrong) > 5 else "")
            raise CheckpointError(
                f"{where}: the data of {len(wrong)} of {len(records)} arrays was altered (their"
                f" checksums differ): {shown}"
            )
    return arrays


def _check_64_bit(records: list[LeafRecord], where: str) -> None:
    if jax.config.jax_enable_x64:
        return
    wide = {"int64", "uint64", "float64", "complex128"}
    for record in records:
        if record.kind != "numpy" and record.dtype in wide:
            raise CheckpointError(
                f"{where}: {record.path!r} is {record.dtype}; restore it with 64-bit types enabled"
                " (JAX_ENABLE_X64=1)"
            )


def _writer() -> dict[str, str]:
    packages = ("jaxquant", "jax", "flax", "orbax-checkpoint")
    return {name: importlib.metadata.version(name) for name in packages}
