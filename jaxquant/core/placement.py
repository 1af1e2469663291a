"""How the parts of a QTensor follow the placement and the slicing of the weight they stand for.

Used by the rules that rebuild scans and shard_maps and by ptq and restore, which place codes and
scales where the weight was or will be. A scale is split along an axis like its weight where its
blocks allow it; an axis of size one is never split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.core.qtensor import QTensor


def spec_axis_size(mesh: Any, names: Any) -> int:
    """Number of shards that one entry of a PartitionSpec makes: None, a name, or a tuple."""
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return 1
    return math.prod(mesh.shape[n] for n in (names if isinstance(names, tuple) else (names,)))


def part_spec(shape: Sequence[int], spec: PartitionSpec, mesh: Any) -> PartitionSpec:
    """The spec of a weight, for one of its parts: axes that cannot be split are left whole."""
    entries = [spec[i] if i < len(spec) else None for i in range(len(shape))]
    return PartitionSpec(
        *(
            e if n % spec_axis_size(mesh, e) == 0 else None
            for n, e in zip(shape, entries, strict=True)
        )
    )


def part_shardings(weight: QTensor, sharding: NamedSharding) -> QTensor:
    """A QTensor of the NamedShardings of its parts, given the sharding of the weight."""
    mesh, spec = sharding.mesh, sharding.spec
    return jax.tree_util.tree_map(
        lambda part: NamedSharding(
            mesh, part_spec(part.shape, spec, mesh), memory_kind=sharding.memory_kind
        ),
        weight,
    )


def placed_structs(weight: QTensor, sharding: NamedSharding) -> QTensor:
    """A QTensor of ShapeDtypeStructs, with its parts sharded like the weight they stand for."""
    return jax.tree_util.tree_map(
        lambda part, own: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=own),
        weight,
        part_shardings(weight, sharding),
    )


def constrain_parts(weight: QTensor, sharding: Any) -> QTensor:
    """`jax.lax.with_sharding_constraint` on every part of a weight."""
    if isinstance(sharding, NamedSharding):
        sharding = part_shardings(weight, sharding)
    return jax.lax.with_sharding_constraint(weight, sharding)


def with_full_leading_axis(weight: QTensor) -> QTensor:
    """Repeats parts of leading size one, so that a scan can slice all parts alike."""
    length = weight.shape[0]

    def repeat(part: Any) -> Any:
        if part.shape[0] == length:
            return part
        if part.shape[0] != 1:  # one scale for several layers
            return jnp.repeat(part, length // part.shape[0], axis=0)
        return jnp.broadcast_to(part, (length, *part.shape[1:]))

    return jax.tree_util.tree_map(repeat, weight)


def refine_for_sharding(weight: QTensor, shards: Sequence[int]) -> QTensor:
    """Repeats scales so that every shard of the weight has whole blocks of its own.

    Args:
      weight: weight whose logical axis i will be split into ``shards[i]`` pieces.
      shards: one count an axis; each divides the axis.

    Returns:
      The same weight; a packed axis that is split is unpacked, since its static length is global.
    """
    axis = weight.packed_axis
    if axis is not None and shards[axis] > 1:
        weight = weight.replace(codes=weight.unpacked_codes(), packed_axis=None, packed_length=None)

    def refine(part: Any) -> Any:
        for i, count in enumerate(shards):
            size = part.shape[i]
            if size > 1 and size % count:
                part = jnp.repeat(part, math.lcm(size, count) // size, axis=i)
        return part

    scale = weight.scale.dequantize() if isinstance(weight.scale, QTensor) and any(
        n > 1 and n % c for n, c in zip(weight.scale.shape, shards, strict=True)
    ) else weight.scale  # fmt: skip
    zero, factor = weight.zero_point, weight.input_factor
    return weight.replace(
        scale=jax.tree_util.tree_map(refine, scale),
        zero_point=None if zero is None else refine(zero),
        input_factor=None if factor is None else refine(factor),
    )
