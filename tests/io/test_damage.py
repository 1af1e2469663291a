"""Damaged, cut, foreign and hostile checkpoints: a clear error, never other values."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import io
from jaxquant.core.recipe import ActScheme
from jaxquant.io import orbax
from jaxquant.io.info import make_info
from jaxquant.io.leaves import AbstractLeaf
from jaxquant.io.manifest import VERSION, Manifest
from tests.io.trees import Point, assert_same, random_qtensor

METADATA = Path("manifest") / "metadata"


def flip(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(raw))


def outcome(path, expected) -> str:
    """ "error" or "same"; anything else fails the test."""
    try:
        got = io.restore(path)
    except io.CheckpointError as error:
        assert str(path) in str(error)
        return "error"
    assert_same(got, expected)
    return "same"


def largest_file(path: Path) -> Path:
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("qtype", ["int8", "int4", "int2", "float8_e4m3"])
def test_flipped_bits_in_a_megabyte_of_incompressible_codes(qtype, tmp_path):
    bits = {"int4": 4, "int2": 2}.get(qtype, 8)
    tree = {"kernel": random_qtensor(qtype, (8 * 2**20 // bits // 1024, 1024), 128)}
    codes = tree["kernel"].codes
    assert codes.size * (4 if qtype == "int4" else 8) // 8 >= 2**20
    io.save(tmp_path / "c", tree)
    file = largest_file(tmp_path / "c")
    size = file.stat().st_size
    assert size > 2**20
    rng = np.random.default_rng(0)
    silent = 0
    outcomes = []
    for bit in rng.integers(0, 8 * size, 32).tolist():
        flip(file, bit)
        outcomes.append(outcome(tmp_path / "c", tree))
        if len(outcomes) % 8 == 0:  # what Orbax alone says of the same damage
            try:
                io.restore(tmp_path / "c", verify=False)
                silent += 1
            except io.CheckpointError:
                pass
        flip(file, bit)
    assert outcomes.count("error") == len(outcomes)
    if qtype == "int8":
        assert silent  # so the checksum is what detects it
    assert outcome(tmp_path / "c", tree) == "same"


def test_flipped_bits_in_every_file(tmp_path):
    tree = {"params": {"w": random_qtensor("int4", (256, 64), 128), "b": jnp.arange(64.0)}}
    io.save(tmp_path / "c", tree)
    rng = np.random.default_rng(1)
    for file in sorted(f for f in (tmp_path / "c").rglob("*") if f.is_file()):
        for bit in rng.integers(0, 8 * file.stat().st_size, 10).tolist():
            flip(file, bit)
            found = outcome(tmp_path / "c", tree)
            flip(file, bit)
            assert found == "error" or file != tmp_path / "c" / METADATA
    assert outcome(tmp_path / "c", tree) == "same"


def test_every_bit_of_the_metadata(tmp_path):
    io.save(tmp_path / "c", {"w": random_qtensor("int4", (8, 4), 4), "x": (1, 2.5)})
    raw = (tmp_path / "c" / METADATA).read_bytes()
    assert Manifest.open(raw, "here").leaves
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(io.CheckpointError, match="^here"):
            Manifest.open(bytes(changed), "here")


def test_cut_files(tmp_path):
    tree = {"w": random_qtensor("int8", (256, 128), 128), "b": jnp.arange(300.0), "n": np.arange(9)}
    io.save(tmp_path / "c", tree)
    needed = 0
    for file in sorted(f for f in (tmp_path / "c").rglob("*") if f.is_file()):
        raw = file.read_bytes()
        for kept in (raw[: len(raw) // 2], raw[:-1], b"", None):
            file.unlink() if kept is None else file.write_bytes(kept)
            needed += outcome(tmp_path / "c", tree) == "error"
            file.write_bytes(raw)
    assert needed >= 12  # metadata and data, at the least
    for folder in ("manifest", "arrays", "arrays/d"):
        shutil.move(tmp_path / "c" / folder, tmp_path / "aside")
        assert outcome(tmp_path / "c", tree) == "error"
        shutil.move(tmp_path / "aside", tmp_path / "c" / folder)
    assert outcome(tmp_path / "c", tree) == "same"


def test_arrays_of_another_checkpoint(tmp_path):
    """Two weights of one shape, exchanged on disk with everything Orbax knows of them."""
    a, b = (random_qtensor("int8", (64, 32), 32, seed) for seed in (0, 1))
    io.save(tmp_path / "c", {"a": a, "b": b})
    io.save(tmp_path / "other", {"a": b, "b": a})
    shutil.rmtree(tmp_path / "c" / "arrays")
    shutil.copytree(tmp_path / "other" / "arrays", tmp_path / "c" / "arrays")
    with pytest.raises(io.CheckpointError, match=r"4 of 4 arrays was altered.*'a/codes'"):
        io.restore(tmp_path / "c")


def test_not_a_checkpoint(tmp_path):
    def refused(path, message):
        for read in (io.restore, io.inspect):
            with pytest.raises(io.CheckpointError, match=message):
                read(path)

    refused(tmp_path / "nothing", "nothing: no such checkpoint$")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a jaxquant checkpoint: manifest is missing")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a jaxquant checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"a": jnp.ones(3)})
    refused(tmp_path / "orbax", "is not a jaxquant checkpoint: manifest is missing")
    foreign = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    foreign.save(
        tmp_path / "json", ocp.args.Composite(manifest=ocp.args.JsonSave({"format": "other"}))
    )
    refused(tmp_path / "json", "is not a jaxquant checkpoint: its metadata is other's")


# -- metadata that is well sealed and wrong ------------------------------------------------------


def write_sealed(path: Path, envelope, text: str) -> None:
    """Writes a manifest with the digest it should have, as an attacker would."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / METADATA).write_text(json.dumps({**envelope, "sha256": digest, "manifest": text}))


