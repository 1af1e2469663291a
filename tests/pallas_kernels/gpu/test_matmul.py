"""The GPU matmul kernel in interpret mode against float64: every format, order and epilogue.

What registers hold is not interpreted (`test_reading` follows it lane by lane); everything else of
the body is what runs on a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip(
        "THIS JAX HAS NO MOSAIC GPU TO INTERPRET: NO GPU KERNEL RAN", allow_module_level=True
    )

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from benchmarks.gpu_aot import on_gpu  # noqa: E402
from benchmarks.gpu_cases import operands  # noqa: E402
from jaxquant.pallas_kernels.gpu.chips import CHIPS  # noqa: E402
from jaxquant.pallas_kernels.gpu.config import GpuConfig, shared_bytes  # noqa: E402
from jaxquant.pallas_kernels.gpu.heuristics import choose_config  # noqa: E402
from jaxquant.pallas_kernels.gpu.matmul import quantized_matmul  # noqa: E402
from jaxquant.pallas_kernels.problem import (  # noqa: E402
    PACKED,
    STORAGE,
    MatmulProblem,
    Unsupported,
)
from tests.pallas_kernels.gpu import cases  # noqa: E402

H200 = CHIPS["H200"]


def check(problem: MatmulProblem, config: GpuConfig, seed: int = 0):
    case = cases.make(problem, seed)
    cases.assert_close(cases.run(problem, config, case), case, config)


@st.composite
def problems(draw):
    codes = draw(st.sampled_from(sorted(STORAGE)))
    ks = [256, 384, 512] if codes in PACKED else [64, 192, 256, 384, 512]
    k = draw(st.sampled_from(ks))
    groups = [g for g in (0, 32, 64, 96, 128) if g == 0 or k % g == 0]
    x_dtype = draw(st.sampled_from(["bfloat16", "int8", "float8_e4m3fn"]))
    return MatmulProblem(
        draw(st.sampled_from([1, 5, 16, 40, 70])),
        k,
        draw(st.sampled_from([64, 144, 256])),
        codes,
        x_dtype,
        draw(st.sampled_from(groups)),
        zero_point=codes.startswith("int") and draw(st.booleans()),
        x_scale=x_dtype != "bfloat16",
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        residual=draw(st.booleans()),
        out_dtype="float32",
    )


@settings(max_examples=8)
@given(problem=problems(), seed=st.integers(0, 99))
def test_chosen_configs(problem, seed):
    config = choose_config(problem, H200)
    assert shared_bytes(problem, config) <= H200.shared_bytes
    check(problem, config, seed)


# Small blocks, so that every loop runs more than once: steps, stages, groups in a step or steps in
# a group, parts of k, tiles of a block, ragged edges of each axis.
BLOCKS = {"bm": 16, "bn": 64, "bk": 128, "stages": 2, "warpgroups": 2}
INT8 = {"x_dtype": "int8", "x_scale": True}
E4M3 = {"x_dtype": "float8_e4m3fn", "x_scale": True}
ALL = {"bias": True, "gate": True, "residual": True}
WAYS = {
    "one group a step": ({"codes": "int4", "group": 128, **ALL}, ("after", "bits"), {}),
    "groups in a step": ({"codes": "int4", "group": 32}, ("after", "bits"), {}),
    "steps in a group": ({"codes": "int4", "group": 320}, ("after", "bits"), {"bk": 64}),
    "cast, before": ({"codes": "int4", "group": 64}, ("before", "cast"), {}),
    "two blocks share x": (
        {"codes": "int4", "group": 64, **ALL},
        ("after", "bits"),
        {"cluster": 2, "warpgroups": 1, "bn": 128},
    ),
    "bits, before": ({"codes": "int4", "group": 64}, ("before", "bits"), {"blocks": 3}),
    "a scale a column": ({"codes": "int4"}, ("end", "bits"), {"bk": 64}),
    "parts of k": ({"codes": "int4", "group": 64, **ALL}, ("after", "bits"), {"split_k": 4}),
    "w8a16": ({"codes": "int8", "group": 64}, ("after", "cast"), {"blocks": 2}),
    "w8a8": ({"codes": "int8", **INT8, **ALL}, ("end", "direct", "int8"), {"split_k": 5}),
    "w8a8, groups": ({"codes": "int8", "group": 64, **INT8}, ("after", "direct", "int8"), {}),
    "w4a8": ({"codes": "int4", "group": 64, **INT8}, ("after", "bits", "int8"), {}),
    "w4a8, a scale a column": ({"codes": "int4", **INT8}, ("end", "bits", "int8"), {"bk": 64}),
    "fp8": ({"codes": "float8_e4m3fn", **E4M3}, ("end", "direct", "float8_e4m3fn"), {}),
    "bf16 x e4m3": ({"codes": "float8_e4m3fn", "group": 64}, ("after", "bits"), {}),
    "bf16 x e5m2": ({"codes": "float8_e5m2"}, ("end", "bits"), {"blocks": 2}),
    "w3, groups of lanes": ({"codes": "int3", "group": 64, **ALL}, ("before", "bits"), {}),
    "w3, a group a lane": ({"codes": "int3", "group": 32}, ("before", "bits"), {}),
    "w3, after": ({"codes": "int3", "group": 128}, ("after", "bits"), {}),
    "w2, groups of lanes": ({"codes": "int2", "group": 32}, ("before", "bits"), {"blocks": 2}),
    "w2, after": ({"codes": "int2", "group": 64, **ALL}, ("after", "bits"), {"split_k": 5}),
    "w2, a scale a column": ({"codes": "int2"}, ("end", "bits"), {}),
    "table, after": ({"codes": "table4", "group": 64, **ALL}, ("after", "bits"), {"blocks": 2}),
    "table, before": ({"codes": "table4", "group": 32}, ("before", "bits"), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_order_in_several_blocks(way):
    fields, order, changes = WAYS[way]
    config = dataclasses.replace(GpuConfig(**BLOCKS, scale="end", reading="direct"), **changes)
    config = dataclasses.replace(config, **dict(zip(("scale", "reading", "operand"), order)))
    zero_point = fields["codes"].startswith("int")
    problem = MatmulProblem(21, 640, 144, zero_point=zero_point, out_dtype="float32", **fields)
    check(problem, config)


@pytest.mark.parametrize(
    ("codes", "group", "order"),
    [
        ("int8", 0, ("end", "direct")),
        ("int8", 64, ("after", "direct")),
        ("int4", 64, ("after", "bits")),
        ("int4", 0, ("end", "bits")),
    ],
)
def test_integers_are_exact(codes, group, order):
    """Integer sums of whole scales and zero points: not one bit is off."""
    problem = MatmulProblem(
        16, 256, 128, codes, "int8", group, zero_point=True, x_scale=True, out_dtype="float32"
    )
    case = cases.make(problem)
    case.arrays["scale"][:] = 2.0
    case.arrays["x_scale"][:] = 0.5
    x, w = (np.asarray(case.arrays[n]).astype(np.int64) for n in ("x", "codes"))
    w = w - np.repeat(case.arrays["zero_point"].astype(np.int64), problem.group, 0).T
    config = GpuConfig(**BLOCKS, scale=order[0], reading=order[1], operand="int8")
    np.testing.assert_array_equal(np.asarray(cases.run(problem, config, case)), x @ w.T)


def test_float32_x_counts_as_bfloat16():
    problem = MatmulProblem(8, 128, 64, "int8", out_dtype="float32")
    config = choose_config(problem, H200)
    case = cases.make(problem)
    wide = case._replace(arrays=case.arrays | {"x": case.arrays["x"].astype(jnp.float32)})
    got, want = cases.run(problem, config, wide), cases.run(problem, config, case)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_what_does_not_fit_is_said():
    problem = MatmulProblem(8, 256, 128, "int4", group=64)
    arrays = {
        n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in cases.make(problem).arrays.items()
    }
    config = choose_config(problem, H200)

    def call(**changes):
        return jax.eval_shape(
            lambda a: quantized_matmul(**a, problem=problem, config=config), arrays | changes
        )

    with pytest.raises(
        ValueError, match=r"codes has shape \(256, 128\); the problem says \(128, 2"
    ):
        call(codes=jax.ShapeDtypeStruct((256, 128), jnp.int4))
    with pytest.raises(ValueError, match="codes is int8; the problem says int4"):
        call(codes=jax.ShapeDtypeStruct((128, 256), jnp.int8))


@pytest.mark.parametrize(
    "way", ["one group a step", "w8a8", "cast, before", "bf16 x e4m3", "w3, groups of lanes"]
)
def test_lowers_for_cuda_without_its_compilers(way):
    fields, _, _ = WAYS[way]
    problem = MatmulProblem(21, 640, 1024, **fields)
    config = choose_config(problem, H200)

    def fn(arrays):
        return quantized_matmul(**arrays, problem=problem, config=config)

    with on_gpu():
        lowered = jax.jit(fn).trace(operands(problem)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group": 16}, "groups of 16 are no multiple of 32"),
        ({"k": 4128}, r"int4 codes need k \(now 4128\) in multiples of 64"),
        ({"n": 4100}, r"n \(now 4100\) must be a multiple of 8"),
        ({"n": 4104, "zero_point": True}, "must be a multiple of 16 with zero points"),
        ({"x_dtype": "float16"}, "x in float16 has no GPU kernel"),
        ({"codes": "int3", "k": 4160}, r"int3 codes need k \(now 4160\) in multiples of 128"),
        ({"k": 2**18, "x_dtype": "int8"}, "integer sums over 262144 values may not fit"),
    ],
)
def test_what_has_no_kernel_is_said(changes, reason):
    with pytest.raises(Unsupported, match=reason):
        choose_config(
            MatmulProblem(**{"m": 8, "k": 4096, "n": 4096, "codes": "int4"} | changes), H200
        )


def test_few_rows_give_all_multiprocessors_work():
    """The rules' figures for the shapes that decoding meets: blocks in whole waves, k in parts."""
    for k, n in ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672), (14336, 4096)):
        for m in (1, 16, 64):
            problem = MatmulProblem(m, k, n, "int4", group=128)
            config = choose_config(problem, H200)
            blocks = -(-n // config.tile_n) * config.split_k
            waves = blocks / H200.multiprocessors
            assert waves / np.ceil(waves) >= 0.8, (k, n, m, config)
            whole = -(-k // config.bk)
            assert config.steps(problem) * config.split_k <= 1.15 * whole, (k, n, m, config)
