"""Checkpoints across meshes: each device writes the parts it holds and reads those it will hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxquant import io
from jaxquant.core.placement import part_shardings
from jaxquant.core.qtypes import qtype_names
from tests.io.trees import assert_same, random_qtensor


def mesh_of(*shape, names=("data", "model"), axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(axis_type,) * len(shape))


def place(tree, mesh, spec):
    """The tree with its weights split over the mesh by one spec."""

    def move(leaf):
        sharding = NamedSharding(mesh, spec)
        if hasattr(leaf, "codes"):
            sharding = part_shardings(leaf, sharding)
        # By way of numpy: jax 0.12's own resharding on CPU makes all NaNs of float8_e5m2 one NaN.
        return jax.device_put(jax.tree.map(np.asarray, leaf), sharding)

    return jax.tree.map(move, tree, is_leaf=lambda x: hasattr(x, "codes"))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("qtype", qtype_names())
def test_between_meshes(qtype, axis_type, tmp_path):
    tree = {"w": random_qtensor(qtype, (512, 32), 32), "x": jnp.arange(64.0).reshape(8, 8)}
    saved = place(tree, mesh_of(4, 2, axis_type=axis_type), P("data", "model"))
    io.save(tmp_path / "c", saved)
    # Without a word on sharding: everything on the default device.
    got = io.restore(tmp_path / "c")
    assert_same(got, tree)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(got))
    # Onto another mesh, transposed.
    mesh = mesh_of(8, names=("all",), axis_type=axis_type)
    got = io.restore(tmp_path / "c", sharding=(mesh, P(None, "all")))
    assert_same(got, tree)
    assert got["w"].codes.sharding == NamedSharding(mesh, P(None, "all"))
    assert got["w"].codes.addressable_shards[0].data.shape[1] == 32 // 8
    assert got["x"].sharding == NamedSharding(mesh, P(None, "all"))


def test_each_device_holds_only_its_part(tmp_path):
    weight = random_qtensor("int4", (1024, 64), 128)
    io.save(tmp_path / "c", {"w": weight})
    mesh = mesh_of(2, 4)
    got = io.restore(tmp_path / "c", sharding=(mesh, P("model", "data")))["w"]
    assert_same(got, weight)
    for shard in got.codes.addressable_shards:
        assert shard.data.shape == (256, 32)
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(weight.codes)[shard.index])
    assert {s.data.shape for s in got.scale.addressable_shards} == {(2, 32)}


def test_parts_follow_their_weight_as_far_as_they_can(tmp_path):
    # 6 blocks along axis 0 cannot be shared by 4 devices; the codes can.
    weight = random_qtensor("int4", (96, 8), 16)
    # 40 codes of 3 bits a device: whole bytes. 12 codes a device: not.
    whole, broken = random_qtensor("int3", (320, 8), 8), random_qtensor("int3", (96, 8), 8)
    stacked = random_qtensor("nvfp4", (64, 4, 8), 16)
    tree = {"a": weight, "b": whole, "c": broken, "d": stacked, "e": jnp.ones((8,)), "f": 3}
    io.save(tmp_path / "c", tree)
    mesh = mesh_of(8, names=("m",))
    four = mesh_of(2, 4, names=("n", "m"))
    got = io.restore(tmp_path / "c", sharding=(four, {"a": P("m"), "b": P("m")}))
    assert_same(got, tree)
    assert got["a"].codes.sharding.spec == P("m", None)
    assert got["a"].scale.sharding.spec == P(None, None)
    assert got["e"].sharding.is_fully_replicated and len(got["e"].sharding.device_set) == 8
    got = io.restore(tmp_path / "c", sharding=(mesh, {"b": P("m"), "c": P("m"), "d": P("m")}))
    assert got["b"].codes.sharding.spec == P("m", None)
    assert got["c"].codes.sharding.spec == P(None, None)
    assert got["d"].codes.sharding.spec == P("m", None, None)
    assert got["d"].scale.codes.sharding.spec == P(None, None, None)  # 4 blocks, 8 devices
    assert_same(got, tree)


def test_specs_by_glob_by_tree_by_function_and_by_sharding(tmp_path):
    tree = {
        "params": {
            "layers": [{"kernel": random_qtensor("int8", (64, 16), 16, seed=i)} for i in range(2)],
            "norm": jnp.ones((16,)),
        },
        "key": jax.random.key(0),
        "host": np.arange(8),
    }
    io.save(tmp_path / "c", tree)
    mesh = mesh_of(8, names=("m",))
    split, whole = NamedSharding(mesh, P("m", None)), NamedSharding(mesh, P())

    def check(sharding):
        got = io.restore(tmp_path / "c", sharding=sharding)
        assert_same(got, tree)
        for layer in got["params"]["layers"]:
            assert layer["kernel"].codes.sharding == split
        assert got["params"]["norm"].sharding.is_fully_replicated

    check((mesh, {"layers/*/kernel": P("m")}))
    check((mesh, {"params": {"layers": [{"kernel": P("m")}] * 2, "norm": P()}, "key": None}))
    check((mesh, {"params": {"layers": [{"kernel": split}] * 2}}))
    asked = {}

    def choose(path, struct):
        asked[path] = struct
        return split if path.endswith("kernel") else whole

    check(choose)
    assert asked["layers/0/kernel"] == jax.ShapeDtypeStruct((64, 16), jnp.float32)
    assert set(asked) == {"layers/0/kernel", "layers/1/kernel", "norm", "key"}
    got = io.restore(tmp_path / "c", sharding=SingleDeviceSharding(jax.devices()[5]))
    assert_same(got, tree)
    assert got["params"]["norm"].devices() == {jax.devices()[5]}
    got = io.restore(tmp_path / "c", sharding=lambda path, struct: None)
    assert got["params"]["norm"].devices() == {jax.devices()[0]}


def test_specs_of_boxes(tmp_path):
    weight = random_qtensor("int4", (64, 16), 16)
    tree = {
        "box": nn.Partitioned(weight, (None, "model")),
        "logical": nn.LogicallyPartitioned(weight, ("embed", "mlp"), rules=(("mlp", "model"),)),
        "context": nn.LogicallyPartitioned(jnp.ones((16, 4)), ("mlp", "embed")),
        "bare": jnp.ones((4,)),
    }
    io.save(tmp_path / "c", tree)
    mesh = mesh_of(2, 4)
    with nn.logical_axis_rules([("mlp", "data")]):
        got = io.restore(tmp_path / "c", sharding=mesh)
    assert_same(got, tree)
    assert got["box"].value.codes.sharding == NamedSharding(mesh, P(None, "model"))
    assert got["box"].value.scale.sharding == NamedSharding(mesh, P(None, "model"))
    assert got["logical"].value.codes.sharding == NamedSharding(mesh, P(None, "model"))
    assert got["context"].value.sharding.spec == P("data", None)
    assert got["bare"].sharding == NamedSharding(mesh, P())


def test_saved_and_restored_under_a_mesh_context(tmp_path):
    mesh = mesh_of(2, 4, axis_type=AxisType.Explicit)
    tree = {"w": random_qtensor("int4", (2048, 64), 128), "x": jnp.ones((256, 512))}
    with jax.set_mesh(mesh):
        io.save(tmp_path / "c", place(tree, mesh, P("model")))
        got = io.restore(tmp_path / "c", sharding=(mesh, P("data")))
        single = io.restore(tmp_path / "c")
    assert_same(got, tree)
    assert_same(single, tree)


def test_replicated_and_damaged(tmp_path):
    """The checksum of a sharded restore sees what a single device's would."""
    weight = random_qtensor("int8", (1024, 512), 128)
    mesh = mesh_of(8, names=("m",))
    io.save(tmp_path / "c", {"w": place(weight, mesh, P("m"))})
    files = (f for f in (tmp_path / "c").rglob("*") if f.is_file())
    file = max(files, key=lambda f: f.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(bytes(raw))
    for sharding in (None, (mesh, P("m")), (mesh, P(None, "m")), (mesh, P())):
        with pytest.raises(io.CheckpointError, match="altered.*'w/codes'|cannot read"):
            io.restore(tmp_path / "c", sharding=sharding)


@pytest.mark.parametrize(
    ("sharding", "error", "message"),
    [
        (lambda m: 3, TypeError, "sharding must be None"),
        (lambda m: (m, {"w": 3}), TypeError, "'w' is no PartitionSpec: 3"),
        (lambda m: (m, {"wrong": P("m")}), ValueError, r"no array .* is at \['wrong'\]"),
        (lambda m: (m, {"w": P("x")}), ValueError, "'w': the mesh has the axes .*not 'x'"),
        (lambda m: (m, {"w": P(None, None, "m")}), ValueError, "'w' has 2 axes; its spec"),
        (lambda m: (m, {"w": P(None, "m")}), ValueError, "axis 1 of 'w' has 12 elements, which 8"),
        (lambda m: lambda path, struct: P("m"), TypeError, "for 'w' the function gave"),
    ],
)
def test_specs_that_do_not_fit(sharding, error, message, tmp_path):
    io.save(tmp_path / "c", {"w": random_qtensor("int4", (64, 12), 16)})
    with pytest.raises(error, match=message):
        io.restore(tmp_path / "c", sharding=sharding(Mesh(np.array(jax.devices()), ("m",))))
