"""Where the axes of a value come from: the arithmetic behind `find_weights`.

A value that was made from a parameter by moving elements only (transpose, reshape, slice, …) has
an `Origin`: for each of its dimensions the pieces of parameter axes it runs over. The functions
here follow one such operation each. They know shapes and no primitives; they raise `Unstructured`
with a reason where the result has no such description, and then the way of the weight ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from jaxquant.core.structure import Unstructured

Role = Literal["contract", "batch", "free", "layer", "indexed"]


@dataclasses.dataclass(frozen=True)
class Factor:
    """A piece of a parameter axis: index along the axis = sum over its pieces of i * inner.

    Attributes:
      axis: the parameter axis, or None for a dimension that was broadcast.
      inner: distance along the axis of neighbours in this piece.
      size: how many indices the value has of it.
      extent: how many there are in the parameter; more than `size` after a slice.
    """

    axis: int | None
    inner: int
    size: int
    extent: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which elements of which parameter a value consists of.

    Attributes:
      param: number of the parameter.
      dims: for each dimension of the value its factors, major to minor; none where its size is 1.
      starts: for each dimension where this origin begins; not 0 where parameters were joined.
      removed: factors that are no longer dimensions, and what removed them.
      splits: (axis, n): the axis was cut into pieces of n, so blocks along it must divide n or be
        multiples of n.
      aligns: (axis, n): the axis was sliced, so blocks along it must divide n, or be the axis.
      merges: (major, minor): two axes became one dimension, so blocks along the major one need the
        minor one whole; -1 stands for a dimension that was broadcast.
      gathered: the site of the lookup by an array of indices, or None.
    """

    param: int
    dims: tuple[tuple[Factor, ...], ...]
    starts: tuple[int, ...]
    removed: tuple[tuple[Factor, Role], ...] = ()
    splits: frozenset[tuple[int, int]] = frozenset()
    aligns: frozenset[tuple[int, int]] = frozenset()
    merges: frozenset[tuple[int, int]] = frozenset()
    gathered: tuple[int, ...] | None = None

    def size(self, dim: int) -> int:
        """How much of a dimension this origin fills."""
        return math.prod(f.size for f in self.dims[dim])


def whole(param: int, shape: Sequence[int]) -> Origin:
    """The origin of a parameter itself."""
    dims = tuple((Factor(a, 1, n, n),) if n != 1 else () for a, n in enumerate(shape))
    return Origin(param, dims, (0,) * len(dims))


def transpose(origin: Origin, permutation: Sequence[int]) -> Origin:
    """Dimension i of the result is dimension permutation[i]."""
    return dataclasses.replace(
        origin,
        dims=tuple(origin.dims[p] for p in permutation),
        starts=tuple(origin.starts[p] for p in permutation),
    )


def broadcast_in_dim(
    origin: Origin, old: Sequence[int], new: Sequence[int], dimensions: Sequence[int]
) -> Origin:
    """Dimension i of shape ``old`` becomes dimension dimensions[i] of shape ``new``."""
    dims = [_broadcast(n) for n in new]
    starts = [0] * len(new)
    for i, d in enumerate(dimensions):
        if old[i] == new[d]:
            dims[d], starts[d] = origin.dims[i], origin.starts[i]
    return dataclasses.replace(origin, dims=tuple(dims), starts=tuple(starts))


def expand_dims(origin: Origin, dim: int, start: int = 0) -> Origin:
    """Inserts a dimension of size one, at index ``start`` of what it will be joined to."""
    return dataclasses.replace(
        origin,
        dims=(*origin.dims[:dim], (), *origin.dims[dim:]),
        starts=(*origin.starts[:dim], start, *origin.starts[dim:]),
    )


def shift(origin: Origin, dim: int, start: int) -> Origin:
    """The origin as a part of a longer dimension that begins ``start`` before it."""
    starts = list(origin.starts)
    starts[dim] += start
    return dataclasses.replace(origin, starts=tuple(starts))


def remove(origin: Origin, dims: Sequence[int], role: Role) -> Origin:
    """Drops dimensions; what is left of their factors is remembered under ``role``."""
    gone = [(f, role) for d in dims for f in origin.dims[d] if f.axis is not None]
    keep = [d for d in range(len(origin.dims)) if d not in set(dims)]
    return dataclasses.replace(
        origin,
        dims=tuple(origin.dims[d] for d in keep),
        starts=tuple(origin.starts[d] for d in keep),
        removed=(*origin.removed, *gone),
    )