def test_newer_format(tmp_path):
    io.save(tmp_path / "c", {"a": 1})
    envelope = json.loads((tmp_path / "c" / METADATA).read_bytes())
    (tmp_path / "c" / METADATA).write_text(json.dumps({**envelope, "version": VERSION + 1}))
    for read in (io.restore, io.inspect):
        with pytest.raises(io.CheckpointError, match=f"has format version {VERSION + 1}; this"):
            read(tmp_path / "c")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A small checkpoint of many kinds of nodes, and the tree in it."""
    tree = {
        "w": random_qtensor("int4", (64, 8), 32, act=ActScheme("int8")),
        "p": random_qtensor("int3", (24, 8), 24),
        "b": jnp.arange(8, dtype=jnp.int32),
        "t": (1, Point(2.5, None), nn.Partitioned(np.arange(4), ("a",)), np.float32(3)),
        "k": jax.random.key(0),
    }
    path = tmp_path_factory.mktemp("sample") / "c"
    io.save(path, tree, recipe="w4a16")
    return path, tree


def child(body, *keys):
    """The node at a path of dict keys."""
    node = body["tree"]
    for key in keys:
        node = next(value for name, value in node["items"] if name == key)
    return node


def _leaf(body, path):
    return next(leaf for leaf in body["leaves"] if leaf["path"] == path)


def _set(node, **members):
    node.update(members)


def _nest(body):
    """More levels than Python's own stack has."""
    body["tree"] = {"kind": "x"}
    text = json.dumps(body)
    deep = '{"kind":"list","items":[' * 5000 + "]}" * 5000
    return text.replace('{"kind": "x"}', deep)


