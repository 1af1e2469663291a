"""`MeshLayout`: on which axes of a mesh a weight is split, and which the batch is split over.

On an explicit mesh the types of arrays say how they are split. On an automatic one nothing in a
traced program does, and a Pallas kernel must know. So `jaxquant.with_shardings` writes it down in
the static side of every `QTensor`, from where it goes wherever the weight goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from jax.sharding import NamedSharding

from jaxquant.pallas_kernels.spmd import Names


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """How a weight lies on a mesh. It decides who multiplies what, never what comes out.

    Attributes:
      mesh: name and size of each axis of the mesh, in order.
      axes: what the weight's last axes are split over, one entry an axis; those that are not here
        are whole. Counted from the last, so that layers may be taken off the front.
      batch: what the batch is split over: the first axis of a product's input that it does not sum
        over or share with the weight.
    """

    mesh: tuple[tuple[str, int], ...]
    axes: tuple[Names, ...]
    batch: Names = ()

    def of_weight(self, ndim: int) -> tuple[Names, ...]:
        """One entry for each axis of a weight of `ndim` axes."""
        missing = max(ndim - len(self.axes), 0)
        return ((),) * missing + self.axes[len(self.axes) + missing - ndim :]

    def moved(self, sources: Sequence[int | None], ndim: int) -> MeshLayout:
        """The layout after axes moved.

        Args:
          sources: for each axis of the result the axis it was, or None for one that is whole.
          ndim: number of axes before.
        """
        old = self.of_weight(ndim)
        axes = tuple(() if source is None else old[source] for source in sources)
        return dataclasses.replace(self, axes=axes)


def layout_of(sharding: NamedSharding, ndim: int, batch: Iterable[str] = ()) -> MeshLayout:
    """The layout of a weight with this sharding."""
    mesh = tuple(sharding.mesh.shape.items())
    axes = tuple(map(names_of, sharding.spec))
    return MeshLayout(mesh, axes + ((),) * (ndim - len(axes)), tuple(batch))


def names_of(entry: object) -> Names:
    """The mesh axes of one entry of a PartitionSpec; none for one that is left open."""
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()
