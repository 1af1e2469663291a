"""What is saved comes back as what it was, without a template, to the last bit."""

from __future__ import annotations

import collections
import tempfile
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxquant import io
from jaxquant.core.qtensor import QTensor, make_qtensor
from jaxquant.core.qtypes import qtype_names
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.recipe import ActScheme, Rule, get_recipe
from jaxquant.io.manifest import DTYPES, VERSION
from tests.io.trees import Point, assert_same, random_bits, random_qtensor


def roundtrip(tree, tmp_path, **kwargs):
    io.save(tmp_path / "checkpoint", tree)
    return io.restore(tmp_path / "checkpoint", **kwargs)


@pytest.mark.parametrize("qtype", qtype_names())
def test_every_qtype(qtype, tmp_path):
    weight = random_qtensor(qtype, (96, 24), 32, dtype=jnp.bfloat16)
    stacked = random_qtensor(qtype, (64, 3, 5), 16, seed=1)
    assert_same(
        roundtrip({"w": weight, "layers": stacked}, tmp_path), {"w": weight, "layers": stacked}
    )


def test_static_fields_zero_points_and_nested_scales(tmp_path):
    rule = Rule("**", op="attention", act=ActScheme("int8"), optional=True)
    w = jax.random.normal(jax.random.key(0), (256, 64))
    asymmetric = quantize_array(w, "int4", (64, 1), symmetric=False)
    double = quantize_array(w, "int4", (64, 1), double_quant=True)
    assert isinstance(double.scale, QTensor)
    static = ActScheme("int8", mode="static")
    full = asymmetric.replace(
        input_scale=jnp.full((1, 1), 0.25),
        act=static,
        dtype=np.dtype("bfloat16"),
        op_rules=(rule,),
    )
    tree = {"a": asymmetric, "b": double, "c": full, "d": double.replace(act=ActScheme("int8"))}
    assert full.op_rules and asymmetric.zero_point is not None
    assert_same(roundtrip(tree, tmp_path), tree)


