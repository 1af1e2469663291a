"""Where restored arrays go: from what the user says of weights to a sharding for every array.

`restore` calls it with the places that the decoder found. What the user gives speaks of *weights*
(the float arrays of the model); the parts of a QTensor follow theirs: codes are split like the
weight, scales where their blocks allow it, packed codes where a shard's codes end on whole bytes;
an axis that cannot be split is whole on every device. Nothing here reads arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxquant.core.names import path_string
from jaxquant.core.placement import part_spec, spec_axis_size
from jaxquant.core.recipe import Rule
from jaxquant.io.containers import Place
from jaxquant.io.manifest import LeafRecord

Placement = Any  # what `restore(sharding=)` takes; see `make_placer`
_Placer = Callable[[LeafRecord, Place], Sharding]


def make_placer(sharding: Placement) -> tuple[_Placer, Callable[[], None]]:
    """A function that gives each array its sharding, and one to call when all have theirs.

    Args:
      sharding: None (the default device), a Sharding (for all), a Mesh (the axis names of boxes
        and NNX variables are its specs), a pair of a mesh and specs, or a callable.

    Raises:
      TypeError: something else.
    """
    if sharding is None:
        single = SingleDeviceSharding(_default_device())
        return lambda record, place: single, lambda: None
    if isinstance(sharding, Sharding):
        return lambda record, place: _for_part(sharding, record, place), lambda: None
    if isinstance(sharding, Mesh):
        return lambda record, place: _by_axis_names(sharding, record, place), lambda: None
    if isinstance(sharding, tuple) and len(sharding) == 2 and isinstance(sharding[0], Mesh):
        specs = _Specs(*sharding)
        return specs.place, specs.check_used
    if callable(sharding):
        return lambda record, place: _by_callable(sharding, record, place), lambda: None
    raise TypeError(
        "sharding must be None, a jax.sharding.Sharding, a Mesh, a (mesh, specs) pair or a"
        f" callable, not {type(sharding).__name__}"
    )


class _Specs:
    """Specs by path: a tree like the model's, a mapping of globs, or one spec for all."""

    def __init__(self, mesh: Mesh, specs: Any) -> None:
        self.mesh = mesh
        self.specs: dict[str, PartitionSpec] = {}
        if isinstance(specs, PartitionSpec):
            specs = {"**": specs}

        def is_leaf(node: Any) -> bool:
            return node is None or isinstance(node, (PartitionSpec, Sharding))

        for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_leaf)[0]:
            if isinstance(spec, NamedSharding):
                spec = spec.spec
            if spec is None:
                spec = PartitionSpec()
            if not isinstance(spec, PartitionSpec):
                raise TypeError(f"sharding: {path_string(path)!r} is no PartitionSpec: {spec!r}")
            self.specs[path_string(path)] = spec
        self.unused = {name for name, spec in self.specs.items() if any(spec)}

    def place(self, record: LeafRecord, place: Place) -> Sharding:
        """The sharding by the spec of this very path, else by the first glob that matches."""
        name = path_string(place.path if place.weight is None else place.weight_path)
        found = name if name in self.specs else None
        if found is None:
            found = next(
                (n for n in self.specs if n and Rule(n, skip=True).matches_path(name)), None
            )
        if found is None:
            return NamedSharding(self.mesh, PartitionSpec())
        self.unused.discard(found)
        return _named(self.mesh, self.specs[found], record, place)

    def check_used(self) -> None:
        """Raises ValueError for specs that met no array: misspelt paths."""
        if self.unused:
            raise ValueError(f"sharding: no array of the checkpoint is at {sorted(self.unused)}")


def _by_axis_names(mesh: Mesh, record: LeafRecord, place: Place) -> Sharding:
    """The sharding that the box or variable around the array asks for."""
    names = place.axis_names or ()
    if place.logical:
        rules = place.axis_rules if place.axis_rules is not None else nn.get_logical_axis_rules()
        spec = nn.logical_to_mesh_axes(names, rules)
    else:
        spec = PartitionSpec(*names)
    return _named(mesh, spec or PartitionSpec(), record, place)


def _by_callable(function: Callable[..., Any], record: LeafRecord, place: Place) -> Sharding:
    """The sharding that the user's function gives the weight, for this part of it."""
    name = path_string(place.path if place.weight is None else place.weight_path)
    shape, dtype = _weight(record, place)
    found = function(name, jax.ShapeDtypeStruct(shape, dtype))
    if found is None:
        return SingleDeviceSharding(_default_device())
    if not isinstance(found, Sharding):
        raise TypeError(f"sharding: for {name!r} the function gave {found!r}, which is no Sharding")
    return _for_part(found, record, place)


def _for_part(sharding: Sharding, record: LeafRecord, place: Place) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return _named(sharding.mesh, sharding.spec, record, place, sharding.memory_kind)
    return sharding


def _named(
    mesh: Any,
    spec: PartitionSpec,
    record: LeafRecord,
    place: Place,
    memory_kind: str | None = None,
) -> NamedSharding:
    """The sharding of an array, given its weight's.

    Raises:
      ValueError: the spec has more entries than the weight has axes, names an axis that the mesh
        lacks, or does not divide the weight.
    """
    name = path_string(place.path if place.weight is None else place.weight_path)
    shape, _ = _weight(record, place)
    while len(spec) > len(shape) and spec[-1] is None:
        spec = PartitionSpec(*spec[:-1])
    if len(spec) > len(shape):
        raise ValueError(f"sharding: {name!r} has {len(shape)} axes; its spec is {spec}")
    for axis, entry in enumerate(spec):
        try:
            shards = spec_axis_size(mesh, entry)
        except KeyError as error:
            raise ValueError(
                f"sharding: {name!r}: the mesh has the axes {tuple(mesh.shape)}, not {error}"
            ) from error
        if shape[axis] % shards:
            raise ValueError(
                f"sharding: axis {axis} of {name!r} has {shape[axis]} elements, which"
                f" {shards} devices ({entry!r}) cannot share"
            )
    if place.weight is None:
        return NamedSharding(mesh, spec, memory_kind=memory_kind)
    spec = part_spec(record.shape, spec, mesh)
    if place.path[len(place.weight_path) :] == ("codes",):
        spec = _whole_bytes(spec, mesh, place.weight)
    return NamedSharding(mesh, spec, memory_kind=memory_kind)


def _whole_bytes(spec: PartitionSpec, mesh: Any, weight: Mapping[str, Any]) -> PartitionSpec:
    """Leaves the packed axis whole where a shard of the weight would end within a byte group."""
    axis, length = weight["packed_axis"], weight["packed_length"]
    if axis is None or -axis > len(spec):
        return spec
    entries = list(spec)
    shards = spec_axis_size(mesh, entries[axis])
    # Eight codes are packed into as many bytes as a code has bits.
    if shards > 1 and (length % shards or length // shards % 8):
        entries[axis] = None
    return PartitionSpec(*entries)


def _weight(record: LeafRecord, place: Place) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the float weight that the array belongs to, or of the array itself."""
    if place.weight is not None:
        return tuple(place.weight["shape"]), jax.numpy.dtype(place.weight["dtype"])
    return record.leaf_shape, jax.numpy.dtype(record.dtype)


def _default_device() -> jax.Device:
    device: Any = jax.config.jax_default_device
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return jax.local_devices()[0] if device is None else device
