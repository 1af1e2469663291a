"""Rows grouped by expert: the TPU kernel in interpret mode against float64, and its dispatch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxquant.core.primitives import quantized_ragged_dot
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Place
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem, Unsupported
from jaxquant.pallas_kernels.ragged_dispatch import choose_ragged
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_ragged_config
from jaxquant.pallas_kernels.tpu.ragged import make_visits, ragged_matmul
from tests.pallas_kernels.tpu import cases

V5E = Place("tpu", "TPU v5 lite")


def check(product: MatmulProblem, sizes, config: MatmulConfig, seed=0, interpret=True):
    """Each expert is a case of its own; its rows of the result are that case's."""
    p = RaggedProblem(product, len(sizes))
    each = [cases.make(product, seed + e) for e in range(len(sizes))]
    shared = {n: each[0].arrays[n] for n in ("x", "x_scale") if n in each[0].arrays}
    stacked = {
        n: jnp.stack([jnp.asarray(c.arrays[n]) for c in each])
        for n in ("codes", "scale", "zero_point")
        if n in each[0].arrays
    }
    table = each[0].arrays.get("table")

    def fn(arrays, sizes):
        return ragged_matmul(
            **arrays,
            group_sizes=sizes,
            problem=p,
            config=config,
            table=table,
            interpret=interpret,
        )

    got = np.asarray(jax.jit(fn)(shared | stacked, jnp.asarray(sizes, jnp.int32)), np.float64)
    rounded = config.scale == "before"
    tolerance, at = 2.0**-8 if rounded else 1e-5, 0
    x = np.asarray(jnp.asarray(shared["x"]).astype(jnp.float32), np.float64)
    x = x * np.asarray(shared.get("x_scale", np.ones((1, 1))), np.float64)
    for case, size in zip(each, sizes, strict=True):
        w = case.weight
        want, reach = x[at : at + size] @ w, np.abs(x[at : at + size]) @ np.abs(w)
        error = np.abs(got[at : at + size] - want)
        assert (error <= tolerance * (1 + reach)).all(), error.max()
        at += size
    assert not got[at:].any()


@st.composite
def products(draw):
    codes = draw(st.sampled_from(["int8", "int4", "int2", "float8_e4m3fn", "table4"]))
    k = 256 if codes in ("int2", "table4") else draw(st.sampled_from([96, 128, 256]))
    group = draw(st.sampled_from([0, *(g for g in (32, 64, 128) if k % g == 0)]))
    x_dtype = draw(st.sampled_from(["bfloat16", "int8"]))
    return MatmulProblem(
        draw(st.sampled_from([1, 20, 90, 200])),
        k,
        draw(st.sampled_from([128, 256])),
        codes,
        x_dtype,
        group,
        zero_point=codes.startswith("int") and draw(st.booleans()),
        x_scale=x_dtype == "int8",
        out_dtype="float32",
        e2m1=codes == "table4" and draw(st.booleans()),
    )