@pytest.mark.parametrize("kind", ["jax", "numpy", "scalar"])
def test_every_dtype(kind, tmp_path):
    tree = {}
    for name in sorted(DTYPES):
        if kind == "jax" and jnp.dtype(name).itemsize >= 8 and name != "complex64":
            continue  # 64-bit types are off
        array = random_bits((3, 5), name)
        tree[name] = {"jax": jnp.asarray, "numpy": np.asarray, "scalar": lambda a: a[1, 2]}[kind](
            array
        )
    if kind == "numpy":
        tree["strided"] = np.arange(24).reshape(4, 6)[::2, ::-1]
        tree["big-endian"] = np.arange(3, dtype=">i4")
        tree["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    got = roundtrip(tree, tmp_path)
    if kind == "numpy":
        np.testing.assert_array_equal(got.pop("big-endian"), tree.pop("big-endian"))
    assert_same(got, tree)


def test_64_bit_arrays_need_64_bit_types(tmp_path):
    with jax.enable_x64(True):
        tree = {"x": jnp.arange(5, dtype=jnp.int64) << 40, "y": jnp.asarray(1e-300)}
        assert_same(roundtrip(tree, tmp_path), tree)
    with pytest.raises(io.CheckpointError, match="'x' is int64; restore it with 64-bit"):
        io.restore(tmp_path / "checkpoint")


class Moments(typing.NamedTuple):
    mean: typing.Any
    var: typing.Any = None


def test_containers(tmp_path):
    shared = jnp.arange(3.0)
    tree = {
        "params": {
            "a/b": {"c.d": shared, "": jnp.ones(()), "ü\ud800\n": shared},
            "tuple": (shared, [], (), {}, None, [None, (shared,)]),
            "frozen": freeze({"x": {"y": shared}, "empty": {}}),
            "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
            "named": Point(x=shared, y=Moments(1, shared)),
        },
        "z first": 1,
        "keys": {7: 1, True: 2, None: 3, ("a", ("b", 0)): shared},
        "int keys": {7: shared, -1: shared},
        "scalars": [True, False, 0, -(2**70), 1.5, float("nan"), -0.0, 1e400, 1e-320, 2 - 3j],
        "text": ["s", "", b"\x00\xff", "\ud800"],
    }  # fmt: skip
    assert_same(roundtrip(tree, tmp_path), tree)


@pytest.mark.parametrize(
    "tree",
    [{}, [], (), None, 3, "x", FrozenDict(), {"a": None}, {"z": jnp.zeros((0, 4))}, np.float32(1)],
    ids=repr,
)  # fmt: skip
def test_trees_without_data(tree, tmp_path):
    assert_same(roundtrip(tree, tmp_path), tree)


def test_a_bare_array_and_a_bare_qtensor(tmp_path):
    for i, tree in enumerate((jnp.arange(4), random_qtensor("int4", (8, 4), 4), jax.random.key(1))):
        assert_same(roundtrip(tree, tmp_path / str(i)), tree)


def test_prng_keys(tmp_path):
    tree = {
        "one": jax.random.key(0),
        "many": jax.random.split(jax.random.key(1), (2, 3)),
        "rbg": jax.random.key(2, impl="rbg"),
        "old": jax.random.PRNGKey(3),
    }
    got = roundtrip(tree, tmp_path)
    assert_same(got, tree)
    assert jax.random.uniform(got["rbg"]) == jax.random.uniform(tree["rbg"])


def test_boxes_stay_around_their_values(tmp_path):
    weight = random_qtensor("int4", (32, 8), 16)
    rules = (("embed", "model"), ("vocab", None))
    tree = {
        "box": nn.Partitioned(weight, names=("data", None)),
        "tuple names": nn.Partitioned(jnp.ones((4, 2)), names=(("a", "b"), None)),
        "logical": nn.LogicallyPartitioned(weight, names=("embed", "vocab"), rules=rules),
        "no rules": nn.LogicallyPartitioned(jnp.ones((4,)), names=("embed",)),
    }
    got = roundtrip(tree, tmp_path)
    assert_same(got, tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)


def test_optimizer_states(tmp_path):
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    state = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    assert_same(roundtrip(state, tmp_path), state)


def test_named_tuples_of_local_classes_are_named(tmp_path):
    Local = collections.namedtuple("Local", ["a"])  # noqa: PYI024
    Local.__qualname__ = "somewhere.<locals>.Local"
    io.save(tmp_path / "c", Local(1))
    with pytest.raises(io.CheckpointError, match=r"Local.*types="):
        io.restore(tmp_path / "c")
    assert_same(io.restore(tmp_path / "c", types=[Local]), Local(1))
    assert io.inspect(tmp_path / "c").container == "namedtuple"


_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.builds(
        lambda shape, dtype, seed: jnp.asarray(random_bits(tuple(shape), dtype, seed)),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from(["int4", "uint4", "int8", "bool", "bfloat16", "float32", "float8_e8m0fnu"]),
        st.integers(0, 9),
    ),
    st.builds(
        lambda qtype, seed: random_qtensor(qtype, (8, 3), 4, seed),
        st.sampled_from(qtype_names()),
        st.integers(0, 9),
    ),
)
_keys = st.one_of(st.text(max_size=4), st.integers(-3, 3))
_trees = st.recursive(
    _leaves,
    lambda child: st.one_of(
        st.lists(child, max_size=3),
        st.lists(child, max_size=3).map(tuple),
        st.dictionaries(_keys, child, max_size=3),
        st.dictionaries(st.text(max_size=3), child, max_size=3).map(freeze),
        st.builds(Point, child, child),
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(_trees)
def test_any_tree(tree):
    with tempfile.TemporaryDirectory() as directory:
        io.save(f"{directory}/c", tree)
        assert_same(io.restore(f"{directory}/c"), tree)


# -- what cannot be saved is refused before anything is written ---------------------------------


class Strange:
    pass


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"b": Strange()}}, TypeError, "cannot save 'a/b': Strange is neither"),
        ({"a": {1.5: 0}}, TypeError, "cannot save 'a': its key 1.5 is a float"),
        ({"a": {1, 2}}, TypeError, "cannot save 'a': set"),
        ({"a": np.array(["x"])}, TypeError, "cannot save 'a': arrays of <U1"),
        ({"a": np.array([None])}, TypeError, "cannot save 'a': arrays of object"),
        ({"a": np.datetime64("2020-01-01")}, TypeError, "cannot save 'a': a numpy scalar"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, TypeError, "ShapeDtypeStruct is neither"),
        ({"a": lambda x: x}, TypeError, "function is neither"),
        (
            {"w": QTensor(jnp.zeros((4, 2), jnp.int8), jnp.ones((3, 2)))},
            ValueError,
            "w: invariant 3",
        ),
        (
            {"w": QTensor(jnp.zeros((4, 2), jnp.int8), jnp.ones((4, 2)), op_rules=("x",))},
            TypeError,
            "'w': its op_rules hold 'x'",
        ),
        (
            {"w": QTensor(nn.Partitioned(jnp.zeros((4, 2)), (None, None)), jnp.ones((4, 2)))},
            TypeError,
            "cannot save 'w': its codes is a Partitioned",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(tree, error, message, tmp_path):
    with pytest.raises(error, match=message):
        io.save(tmp_path / "c", tree)
    assert not [*tmp_path.iterdir()]


def test_refused_tracers_deleted_arrays_and_cycles(tmp_path):
    with pytest.raises(TypeError, match=r"cannot save 'a': it is a tracer"):
        jax.jit(lambda x: io.save(tmp_path / "c", {"a": x}))(jnp.ones(2))
    gone = jnp.ones(2)
    gone.delete()
    with pytest.raises(ValueError, match=r"cannot save 'a': the array was deleted"):
        io.save(tmp_path / "c", {"a": gone})
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="deeper than 100"):
        io.save(tmp_path / "c", cycle)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "metadata", [(1,), {1: 2}, float("nan"), {"a": jnp.ones(1)}, {"a": {True: 1}}]
)
def test_metadata_must_be_json(metadata, tmp_path):
    with pytest.raises(TypeError, match="metadata must be plain JSON"):
        io.save(tmp_path / "c", {}, metadata=metadata)


