"""`pick_rows`: rows of a table by index, by gather and by the TPU kernel in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core import structure
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.structure.pick import pick_rows
from jaxquant.pallas_kernels.tpu import pick_rows as kernel


def table_of(rows, groups, dtype):
    values = np.random.default_rng(0).normal(size=(rows, groups)) * 50
    table = jnp.asarray(values).astype(dtype)
    return table if dtype == jnp.int8 else table.at[3, 0].set(jnp.nan).at[4, 0].set(-jnp.inf)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
@pytest.mark.parametrize(("rows", "groups", "picked"), [(1000, 32, 16), (259, 5, 128), (70, 3, 1)])
def test_the_kernel_picks_what_a_gather_does(rows, groups, picked, dtype):
    table = table_of(rows, groups, dtype)
    index = np.random.default_rng(1).integers(-5, rows + 5, picked).astype(np.int32)
    index[:2] = [3, 4][:picked]
    want = np.asarray(table)[np.clip(index, 0, rows - 1)].astype(np.float32)
    got = kernel.pick_rows(table, index, interpret=True)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), want)
    np.testing.assert_array_equal(jax.jit(pick_rows)(table, index).astype(jnp.float32), want)


def test_mapped_and_differentiated():
    table, index = table_of(50, 3, jnp.float32), jnp.asarray([[0, 7, 60], [9, 9, 2]])
    want = np.asarray(table)[np.minimum(index, 49)]
    np.testing.assert_array_equal(jax.vmap(pick_rows, (None, 0))(table, index), want)
    tables = jnp.stack([table, 2 * table])
    got = jax.vmap(pick_rows)(tables, index)
    np.testing.assert_array_equal(got, np.stack([want[0], 2 * want[1]]))
    grad = jax.grad(lambda t: jnp.sum(pick_rows(t, index)))(table)
    counts = np.bincount([0, 7, 49, 9, 9, 2], minlength=50)
    np.testing.assert_array_equal(grad, np.stack([counts] * 3, axis=1))


def test_when_a_tile_for_each_row_is_worth_it():
    assert kernel.worth(16, 128_000, 32, jnp.float32)
    assert not kernel.worth(129, 1_000_000, 32, jnp.float32)  # a lane for each
    assert not kernel.worth(16, 8_000, 32, jnp.float32)
    assert not kernel.worth(1, 128_000, 1, jnp.float32)
    assert not kernel.worth(1, 128_000, 128, jnp.float32)  # row by row as it is
    assert not kernel.worth(1, 128_000, 32, jnp.float8_e4m3fn)


ROWS = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))


def lookup(w, index):
    return structure.gather(w, index[:, None], ROWS, (1, 64), mode="clip").dequantize()


@pytest.mark.parametrize("zero_points", [False, True])
def test_a_lookup_on_one_tpu_picks_tiles(zero_points):
    """Scales and zero points, of few rows; on several devices XLA splits its own gather."""
    table = jax.random.normal(jax.random.key(0), (4096, 64))
    w = quantize_array(table, "int4", (1, 16), symmetric=not zero_points)
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")

    def kernels(picked, sharding=None):
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        avals = jax.tree.map(lambda a: struct(a.shape, a.dtype), (w, jnp.zeros(picked, jnp.int32)))
        traced = jax.jit(lookup).trace(*avals)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert kernels(4) == 1 + zero_points
        assert kernels(5) == 0
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert kernels(4, NamedSharding(mesh, P())) == 0


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_table_split_over_devices(kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    w = quantize_array(jax.random.normal(jax.random.key(0), (64, 64)), "int4", (1, 8))
    index = jnp.asarray([3, 60, 0, 99])
    want = np.asarray(lookup(w, index))
    with jax.set_mesh(mesh):
        spec = P("model") if kind is jax.sharding.AxisType.Auto else P(None, "model")
        placed = jax.device_put(w, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(jax.jit(lookup)(placed, index), want)
