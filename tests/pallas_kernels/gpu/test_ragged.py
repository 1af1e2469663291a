"""Rows grouped by expert on a GPU: values in interpret mode, and the compilers' word for the H200.

What registers hold is not interpreted (`test_reading` follows it lane by lane).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip(
        "THIS JAX HAS NO MOSAIC GPU TO INTERPRET: NO RAGGED GPU KERNEL RAN", allow_module_level=True
    )

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from benchmarks.gpu_aot import Job, available, measure, on_gpu  # noqa: E402
from benchmarks.gpu_ragged_cases import ours, ragged_operands  # noqa: E402
from jaxquant.pallas_kernels.gpu.chips import CHIPS  # noqa: E402
from jaxquant.pallas_kernels.gpu.config import GpuConfig, shared_bytes  # noqa: E402
from jaxquant.pallas_kernels.gpu.ragged import (  # noqa: E402
    choose_ragged_config,
    make_tiles,
    most_tiles,
    ragged_matmul,
)
from jaxquant.pallas_kernels.problem import MatmulProblem, RaggedProblem, Unsupported  # noqa: E402
from tests.pallas_kernels.gpu import ragged_cases  # noqa: E402

H200 = CHIPS["H200"]


def check(product: MatmulProblem, sizes, config: GpuConfig, seed=0):
    """Each expert is a case of its own; its rows of the result are that case's."""
    p = RaggedProblem(product, len(sizes))
    case = ragged_cases.make(product, sizes, seed)
    arrays = dict(case.arrays)
    table = arrays.pop("table", None)
    staged = dataclasses.replace(config, staged=config.reading != "direct")

    def fn(arrays):
        interpret = plgpu.InterpretGPUParams()
        return ragged_matmul(**arrays, problem=p, config=staged, table=table, interpret=interpret)

    got = np.asarray(jax.jit(fn)(arrays), np.float64)
    assert got.shape == (product.m, product.n)
    tolerance = 2.0**-8 if config.scale == "before" else 1e-5
    error = np.abs(got - case.want)
    assert (error <= tolerance * (1 + case.scale_of_errors)).all(), error.max()
    assert not got[sum(sizes) :].any()


@st.composite
def products(draw):
    codes = draw(st.sampled_from(["int8", "int4", "int3", "int2", "table4"]))
    k = 256 if codes in ("int3", "int2") else draw(st.sampled_from([64, 192, 256]))
    x_dtype = draw(st.sampled_from(["bfloat16", "int8"]))
    return MatmulProblem(
        draw(st.sampled_from([1, 20, 70])),
        k,
        draw(st.sampled_from([64, 144])),
        codes,
        x_dtype,
        draw(st.sampled_from([0, 32, 64])),
        zero_point=codes.startswith("int") and draw(st.booleans()),
        x_scale=x_dtype == "int8",
        out_dtype="float32",
    )