def test_inspect(tmp_path, capfd):
    tree = {
        "params": {
            "layer": {"kernel": random_qtensor("int4", (256, 8), 128, act=ActScheme("int8"))},
            "packed": random_qtensor("int3", (64, 8), 32),
            "bias": jnp.ones((8,), jnp.bfloat16),
            "n": 3,
        }
    }
    io.save(tmp_path / "c", tree, recipe="w4a8_g128", metadata={"steps": [1, 2.5, None]})
    assert capfd.readouterr() == ("", "")
    info = io.inspect(tmp_path / "c")
    assert info.version == VERSION == 2 and info.container == "dict"
    assert info.recipe == get_recipe("w4a8_g128")
    assert info.metadata == {"steps": [1, 2.5, None]}
    assert {(r.path, r.qtype, r.shape, r.dtype, r.nbytes) for r in info.rows} == {
        ("layer/kernel", "int4", (256, 8), "float32", 256 * 8 // 2 + 2 * 8 * 4),
        ("packed", "int3", (64, 8), "float32", 64 * 8 * 3 // 8 + 2 * 8 * 4),
        ("bias", None, (8,), "bfloat16", 16),
    }
    assert info.nbytes == sum(row.nbytes for row in info.rows)
    measured = sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file())
    assert info.disk_bytes == measured
    assert info.to_json()["rows"][0]["act"] == "int8 per token"
    assert "layer/kernel" in str(info) and "w4a8_g128" in str(info)
    assert_same(io.restore(tmp_path / "c"), tree)
    assert capfd.readouterr() == ("", "")


def test_invalid_part_of_make_qtensor_is_still_valid_here(tmp_path):
    """A weight of size zero and one of rank 1 go through."""
    tree = {
        "none": make_qtensor(jnp.zeros((0, 4), jnp.int8), jnp.ones((1, 4)), qtype="int8"),
        "flat": make_qtensor(jnp.zeros((4,), jnp.int8), jnp.ones((1,)), qtype="int8"),
    }
    assert_same(roundtrip(tree, tmp_path), tree)
