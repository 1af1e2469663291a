"""A checkpoint is there completely or not at all, and is replaced only on request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from jaxquant import io
from jaxquant.io import storage
from tests.io.trees import assert_same, random_qtensor

# Saves checkpoint after checkpoint; says so before each, so that it can be killed at work.
_WRITER = """
import sys
import jax.numpy as jnp
import numpy as np
from jaxquant import io

tree = {"x": jnp.asarray(np.random.default_rng(0).integers(0, 256, 2**24, np.uint8))}
print("ready", flush=True)
sys.stdin.readline()
for _ in range(1000):
    io.save(sys.argv[1], tree, overwrite=sys.argv[2] == "overwrite")
"""


def kill_while_saving(path, mode: str, started) -> None:
    """Runs the writer and kills it as soon as `started` is true."""
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == b"ready\n"
        writer.stdin.write(b"\n")
        writer.stdin.flush()
        deadline = time.monotonic() + 30
        while not started():
            assert time.monotonic() < deadline and writer.poll() is None
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()


def test_killed_while_saving(tmp_path):
    path = tmp_path / "c"
    kill_while_saving(path, "once", lambda: any(tmp_path.iterdir()))
    assert not path.exists() and any(tmp_path.iterdir())
    with pytest.raises(io.CheckpointError, match="no such checkpoint"):
        io.restore(path)
    # What the crash left is no obstacle to the next save.
    tree = {"w": random_qtensor("int4", (8, 4), 4)}
    io.save(path, tree)
    assert_same(io.restore(path), tree)
    assert [*tmp_path.iterdir()] == [path]


def test_killed_while_overwriting(tmp_path):
    path = tmp_path / "c"
    tree = {"w": random_qtensor("int4", (8, 4), 4)}
    io.save(path, tree)
    new = tmp_path / ("c" + storage._NEW + ".orbax-checkpoint-tmp")
    kill_while_saving(path, "overwrite", lambda: new.exists())
    assert_same(io.restore(path), tree)  # the old one is whole
    io.save(path, {"a": 1}, overwrite=True)
    assert io.restore(path) == {"a": 1}
    assert [*tmp_path.iterdir()] == [path]


def test_failure_between_the_renames(tmp_path, monkeypatch):
    """The only moment at which nothing is under the name: both are there under others."""
    path = tmp_path / "c"
    io.save(path, {"a": 1})
    rename = type(storage._path(str(path))).rename

    def fail(self, target):
        if self.name.endswith(storage._NEW):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(type(storage._path(str(path))), "rename", fail)
    with pytest.raises(OSError, match="disk on fire"):
        io.save(path, {"a": 2}, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(
        io.CheckpointError, match="interrupted overwrite left c.jaxquant-old, c.jax"
    ):
        io.restore(path)
    assert io.restore(tmp_path / "c.jaxquant-old") == {"a": 1}
    assert io.restore(tmp_path / "c.jaxquant-new") == {"a": 2}


def test_overwrite_only_on_request(tmp_path):
    path = tmp_path / "c"
    io.save(path, {"a": 1})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        io.save(path, {"a": 2})
    assert io.restore(path) == {"a": 1}
    io.save(path, {"a": jnp.ones(3)}, overwrite=True)
    assert_same(io.restore(path), {"a": jnp.ones(3)})
    assert [*tmp_path.iterdir()] == [path]


def test_only_checkpoints_are_overwritten(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(
        FileExistsError, match="is not a jaxquant checkpoint; it is not overwritten"
    ):
        io.save(precious, {"a": 1}, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError):
        io.save(file, {"a": 1}, overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    io.save(empty, {"a": 1}, overwrite=True)
    assert io.restore(empty) == {"a": 1}


def test_relative_and_home_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    io.save("relative/c", {"a": 1})
    assert io.restore(os.path.join("relative", "c")) == {"a": 1}
    io.save("~/c", {"a": 2})
    assert io.restore(tmp_path / "c") == {"a": 2}
    assert io.inspect("~/c").rows == ()


def test_a_link_to_a_checkpoint_is_followed(tmp_path):
    path, link = tmp_path / "c", tmp_path / "latest"
    io.save(path, {"x": jnp.zeros(3)})
    link.symlink_to(path)
    io.save(link, {"x": jnp.ones(3)}, overwrite=True)
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "latest"]
    for name in (path, link):
        assert_same(io.restore(name), {"x": jnp.ones(3)})