@settings(max_examples=10)
@given(
    product=products(),
    chip=st.sampled_from(sorted(CHIPS)),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_chosen_configs(product, chip, cuts):
    """Any sizes: experts without rows, all rows with one, rows that are nobody's."""
    ends = np.sort(np.round(np.array(cuts) * product.m)).astype(int)
    sizes = np.diff(ends, prepend=0)
    try:
        config = choose_ragged_config(RaggedProblem(product, len(sizes)), CHIPS[chip])
    except Unsupported as reason:
        assert str(reason)
        return
    check(product, sizes, config)


SMALL = {"bm": 16, "bn": 128, "vmem_limit_bytes": 2**24}


@pytest.mark.parametrize("sizes", [(0, 0, 0), (16, 16, 16), (5, 0, 30), (0, 48, 0), (1, 1, 1)])
def test_several_tiles_columns_and_blocks_of_k(sizes):
    product = MatmulProblem(48, 512, 256, "int4", group=64, zero_point=True, out_dtype="float32")
    for bk, reading in ((512, "bits"), (256, "cast")):
        config = MatmulConfig(bk=bk, scale="after", reading=reading, **SMALL)
        check(product, sizes, config)


def test_no_races(capfd):
    product = MatmulProblem(40, 256, 256, "int4", group=128, out_dtype="float32")
    config = MatmulConfig(bk=128, scale="after", reading="cast", **SMALL)
    check(product, (7, 0, 12), config, interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE DETECTED" not in capfd.readouterr().out


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 25), min_size=4, max_size=4), bm=st.sampled_from([1, 8, 16]))
def test_visits_cover_each_row_once(sizes, bm):
    rows = 100
    more = rows - sum(sizes)
    visits = make_visits(jnp.asarray(sizes, jnp.int32), rows, bm)
    count = int(visits.total[0])
    assert count <= visits.tile.shape[0] == -(-rows // bm) + len(sizes)
    tile, expert, start, end = (np.asarray(part)[:count] for part in visits[1:])
    assert (np.diff(tile) >= 0).all() and set(tile) == set(range(-(-rows // bm)))
    owner = np.full(rows + bm, -1)
    for t, e, s, f in zip(tile, expert, start, end, strict=True):
        own = np.arange(max(s, t * bm), min(f, (t + 1) * bm))
        assert (owner[own] == -1).all()
        owner[own] = e
    want = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(more + bm + 1, -1)])
    np.testing.assert_array_equal(owner[:rows], want[:rows])


def test_what_does_not_fit_is_said():
    product = MatmulProblem(8, 128, 128, "int8")
    config = choose_ragged_config(RaggedProblem(product, 2), CHIPS["v5e"])
    arrays = {
        "x": jnp.zeros((8, 128), jnp.bfloat16),
        "codes": jnp.zeros((2, 128, 128), jnp.int8),
        "scale": jnp.ones((2, 1, 128)),
    }

    def call(product=product, sizes=2, **changes):
        given = arrays | {"group_sizes": jnp.zeros(sizes, jnp.int32)} | changes
        return ragged_matmul(
            **given, problem=RaggedProblem(product, 2), config=config, interpret=True
        )

    with pytest.raises(ValueError, match=r"group_sizes has shape \(3,\), for 2 experts"):
        call(sizes=3)
    with pytest.raises(ValueError, match=r"codes has shape \(128, 128\)"):
        call(codes=arrays["codes"][0])
    with pytest.raises(ValueError, match="bias has shape None"):
        call(dataclasses.replace(product, bias=True))


EXPERTS = Weight("int4", (4, 256, 128), (4, 4, 128))
REFUSALS = [
    ({"place": Place("cpu")}, "runs on cpu"),
    ({"place": Place("tpu", "TPU v5 lite", 4)}, "4 devices share the program"),
    ({"plain": False}, "none of rows"),
    ({"weight": Weight("int5", (4, 256, 128), (4, 4, 128))}, "no kernel reads int5"),
    ({"weight": Weight("int2", (4, 256, 128), (4, 4, 128), packed_axis=2)}, "another axis"),
    ({"weight": Weight("int4", (4, 256, 128), (2, 4, 128))}, "several experts share a scale"),
    ({"x_shape": (0, 256)}, "empty"),
    ({"x_dtype": "float16"}, "x is float16"),
    ({"weight": Weight("int4", (4, 256, 128), (4, 16, 128))}, "groups of 16"),
]


def pick(weight=EXPERTS, x_shape=(16, 256), x_dtype="bfloat16", place=V5E, act=None, **options):
    options = {"plain": True, "out_dtype": "float32"} | options
    return choose_ragged(x_shape, x_dtype, weight, act, place, **options)


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[r for _, r in REFUSALS])
def test_why_not(change, reason):
    choice = pick(**change)
    assert choice.run is None and choice.name == "xla" and reason in choice.reason
    with pytest.raises(ValueError, match="implementation='pallas', but no kernel fits"):
        pick(**change, implementation="pallas")


def test_what_is_chosen():
    assert pick().name == "pallas tpu v5e: int4 experts, scale after the dot"
    assert "4 experts, 16 rows in tiles of 16" in pick().reason
    assert pick(implementation="xla").name == "xla"
    assert pick(place=Place("tpu", "TPU v6e", 4, manual=True)).run is not None


@pytest.mark.parametrize("act", [None, ActScheme(), ActScheme(granularity="tensor")])
def test_the_choice_does_what_the_reference_does(act):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(70, 128)), jnp.bfloat16)
    w = quantize_array(jnp.asarray(rng.normal(size=(3, 128, 128)), jnp.float32), "int4", (1, 64, 1))
    w = w.replace(act=act, dtype=jnp.dtype("bfloat16"))
    sizes = jnp.asarray([40, 0, 22], jnp.int32)
    quant = None
    if act is not None:
        quant = ActQuant("int8", (1,) if act.granularity == "token" else (0, 1))
    choice = pick(Weight("int4", w.shape, w.scale.shape), x.shape, act=quant)
    got = jax.jit(
        lambda x, w: choice.run(x, None, w.codes, w.scale, None, None, sizes, interpret=True)
    )(x, w)
    want = np.asarray(quantized_ragged_dot(x, w, sizes, preferred_element_type=jnp.float32))
    np.testing.assert_allclose(np.asarray(got), want, rtol=2e-2, atol=2e-2 * np.abs(want).max())


def lowered(fn, *avals, kind="TPU v5 lite"):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(fn).trace(*avals).lower(lowering_platforms=("tpu",)).as_text()


def test_the_primitive_lowers_to_it():
    """Through Mosaic's own verifier, with neither TPU nor its compiler; its gradient too."""
    struct = jax.ShapeDtypeStruct
    w = QTensor(
        struct((4, 256, 128), jnp.dtype("int4")),
        struct((4, 2, 128), jnp.float32),
        qtype=get_qtype("int4"),
    )
    x, sizes = struct((32, 256), jnp.float32), struct((4,), jnp.int32)
    text = lowered(quantized_ragged_dot, x, w, sizes)
    assert text.count("tpu_custom_call") == 1
    forced = lambda *a: quantized_ragged_dot(*a, implementation="xla")  # noqa: E731
    assert "tpu_custom_call" not in lowered(forced, x, w, sizes)
    grad = lambda x, w, s: jax.value_and_grad(  # noqa: E731
        lambda x: quantized_ragged_dot(x, w, s).sum()
    )(x)
    assert lowered(grad, x, w, sizes).count("tpu_custom_call") >= 1
    with pytest.raises(ValueError, match="'pallas', but vmap"):
        jax.eval_shape(
            jax.vmap(
                lambda x, w, s: quantized_ragged_dot(x, w, s, implementation="pallas"),
                (0, None, None),
            ),
            struct((2, 32, 256), jnp.float32),
            w,
            sizes,
        )