def reshape(origin: Origin, old: Sequence[int], new: Sequence[int]) -> Origin:
    """From shape ``old`` to shape ``new`` in row-major order.

    Raises:
      Unstructured: a new dimension would take part of a piece that does not divide, or a joined
        dimension would be cut.
    """
    if math.prod(old) == 0:
        raise Unstructured("the array is empty")
    dims: list[tuple[Factor, ...]] = [()] * len(new)
    starts = [0] * len(new)
    splits, merges = set(origin.splits), set(origin.merges)
    for ins, outs in groups(old, new):
        whole_dims = all(origin.starts[i] == 0 and origin.size(i) == old[i] for i in ins)
        if len(ins) == 1 and len(outs) == 1:
            dims[outs[0]], starts[outs[0]] = origin.dims[ins[0]], origin.starts[ins[0]]
        elif not whole_dims:
            raise Unstructured("a reshape cuts a dimension that joins several parameters")
        else:
            pieces = [f for i in ins for f in origin.dims[i]]
            for out in outs:
                dims[out], pieces = _take(pieces, new[out], splits)
                axes = [-1 if f.axis is None else f.axis for f in dims[out]]
                merges |= {(a, b) for a, b in itertools.combinations(axes, 2) if a != b}
    return dataclasses.replace(
        origin,
        dims=tuple(dims),
        starts=tuple(starts),
        splits=frozenset(splits),
        merges=frozenset(merges),
    )