@settings(max_examples=6)
@given(product=products(), cuts=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_chosen_configs(product, cuts):
    """Any sizes: experts without rows, all rows with one, rows that are nobody's."""
    ends = np.sort(np.round(np.array(cuts) * product.m)).astype(int)
    sizes = np.diff(ends, prepend=0)
    check(product, sizes, choose_ragged_config(RaggedProblem(product, len(sizes)), H200))


SMALL = GpuConfig(bm=16, bn=64, bk=128, stages=2, warpgroups=2, scale="after", reading="bits")
INT8 = {"x_dtype": "int8", "x_scale": True}
WAYS = {
    "w4a16 in groups": ({"codes": "int4", "group": 64, "zero_point": True}, {}),
    "w4a16 by column": ({"codes": "int4"}, {"scale": "end"}),
    "w8a16": ({"codes": "int8", "group": 64}, {"reading": "cast"}),
    "w8a16, scaled before": (
        {"codes": "int8", "group": 64, "zero_point": True},
        {"scale": "before", "reading": "cast"},
    ),
    "w8a8": (
        {"codes": "int8", "zero_point": True, **INT8},
        {"scale": "end", "reading": "direct", "operand": "int8"},
    ),
    "table": ({"codes": "table4", "group": 64}, {}),
    "parts of k": ({"codes": "int4", "group": 64, "zero_point": True}, {"split_k": 2}),
    "parts of integer sums": (
        {"codes": "int8", "zero_point": True, **INT8},
        {"scale": "end", "reading": "direct", "operand": "int8", "split_k": 3},
    ),
    "w4a8 in groups": ({"codes": "int4", "group": 64, **INT8}, {"operand": "int8"}),
}
SIZES = {
    "no rows at all": (0, 0, 0),
    "whole tiles": (16, 16, 16),
    "some are nobody's": (5, 0, 30),
    "all are one's": (0, 48, 0),
}


@pytest.mark.parametrize("sizes", SIZES)
def test_several_tiles_columns_and_steps(sizes):
    fields, changes = WAYS["w4a16 in groups"]
    product = MatmulProblem(48, 320, 144, out_dtype="float32", **fields)
    check(product, SIZES[sizes], dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("way", WAYS)
def test_every_order(way):
    fields, changes = WAYS[way]
    product = MatmulProblem(40, 320, 144, out_dtype="float32", **fields)
    check(product, (17, 0, 20), dataclasses.replace(SMALL, **changes), seed=3)


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 25), min_size=4, max_size=4), bm=st.sampled_from([8, 16]))
def test_tiles_hold_each_row_once(sizes, bm):
    rows = 100
    expert, row, place = map(np.asarray, make_tiles(jnp.asarray(sizes, jnp.int32), rows, bm))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    own = place[: len(owner)]
    assert len(set(own)) == len(own) and (own < len(row)).all()
    np.testing.assert_array_equal(row[own], np.arange(len(owner)))
    np.testing.assert_array_equal(expert[own // bm], owner)
    assert (place[len(owner) :] == len(row)).all()
    # There are no more tiles than rows need, and the rest are no expert's.
    used = sum(-(-size // bm) for size in sizes)
    assert (expert[:used] < len(sizes)).all() and (expert[used:] == len(sizes)).all()
    assert len(expert) == most_tiles(rows, len(sizes), bm)


def test_most_tiles_are_reached():
    """The grid has no block that no sizes need."""
    for sizes, bm in (((1, 1, 1, 13), 4), ((5, 1, 9), 8), ((1, 1), 8)):
        used = sum(-(-size // bm) for size in sizes)
        assert used == most_tiles(sum(sizes), len(sizes), bm)
    assert most_tiles(2, 64, 8) == 2


def test_what_does_not_fit_is_said():
    problem = RaggedProblem(MatmulProblem(8, 128, 64, "int8"), 2)
    config = choose_ragged_config(problem, H200)

    def call(config=config, **changes):
        arrays = ragged_operands(problem) | changes
        return jax.eval_shape(lambda a: ragged_matmul(**a, problem=problem, config=config), arrays)

    assert call().shape == (8, 64)
    with pytest.raises(ValueError, match=r"group_sizes has shape \(3,\), for 2 experts"):
        call(group_sizes=jax.ShapeDtypeStruct((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"codes has shape \(3, 64, 128\), for 2 experts"):
        call(codes=jax.ShapeDtypeStruct((3, 64, 128), jnp.int8))
    with pytest.raises(ValueError, match=r"codes has shape \(128, 64\); the problem says"):
        call(codes=jax.ShapeDtypeStruct((2, 128, 64), jnp.int8))
    with pytest.raises(ValueError, match="must have cluster 1 and blocks 0"):
        call(config=dataclasses.replace(config, cluster=2))
    with pytest.raises(Unsupported, match="groups of 16 are no multiple of 32"):
        choose_ragged_config(RaggedProblem(MatmulProblem(8, 128, 64, "int8", group=16), 2), H200)


def test_lowers_for_cuda_without_its_compilers():
    problem = RaggedProblem(MatmulProblem(40, 256, 144, "int4", group=64), 3)
    config = dataclasses.asdict(choose_ragged_config(problem, H200))
    fn, avals = ours(dataclasses.asdict(problem.product), 3, config)
    with on_gpu():
        lowered = jax.jit(fn).trace(*avals).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


# Of a model with 128 experts, 8 of them a token: one token (k in parts), 16, and 2048.
ROWS = (8, 128, 16384)
EXPERTS, K, N = 128, 2048, 768
FORMATS = {
    "w4a16 g128": ({"codes": "int4", "group": 128}, "f32.bf16.bf16"),
    "w4a16": ({"codes": "int4"}, "f32.bf16.bf16"),
    "w8a16 g128": ({"codes": "int8", "group": 128}, "f32.bf16.bf16"),
    "w8a16": ({"codes": "int8"}, "f32.bf16.bf16"),
    "w3a16 g128": ({"codes": "int3", "group": 128}, "f32.bf16.bf16"),
    "w2a16 g64": ({"codes": "int2", "group": 64}, "f32.bf16.bf16"),
    "nf4 g64": ({"codes": "table4", "group": 64}, "f32.bf16.bf16"),
    "w8a8": ({"codes": "int8", **INT8}, "s32.s8.s8"),
    "w4a8 g128": ({"codes": "int4", "group": 128, **INT8}, "s32.s8.s8"),
}


@pytest.mark.skipif(
    not available(),
    reason="JAX'S CUDA COMPILERS ARE NOT INSTALLED (pip install jax[cuda13]), OR THIS JAX IS OLDER"
    " THAN 0.11: NO RAGGED GPU KERNEL WAS COMPILED",
)
def test_every_kernel_compiles():
    jobs, configs = [], {}
    for name, (fields, _) in FORMATS.items():
        for m in ROWS:
            problem = RaggedProblem(MatmulProblem(m, K, N, **fields), EXPERTS)
            config = choose_ragged_config(problem, H200)
            configs[name, m] = shared_bytes(problem.product, config)
            arguments = {
                "product": dataclasses.asdict(problem.product),
                "experts": EXPERTS,
                "config": dataclasses.asdict(config),
            }
            jobs.append(Job(f"{name}, {m} rows", "benchmarks.gpu_ragged_cases:ours", arguments))
    got = measure(jobs)
    assert {n: s.error for n, s in got.items() if s.error} == {}
    for (name, m), most in configs.items():
        static = got[f"{name}, {m} rows"]
        (kernel,) = static.kernels
        assert kernel.mma and all(key.endswith(f".{FORMATS[name][1]}") for key in kernel.mma), name
        assert (kernel.spills, kernel.stack, kernel.complaints) == (0, 0, []), (name, m)
        assert 0 < kernel.shared <= most <= H200.shared_bytes, (name, m)
        # No expert is moved in front of the kernel: all that is moved has rows first.
        moved = [move for move in static.moves if f"[{EXPERTS},{N}," in move]
        assert moved == [], (name, m)
        if m == 128:  # of many rows, x in tiles is larger than an expert
            assert static.temporaries < EXPERTS * K * N // 4, name
