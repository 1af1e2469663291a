"""Checkpoints that exist stay readable: a committed one, written by format version 1."""

from __future__ import annotations

from jaxquant import io
from jaxquant.io.manifest import VERSION
from tests.io import fixture


def test_committed_checkpoint():
    fixture.check(fixture.PATH)


def test_committed_checkpoint_says_what_wrote_it():
    info = io.inspect(fixture.PATH)
    assert info.version == 1 <= VERSION
    assert info.writer["jax"] == "0.10.2"
    assert {row.qtype for row in info.rows} >= {"int8", "int4", "int3", "nf4", "nvfp4"}


def test_written_anew_says_the_same(tmp_path):
    """What this version writes has the nodes and checksums of the committed one."""
    io.save(tmp_path / "c", fixture.tree(), recipe="w4a16_g128", metadata=fixture.METADATA)
    old, new = io.inspect(fixture.PATH).to_json(), io.inspect(tmp_path / "c").to_json()
    for differing in ("path", "version", "writer", "disk_bytes"):
        del old[differing], new[differing]
    assert old == new
