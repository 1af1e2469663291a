"""The record of how a weight lies on a mesh, and how it follows the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core import structure
from jaxquant.core.layout import MeshLayout, layout_of
from jaxquant.core.quantize_array import quantize_array

MESH = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
D, M = ("data",), ("model",)


def weight(shape, spec):
    w = quantize_array(jnp.ones(shape), "int8", (1,) * len(shape))
    return w.replace(mesh_layout=layout_of(NamedSharding(MESH, spec), len(shape), D))


def test_layout_of_a_sharding():
    layout = layout_of(NamedSharding(MESH, P(("data", "model"), None)), 3, ["data"])
    assert layout == MeshLayout((("data", 2), ("model", 4)), (("data", "model"), (), ()), D)
    assert hash(layout) == hash(layout_of(NamedSharding(MESH, P(("data", "model"))), 3, D))
    assert layout.of_weight(4) == ((), ("data", "model"), (), ())
    assert layout.of_weight(2) == ((), ())


MOVES = [
    (lambda w: structure.transpose(w, (2, 0, 1)), (M, (), D)),
    (lambda w: structure.expand_dims(w, (1,)), ((), (), D, M)),
    (lambda w: structure.squeeze(structure.expand_dims(w, (1,)), (1,)), ((), D, M)),
    (lambda w: structure.broadcast_in_dim(w, (2, 6, 4, 8), (1, 2, 3)), ((), (), D, M)),
    (lambda w: structure.slice(w, (0, 0, 0), (1, 4, 4)), ((), D, M)),
    (lambda w: structure.slice(w, (0, 0, 0), (6, 1, 8)), ((), (), M)),
    (lambda w: structure.dynamic_slice(w, (jnp.array(1), 0, 0), (1, 4, 8)), ((), D, M)),
    (lambda w: structure.rev(w, (2,)), ((), D, M)),
    (lambda w: structure.reshape(w, (2, 3, 4, 2, 4)), ((), (), D, M, ())),
    (lambda w: structure.reshape(w, (24, 8)), None),
    (lambda w: structure.reshape(w, (6, 32)), None),
    (lambda w: structure.reshape(w, (6, 4, 1, 8)), ((), D, (), M)),
    (lambda w: structure.concatenate([w, w], 0), ((), D, M)),
    (lambda w: structure.concatenate([w, w.replace(mesh_layout=None)], 0), None),
    (lambda w: structure.astype(w, jnp.bfloat16), ((), D, M)),
]


@pytest.mark.parametrize(("move", "after"), MOVES, ids=range(len(MOVES)))
def test_it_follows_the_weight(move, after):
    moved = move(weight((6, 4, 8), P(None, "data", "model"))).mesh_layout
    assert (None if moved is None else moved.axes) == after


def test_merged_axes_of_which_the_first_is_split():
    w = structure.reshape(weight((4, 6, 8), P("model", None, "data")), (24, 8))
    assert w.mesh_layout.axes == (M, D)


def test_a_gathered_layer():
    dn = jax.lax.GatherDimensionNumbers((0, 1), (0,), (0,))
    w = structure.gather(weight((6, 4, 8), P(None, "data", "model")), jnp.array([2]), dn, (1, 4, 8))
    assert w.mesh_layout.axes == (D, M)
