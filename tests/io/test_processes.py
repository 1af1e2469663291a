"""Checkpoints in other surroundings: two processes under one mesh, and a running event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import socket
import subprocess
import sys

import pytest

from jaxquant import io
from tests.io.trees import assert_same, random_qtensor

_PROCESS = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
from jaxquant import io
from jaxquant.core.placement import part_shardings
from tests.io.trees import random_qtensor

def put(array, sharding):
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

weight = random_qtensor("int4", (1024, 256), 128)
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
tree = {
    "w": jax.tree.map(put, weight, part_shardings(weight, NamedSharding(mesh, P("a", "b")))),
    "r": put(np.arange(1e5, dtype=np.float32), NamedSharding(mesh, P())),
    "n": 3,
}
io.save(sys.argv[3], tree)
io.save(sys.argv[3], tree, overwrite=True)
other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
got = io.restore(sys.argv[3], sharding=(other, {"w": P(None, "x")}))
assert got["w"].codes.sharding.spec == P(None, "x")
for shard in got["w"].codes.addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(weight.codes)[shard.index])
assert got["n"] == 3
"""


def test_two_processes(tmp_path, repository):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(repository)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(rank), address, str(tmp_path / "c")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output.decode()
    finally:
        for process in processes:
            process.kill()
    # One process reads what two have written.
    got = io.restore(tmp_path / "c")
    assert_same(got["w"], random_qtensor("int4", (1024, 256), 128))
    assert [*tmp_path.iterdir()] == [tmp_path / "c"]


def test_in_a_running_event_loop(tmp_path):
    """As in a notebook."""
    tree = {"w": random_qtensor("int4", (64, 8), 32)}

    async def cell():
        io.save(tmp_path / "c", tree)
        assert_same(io.restore(tmp_path / "c"), tree)
        for file in (tmp_path / "c" / "arrays").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:-5])
        with pytest.raises(io.CheckpointError, match="cannot read its arrays"):
            io.restore(tmp_path / "c")

    asyncio.run(cell())


def test_threads_save_and_restore_at_the_same_time(tmp_path):
    trees = [{"w": random_qtensor("int4", (64, 32), 32)} for _ in range(3)]
    level = logging.getLogger("absl").level

    def round_trip(number):
        for path in (tmp_path / str(number), tmp_path / "the same"):
            io.save(path, trees[number], overwrite=True)
        return io.restore(tmp_path / str(number))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for tree, restored in zip(trees, pool.map(round_trip, range(3)), strict=True):
            assert_same(tree, restored)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "the same"]
    io.restore(tmp_path / "the same")
    assert logging.getLogger("absl").level == level  # the quiet around Orbax ended
