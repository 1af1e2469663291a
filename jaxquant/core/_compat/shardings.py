"""Shardings in types: explicit meshes, and the axes that values vary over inside shard_map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax._src import core as _core
from jax._src.interpreters import batching as _batching
from jax._src.sharding_impls import UnspecifiedValue as _Unspecified
from jax._src.sharding_impls import canonicalize_sharding as _canonicalize_sharding


def is_unspecified(sharding: Any) -> bool:
    """True for the marker that ``jit`` stores where no sharding was given."""
    return isinstance(sharding, _Unspecified)


def match_varying(*args: Any) -> list[Any]:
    """Inside shard_map, marks every operand as varying over the axes that any of them varies over.

    JAX's own functions do this before they bind a primitive of several operands; its transpose is
    the psum of the cotangents.
    """
    return list(_core.auto_insert_reshard(*args))


def varying_axes(x: Any) -> frozenset[str]:
    """Names of the manual mesh axes that a value, its type, or what stands for it varies over."""
    if isinstance(x, jax.ShapeDtypeStruct):
        manual = x.manual_axis_type
    else:
        manual = getattr(x if isinstance(x, _core.AbstractValue) else jax.typeof(x), "mat", None)
    return frozenset() if manual is None else manual.varying


def vary_like(x: Any, other: Any) -> Any:
    """``x``, marked as varying over the manual axes that ``other`` (or its type) varies over."""
    missing = varying_axes(other) - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def canonical_out_sharding(sharding: Any, name: str) -> Any:
    """An ``out_sharding`` argument as primitives hold it: a NamedSharding on an abstract mesh."""
    return _canonicalize_sharding(sharding, name)


def sharding_for_vmap(axis_data: Any, sharding: Any, axis: int) -> Any:
    """``sharding`` with the mapped axis put in at ``axis``; None stays None."""
    if sharding is None:
        return None
    return _batching.get_sharding_for_vmap(axis_data, sharding, axis)


def explicit_sharding(aval: Any) -> Any:
    """The sharding in the type of ``aval``; None off explicit meshes."""
    sharding = getattr(aval, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and mesh._any_axis_explicit else None


def mesh_axes(aval: Any) -> tuple[tuple[str, int, str], ...]:
    """Name, size and kind ("explicit", "manual", "auto") of each axis of the mesh of a type."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty:
        return ()
    kinds = [str(kind).rpartition(".")[2].lower() for kind in mesh.axis_types]
    return tuple(zip(mesh.axis_names, mesh.axis_sizes, kinds, strict=True))


def permuted_sharding(aval: Any, order: Sequence[int]) -> Any:
    """The sharding type of ``aval`` with its axes in ``order``; None off explicit meshes."""
    sharding = aval.sharding
    if sharding.mesh.empty or not sharding.mesh._any_axis_explicit:
        return None
    spec = sharding.spec.update(partitions=tuple(sharding.spec.partitions[i] for i in order))
    return sharding.update(spec=spec)


def unsplit(sharding: Any, axes: Sequence[int]) -> Any:
    """The sharding of a type, with ``axes`` split over no mesh axis."""
    if not axes or sharding.mesh.empty or not sharding.mesh._any_axis_explicit:
        return sharding
    parts = (None if i in axes else p for i, p in enumerate(sharding.spec.partitions))
    return sharding.update(spec=sharding.spec.update(partitions=tuple(parts)))