HOSTILE = {
    "a larger shape": (lambda b: _set(_leaf(b, "b"), shape=[9]), "cannot read its arrays"),
    "a smaller shape": (lambda b: _set(_leaf(b, "b"), shape=[7]), "cannot read its arrays"),
    "another rank": (lambda b: _set(_leaf(b, "b"), shape=[2, 4]), "cannot read its arrays"),
    "a numpy array's shape": (lambda b: _set(_leaf(b, "t/2"), shape=[5]), r"int64\[4\]; its meta"),
    "another dtype": (
        lambda b: _set(_leaf(b, "b"), dtype="uint32"),
        r"'b' holds int32\[8\]; its metadata states uint32",
    ),
    "a float for int4": (
        lambda b: _set(_leaf(b, "w/codes"), dtype="float32"),
        "int4 codes must be int4",
    ),
    "a huge shape": (
        lambda b: _set(_leaf(b, "b"), shape=[2**40, 2**20]),
        "which cannot have come from",
    ),
    "a shape beyond all": (lambda b: _set(_leaf(b, "b"), shape=[2**60]), "is no shape"),
    "a negative shape": (lambda b: _set(_leaf(b, "b"), shape=[-8]), "is no shape"),
    "a boolean shape": (lambda b: _set(_leaf(b, "b"), shape=[True]), "is no shape"),
    "a shape of text": (lambda b: _set(_leaf(b, "b"), shape="8"), "'shape' is of type str"),
    "an unknown dtype": (lambda b: _set(_leaf(b, "b"), dtype="object"), "unknown dtype 'object'"),
    "an unknown array kind": (lambda b: _set(_leaf(b, "b"), kind="pickle"), "unknown kind of arr"),
    "another checksum": (lambda b: _set(_leaf(b, "b"), checksum="0" * 16), "'b'"),
    "a short checksum": (lambda b: _set(_leaf(b, "b"), checksum="0"), "malformed checksum"),
    "an unknown generator": (lambda b: _set(_leaf(b, "k"), impl="os"), "'k'"),
    "an unknown container": (lambda b: _set(child(b, "w"), kind="pickle"), "unknown kind of cont"),
    "no container": (lambda b: b.update(tree=[]), "'tree' is of type list"),
    "an array twice": (lambda b: _set(child(b, "b"), leaf=0), "array 0 is missing or used twice"),
    "an array that is not there": (lambda b: _set(child(b, "b"), leaf=99), "array 99 is missing"),
    "a negative array": (lambda b: _set(child(b, "b"), leaf=-1), "array -1 is missing"),
    "an array as a path": (lambda b: _set(child(b, "b"), leaf="../../x"), "'leaf' is of type str"),
    "an unused array": (lambda b: b["tree"]["items"].pop(2), "1 arrays are unused"),
    "a key twice": (lambda b: b["tree"]["items"].append(["b", {"kind": "None"}]), "twice"),
    "a malformed item": (lambda b: b["tree"]["items"].append([]), "malformed item"),
    "a malformed key": (lambda b: b["tree"]["items"].append([[], {}]), "malformed key"),
    "an unknown qtype": (lambda b: _set(child(b, "w"), qtype="int5"), "unknown qtype 'int5'"),
    "another qtype": (lambda b: _set(child(b, "w"), qtype="int8"), "invariant 1"),
    "another grid": (lambda b: b["qtypes"]["int4"].update(qmin=-7), "int4 codes were written as"),
    "a grid that is not said": (lambda b: b["qtypes"].pop("int4"), "qtypes does not define int4"),
    "a newer qtype": (lambda b: b["qtypes"].update(int5={}), "A newer jaxquant may know it"),
    "another weight shape": (lambda b: _set(child(b, "w"), shape=[8, 64]), "make a weight of sha"),
    "another weight dtype": (lambda b: _set(child(b, "w"), dtype="int8"), "invariant 6"),
    "another packed length": (lambda b: _set(child(b, "p"), packed_length=99), "invariant 2"),
    "another packed axis": (lambda b: _set(child(b, "p"), packed_axis=0), "invariant 2"),
    "an unknown scheme": (lambda b: child(b, "w")["act"].update(mode="eval"), "mode"),
    "unknown rules": (lambda b: _set(child(b, "w"), op_rules=7), "there are no op_rules 7"),
    "malformed rules": (lambda b: b.update(op_rules=[[{"x": 1}]]), "malformed op_rules"),
    "no scale": (lambda b: _set(child(b, "w"), scale={"kind": "None"}), "scale is a 'None'"),
    "a list for codes": (
        lambda b: _set(child(b, "w"), codes={"kind": "list", "items": []}),
        "codes is a 'list'",
    ),
    "a function for a class": (
        lambda b: child(b, "t")["items"][1].update({"class": "os:system"}),
        "os:system",
    ),
    "another class": (
        lambda b: child(b, "t")["items"][1].update({"class": "subprocess:Popen"}),
        "subprocess:Popen",
    ),
    "a module that is not loaded": (
        lambda b: child(b, "t")["items"][1].update({"class": "this:x"}),
        "this:x",
    ),
    "a malformed float": (
        lambda b: child(b, "t")["items"][1]["items"][0][1].update(value="one"),
        "malformed float",
    ),
    "a malformed box": (lambda b: _set(child(b, "t")["items"][2], names={"eval": 1}), "malformed"),
    "no JSON": (lambda b: "{", "is not JSON"),
    "bare text": (lambda b: '"text"', "expected a JSON object"),
    "deep nesting": (_nest, "nested deeper|is not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata(name, sample, tmp_path):
    change, message = HOSTILE[name]
    shutil.copytree(sample[0], tmp_path / "c")

    envelope = json.loads((tmp_path / "c" / METADATA).read_bytes())
    body = json.loads(envelope["manifest"])
    changed = change(body)
    text = changed if isinstance(changed, str) else json.dumps(body)
    write_sealed(tmp_path / "c", envelope, text)
    with pytest.raises(io.CheckpointError, match=message):
        io.restore(tmp_path / "c")


def test_names_cannot_command_the_terminal(tmp_path):
    io.save(tmp_path / "c", {"\x1b[2Jname\n\u202e": jnp.ones(2)})
    shown = str(io.inspect(tmp_path / "c"))
    assert "\\x1b[2Jname\\n\\u202e" in shown and "\x1b" not in shown


def test_long_metadata_is_not_read(sample, tmp_path, monkeypatch):
    shutil.copytree(sample[0], tmp_path / "c")
    monkeypatch.setattr("jaxquant.io.storage.MAX_BYTES", 100)
    with pytest.raises(io.CheckpointError, match="longer than 100 bytes"):
        io.restore(tmp_path / "c")


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda child: st.one_of(
        st.lists(child, max_size=3), st.dictionaries(st.text(max_size=5), child, max_size=3)
    ),
    max_leaves=4,
)


def _positions(node, path=()):
    """Every path into a JSON value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            yield from _positions(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield (*path, i)
            yield from _positions(value, (*path, i))


@settings(max_examples=300)
@given(st.data(), st.integers(0, 10**6))
def test_any_change_of_any_member_is_an_error_or_harmless(sample, data, number):
    """No member of the metadata, whatever stands in it, leads to an error of another type."""
    envelope = json.loads((sample[0] / METADATA).read_bytes())
    body = json.loads(envelope["manifest"])
    positions = [*_positions(body)]
    *path, last = positions[number % len(positions)]
    node = body
    for key in path:
        node = node[key]
    node[last] = data.draw(_json)
    text = json.dumps(body)
    sealed = {**envelope, "sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
    try:
        manifest = Manifest.open(json.dumps(sealed).encode(), "here")
        abstract = [AbstractLeaf(record) for record in manifest.leaves]
        places: dict = {}
        orbax._decode(manifest, "here", (), places, abstract)
        make_info("here", manifest, places, 0)
    except io.CheckpointError:
        pass