def slice_dim(
    origin: Origin, dim: int, size: int, start: int, limit: int, stride: int
) -> Origin | None:
    """Takes start:limit:stride of a dimension of ``size``; None if nothing of it is left.

    Raises:
      Unstructured: the cut falls inside a merged dimension in a way that leaves no product.
    """
    if (start, limit, stride) == (0, size, 1):
        return origin
    have, begin = origin.size(dim), origin.starts[dim]
    if stride != 1:
        count = max(0, -(-(limit - start) // stride))
        if have != size:
            raise Unstructured("a strided slice of joined parameters")
        return _resize(origin, dim, _strided(origin.dims[dim], count, start), start=0)
    low, high = max(start, begin) - begin, min(limit, begin + have) - begin
    if low >= high:
        return None
    return _resize(origin, dim, _range(origin.dims[dim], low, high), max(begin - start, 0))


def dynamic_slice_dim(origin: Origin, dim: int, size: int, length: int) -> Origin:
    """Takes ``length`` neighbours of a dimension of ``size`` from a start known when it runs."""
    if length == size:
        return origin
    factors = origin.dims[dim]
    if length == 1:
        picked: list[tuple[Factor, Role]] = [(f, "layer") for f in factors if f.axis is not None]
        return _resize(origin, dim, ((), picked, []), start=0)
    if origin.size(dim) != size or len(factors) != 1:
        raise Unstructured("a dynamic slice of a dimension made of several axes")
    return _resize(origin, dim, _strided(factors, length, 0), start=0)


def shard_dim(origin: Origin, dim: int, shards: int) -> Origin:
    """One device's part of a dimension that is split evenly over ``shards`` devices."""
    if shards == 1:
        return origin
    if not origin.dims[dim] or origin.dims[dim][0].size % shards or origin.starts[dim]:
        raise Unstructured("a dimension is sharded inside its minor part")
    minor = math.prod(f.size for f in origin.dims[dim][1:])
    length = origin.dims[dim][0].size // shards * minor
    return _resize(origin, dim, _range(origin.dims[dim], 0, length), start=0)


def unshard_dim(origin: Origin, dim: int, devices: int) -> Origin:
    """What so many devices have of a dimension, joined: its parts, or copies if it was not split.

    Raises:
      Unstructured: the dimension joins several parameters.
    """
    if origin.starts[dim]:
        raise Unstructured("a dimension that joins several parameters is gathered over devices")
    factors = origin.dims[dim]
    if factors and factors[0].extent % (factors[0].size * devices) == 0:
        part = dataclasses.replace(factors[0], size=factors[0].size * devices)
        return _resize(origin, dim, ((part, *factors[1:]), [], []), start=0)
    copies = _resize(origin, dim, ((*_broadcast(devices), *factors), [], []), start=0)
    merges = {(-1, f.axis) for f in factors if f.axis is not None}
    return dataclasses.replace(copies, merges=copies.merges | merges)


def _broadcast(n: int) -> tuple[Factor, ...]:
    return () if n == 1 else (Factor(None, 0, n, n),)


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions, sizes of one left out, that hold the same elements."""
    ins = [i for i, n in enumerate(old) if n != 1]
    outs = [i for i, n in enumerate(new) if n != 1]
    groups = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(ins.pop(0))
                a *= old[left[-1]]
            else:
                right.append(outs.pop(0))
                b *= new[right[-1]]
        groups.append((left, right))
    return groups


def _take(
    pieces: list[Factor], n: int, splits: set[tuple[int, int]]
) -> tuple[tuple[Factor, ...], list[Factor]]:
    """The major factors that make up ``n``, neighbours fused, and the rest."""
    taken: list[Factor] = []
    rest = list(pieces)
    while n > 1:
        piece = rest.pop(0)
        if n % piece.size == 0:
            n //= piece.size
        else:
            minor = piece.size // n
            if piece.size % n or piece.extent % minor:
                raise Unstructured(
                    f"a reshape cuts a dimension of {piece.size} into pieces that do not divide"
                )
            if piece.axis is not None:
                splits.add((piece.axis, piece.inner * minor))
            rest.insert(0, dataclasses.replace(piece, size=minor, extent=minor))
            piece = dataclasses.replace(
                piece, inner=piece.inner * minor, size=n, extent=piece.extent // minor
            )
            n = 1
        taken.append(piece)
    return _fuse(taken), rest


def _fuse(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Joins a piece to the next one where together they are one run along an axis."""
    fused: list[Factor] = []
    for f in factors:
        last = fused[-1] if fused else None
        runs_on = last is not None and last.axis == f.axis and f.size == f.extent
        if last and runs_on and (f.axis is None or last.inner == f.inner * f.extent):
            fused[-1] = Factor(f.axis, f.inner, last.size * f.size, last.extent * f.extent)
        else:
            fused.append(f)
    return tuple(fused)


_Cut = tuple[tuple[Factor, ...], list[tuple[Factor, Role]], list[tuple[int, int]]]


def _range(factors: tuple[Factor, ...], low: int, high: int) -> _Cut:
    """Indices low:high of merged factors: kept factors, removed ones, alignments."""
    if not factors:
        return (), [], []
    first, rest = factors[0], factors[1:]
    minor = math.prod(f.size for f in rest)
    removed: list[tuple[Factor, Role]] = []
    if low // minor == (high - 1) // minor and first.size > 1:
        if first.axis is not None:
            removed.append((first, "layer"))
        begin = low // minor * minor
        if (low - begin, high - begin) == (0, minor):
            return rest, removed, []
        kept, more, aligns = _range(rest, low - begin, high - begin)
        return kept, removed + more, aligns
    if low % minor or high % minor:
        raise Unstructured("a slice cuts a dimension made of several axes off their borders")
    low, high = low // minor, high // minor
    kept = (dataclasses.replace(first, size=high - low), *rest)
    if first.axis is None:
        return kept, [], []
    return kept, [], [(first.axis, first.inner * math.gcd(low, high - low))]


def _strided(factors: tuple[Factor, ...], count: int, start: int) -> _Cut:
    """Every n-th index, or a run from an unknown start: nothing keeps blocks but single steps."""
    if len(factors) != 1:
        raise Unstructured("a strided slice of a dimension made of several axes")
    (factor,) = factors
    if count == 1:
        return (), [(factor, "layer")] if factor.axis is not None else [], []
    kept = (dataclasses.replace(factor, size=count),)
    return kept, [], [] if factor.axis is None else [(factor.axis, factor.inner)]


def _resize(origin: Origin, dim: int, cut: _Cut, start: int) -> Origin:
    kept, removed, aligns = cut
    dims, starts = list(origin.dims), list(origin.starts)
    dims[dim], starts[dim] = kept, start
    return dataclasses.replace(
        origin,
        dims=tuple(dims),
        starts=tuple(starts),
        removed=(*origin.removed, *removed),
        aligns=origin.aligns | frozenset(aligns),
    )
