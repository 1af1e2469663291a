"""One product on several devices: which part of it each device multiplies, and the run of that.

XLA's partitioner takes no Pallas call, so a product whose operands are split over a mesh is run
under `jax.shard_map` with every mesh axis manual. The weight decides: it stays where it lies, and x
comes to it. Per axis of the weight that is split over mesh axes:

* free (column-parallel): the result is split along it;
* contracted (row-parallel): so is x, and the devices' results are summed;
* batch (expert-parallel): x and the result are split along it.

Scales and zero points are split with their weight; where a block would straddle two devices, it is
repeated until each has blocks of its own. Axes of x that stay free keep their split, unless the
weight needs the mesh axis. `jaxquant.pallas_kernels.dispatch` asks `partition`, chooses a kernel
for one device's part, and wraps it as a `PartitionedProduct`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import Unsupported

# Names of the mesh axes that one axis of an array is split over, the slowest first.
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """How the operands of a product lie on a mesh.

    Attributes:
      mesh: name and size of every mesh axis that is not manual yet.
      x: what each axis of the activation is split over.
      w: likewise of the weight.
      out: likewise of the result, where that is known; None for what follows from x and w.
    """

    mesh: tuple[tuple[str, int], ...]
    x: tuple[Names, ...]
    w: tuple[Names, ...]
    out: tuple[Names, ...] | None = None

    def count(self, names: Names) -> int:
        """Into how many pieces these mesh axes split an axis."""
        sizes = dict(self.mesh)
        return math.prod(sizes[name] for name in names)


@dataclasses.dataclass(frozen=True)
class Partition:
    """What each device does.

    Attributes:
      names: all mesh axes that become manual.
      x: how x is split among the devices.
      w: how the weight is, and its scales where they are more than one.
      out: how the result is, after what follows.
      summed: mesh axes over which the devices' results are summed.
      scattered: of these, those whose sum is left in pieces: name and axis of the result.
      x_shape: of one device's part.
      weight: one device's part.
      scale_shape: of all scales, repeated so that each device has blocks of its own.
      quantize_first: x is quantized before it is split, because its ranges span devices.
      lone_group: a device has one group of several. XLA, which does the whole product or none, has
        all groups, so what speaks for it where there is one does not.
    """

    names: Names
    x: tuple[Names, ...]
    w: tuple[Names, ...]
    out: tuple[Names, ...]
    summed: Names
    scattered: tuple[tuple[str, int], ...]
    x_shape: tuple[int, ...]
    weight: Weight
    scale_shape: tuple[int, ...]
    quantize_first: bool
    lone_group: bool

    def __str__(self) -> str:
        """In words, for the plan."""
        part = "x".join(map(str, self.weight.shape))
        done = [f"{part} of the weight on each device"]
        if self.summed:
            done.append(f"results summed over {', '.join(self.summed)}")
        return ", ".join(done)


def partition(
    split: Split,
    x_shape: Sequence[int],
    weight: Weight,
    axes: DotAxes,
    act: ActQuant | None,
    experts: Sequence[int] = (),
) -> Partition:
    """What each device does of a product.

    Args:
      split: how the operands lie.
      x_shape: shape of the activation.
      weight: the whole weight.
      axes: which axis does what.
      act: how x is quantized, or None.
      experts: axes of the weight of which a row of x meets one element: with none of its own, a
        device gives zeros.

    Raises:
      Unsupported: the weight does not come apart that way; says why.
    """
    w = split.w
    local_weight, scale_shape = _local_weight(split, weight)
    taken = {name for names in w for name in names}
    x: list[Names] = [()] * len(x_shape)
    wanted: list[Names] = [()] * len(x_shape)  # as x lies, without regard to the weight
    for mine, its in zip(axes.x_batch + axes.x_contract, axes.w_batch + axes.w_contract):
        x[mine] = w[its]
    for axis in axes.x_free:
        size = x_shape[axis]
        wanted[axis] = split.x[axis] if size % split.count(split.x[axis]) == 0 else ()
        kept = tuple(name for name in wanted[axis] if name not in taken)
        x[axis] = kept if size % split.count(kept) == 0 else ()
    summed = tuple(name for axis in (*experts, *axes.w_contract) for name in w[axis])
    desired = split.out or _out(axes, wanted, w)
    shape = _out(axes, x_shape, weight.shape)
    out, scattered = _scatter(split, _out(axes, x, w), desired, summed, shape)
    return Partition(
        tuple(name for name, _ in split.mesh),
        tuple(x),
        w,
        out,
        summed,
        scattered,
        tuple(n // split.count(names) for n, names in zip(x_shape, x, strict=True)),
        local_weight,
        scale_shape,
        act is not None and not act.static and any(x[axis] for axis in act.reduce_axes),
        _groups(weight, axes) > 1 and _groups(local_weight, axes) == 1,
    )


def _groups(weight: Weight, axes: DotAxes) -> int:
    return math.prod(weight.scale_shape[axis] for axis in axes.w_contract)


def _local_weight(split: Split, weight: Weight) -> tuple[Weight, tuple[int, ...]]:
    """One device's part of the weight, and the shape of all scales once they come apart."""
    shape, local_scale, scale_shape = [], [], []
    for axis, (n, s, names) in enumerate(
        zip(weight.shape, weight.scale_shape, split.w, strict=True)
    ):
        count = split.count(names)
        whole = 8 * count if axis == weight.packed_axis and count > 1 else count
        if n % whole:
            eights = " in eights, as they are packed" if whole > count else ""
            raise Unsupported(
                f"axis {axis} of the weight, {n} long, does not come apart into the {count} pieces"
                f" of mesh axes {', '.join(names)}{eights}"
            )
        scales = s if s == 1 else math.lcm(s, count)
        if n % scales:
            raise Unsupported(
                f"{s} scales along axis {axis} of the weight do not come apart into {count} pieces"
            )
        shape.append(n // count)
        scale_shape.append(scales)
        local_scale.append(max(scales // count, 1))
    local = dataclasses.replace(weight, shape=tuple(shape), scale_shape=tuple(local_scale))
    return local, tuple(scale_shape)


def _out(axes: DotAxes, x: Sequence[Any], w: Sequence[Any]) -> tuple[Any, ...]:
    """What x and w have for their own axes, in the order of the result's."""
    batch = [w[a] for a in axes.w_batch]
    mine, its = [x[a] for a in axes.x_free], [w[a] for a in axes.w_free]
    return (*batch, *mine, *its) if axes.weight_side == "rhs" else (*batch, *its, *mine)


def _scatter(
    split: Split,
    out: tuple[Names, ...],
    desired: tuple[Names, ...],
    summed: Names,
    shape: tuple[int, ...],
) -> tuple[tuple[Names, ...], tuple[tuple[str, int], ...]]:
    """Leaves sums in pieces where the result is wanted so: its split, and which axes do it."""
    found = list(out)
    scattered: list[tuple[str, int]] = []
    for name in summed:
        for axis, names in enumerate(desired):
            longer = (*found[axis], name)
            if names[: len(longer)] == longer and shape[axis] % split.count(longer) == 0:
                found[axis] = longer
                scattered.append((name, axis))
                break
    return tuple(found), tuple(scattered)


@dataclasses.dataclass(frozen=True)
class PartitionedProduct:
    """Runs one device's product on every device; called under a mesh of as many axes.

    Attributes:
      run: one device's product: `(x, quantized, codes, scale, zero_point, input_scale, *extras)`.
      partition: what each device does.
      act: how x is quantized, or None.
    """

    run: Callable[..., jax.Array]
    partition: Partition
    act: ActQuant | None

    def __call__(
        self,
        x: jax.Array,
        quantized: tuple[jax.Array, jax.Array] | None,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        input_scale: jax.Array | None,
        *extras: jax.Array,
    ) -> jax.Array:
        """The product of whole arrays.

        Args:
          x: as of `MatrixProduct`, like all that follow.
          quantized: likewise.
          codes: likewise.
          scale: likewise.
          zero_point: likewise.
          input_scale: likewise.
          *extras: what `run` takes behind them; every device gets all of it.
        """
        p = self.partition
        if quantized is None and p.quantize_first:
            assert self.act is not None
            quantized = quantize_activation(x, self.act)
        parts = {
            # What nobody reads would still be moved to where it is asked for.
            "x": (x if quantized is None else quantized[0], p.x),
            "quantized": (quantized, p.x),
            "codes": (codes, p.w),
            "scale": (_repeated(scale, p.scale_shape), p.w),
            "zero_point": (_repeated(zero_point, p.scale_shape), p.w),
            "input_scale": (input_scale, p.w),
        }
        operands = {name: part for name, (part, _) in parts.items() if part is not None}
        specs = {
            name: jax.tree.map(functools.partial(_spec, parts[name][1]), part)
            for name, part in operands.items()
        }

        def local(operands: dict[str, Any], extras: tuple[jax.Array, ...]) -> jax.Array:
            out = self.run(*(operands.get(name) for name in parts), *extras)
            for name, axis in p.scattered:
                out = jax.lax.psum_scatter(out, name, scatter_dimension=axis, tiled=True)
            rest = tuple(name for name in p.summed if name not in dict(p.scattered))
            return jax.lax.psum(out, rest) if rest else out

        mapped = jax.shard_map(
            local,
            in_specs=(specs, PartitionSpec()),
            out_specs=PartitionSpec(*(names or None for names in p.out)),
            axis_names=set(p.names),
            check_vma=False,
        )
        return mapped(operands, extras)


def _spec(names: Sequence[Names], part: jax.Array) -> PartitionSpec:
    """A spec for a part: an axis of size one is there for all."""
    kept = (own if n > 1 and own else None for own, n in zip(names, part.shape, strict=True))
    return PartitionSpec(*kept)


def _repeated(part: jax.Array | None, shape: Sequence[int]) -> jax.Array | None:
    """Scales, repeated so that each device has blocks of its own."""
    if part is not None:
        for axis, (n, size) in enumerate(zip(part.shape, shape, strict=True)):
            if n != size:
                part = jnp.repeat(part, size // n, axis=axis)
    return part
