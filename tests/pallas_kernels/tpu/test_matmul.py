"""The matmul kernel in interpret mode against float64, for every storage, order and epilogue."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import E2M1, MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu import split
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.heuristics import choose_config
from jaxquant.pallas_kernels.tpu.matmul import quantized_matmul
from jaxquant.pallas_kernels.tpu.prepare import scratch_shapes
from tests.pallas_kernels.tpu import cases


def check(problem: MatmulProblem, config: MatmulConfig, seed: int = 0, interpret=True):
    case = cases.make(problem, seed)
    cases.assert_close(cases.run(problem, config, case, interpret), case, config)


@st.composite
def problems(draw):
    codes = draw(st.sampled_from(["int8", "int4", "int3", "int2", "table4", "float8_e4m3fn"]))
    k = draw(st.sampled_from([256, 512, 768])) if codes in ("int3", "int2") else None
    k = k or draw(st.sampled_from([64, 96, 128, 256, 384, 512]))
    e2m1 = codes == "table4" and draw(st.booleans())
    groups = [
        g for g in (0, 16, 32, 64, 128, 256) if g == 0 or (k % g == 0 and g >= 32 - 16 * e2m1)
    ]
    x_dtype = draw(st.sampled_from(["bfloat16", "int8", "float8_e4m3fn"]))
    return MatmulProblem(
        draw(st.sampled_from([1, 5, 16, 40, 70, 130])),
        k,
        draw(st.sampled_from([128, 256, 384] if codes in ("int3", "int2") else [96, 300])),
        codes,
        x_dtype,
        draw(st.sampled_from(groups)),
        zero_point=codes.startswith("int") and draw(st.booleans()),
        x_scale=x_dtype != "bfloat16",
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        residual=draw(st.booleans()),
        out_dtype="float32",
        e2m1=e2m1,
    )


@settings(max_examples=15)
@given(problem=problems(), chip=st.sampled_from(sorted(CHIPS)), seed=st.integers(0, 99))
def test_chosen_configs(problem, chip, seed):
    try:
        config = choose_config(problem, CHIPS[chip])
    except Unsupported as reason:
        assert str(reason)
        return
    check(problem, config, seed)


# Small blocks, so that every loop runs more than once: k in two steps, columns in two blocks,
# groups longer than a chunk, as long, and shorter.
BLOCKS = {"bm": 16, "bn": 128, "vmem_limit_bytes": 2**24}
ORDERS = [
    ("int4", 128, 256, "after", "cast"),
    ("int4", 32, 256, "after", "cast"),
    ("int4", 256, 512, "after", "cast"),
    ("int4", 256, 128, "after", "cast"),
    ("int4", 512, 256, "after", "bits"),
    ("int4", 128, 256, "after", "bits"),
    ("int4", 32, 256, "after", "bits"),
    ("int4", 0, 256, "end", "bits"),
    ("int4", 64, 256, "before", "cast"),
    ("int4", 32, 256, "before", "cast"),
    ("int4", 512, 256, "before", "cast"),
    ("int4", 64, 256, "before", "staged"),
    ("int8", 128, 256, "before", "staged"),
    ("int8", 0, 256, "end", "cast"),
    ("int8", 64, 256, "after", "bytes"),
    ("int8", 128, 256, "before", "bytes"),
    ("int3", 128, 512, "after", "bits"),
    ("int3", 64, 256, "after", "bits"),
    ("int3", 128, 512, "before", "bits"),
    ("int3", 0, 256, "end", "bits"),
    ("int2", 64, 256, "after", "bits"),
    ("int2", 32, 256, "before", "bits"),
    ("int2", 0, 256, "end", "bits"),
    ("int2", 64, 256, "after", "nibbles"),
    ("int2", 32, 256, "before", "nibbles"),
    ("int2", 0, 256, "end", "nibbles"),
    ("int3", 128, 512, "after", "nibbles"),
    ("int3", 64, 256, "after", "nibbles"),
    ("int3", 128, 512, "before", "nibbles"),
    ("int3", 0, 256, "end", "nibbles"),
    ("table4", 64, 256, "before", "table"),
    ("table4", 128, 256, "after", "table"),
    ("table4", 64, 256, "after", "table"),
    ("table4", 64, 256, "before", "bytes of table"),
    ("table4", 64, 256, "after", "bytes of table"),
    ("table4", 256, 512, "after", "bytes of table"),
    ("table4", 0, 256, "end", "bytes of table"),
    ("table4", 32, 256, "before", "e2m1"),
    ("table4", 16, 256, "before", "e2m1"),
    ("table4", 16, 256, "after", "e2m1"),
    ("table4", 32, 256, "after", "e2m1"),
    ("table4", 0, 256, "end", "e2m1"),
    ("table4", 32, 256, "before", "float4"),
    ("table4", 16, 256, "before", "float4"),
    ("table4", 32, 256, "after", "float4"),
    ("float8_e5m2", 0, 256, "end", "cast"),
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: "-".join(map(str, o)))
def test_every_order_in_several_blocks(order):
    codes, group, bk, scale, reading = order
    config = MatmulConfig(bk=bk, scale=scale, reading=reading, **BLOCKS)
    for zero_point in (False, True) if codes.startswith("int") else (False,):
        problem = MatmulProblem(
            20, 1024, 256, codes, "bfloat16", group, zero_point, out_dtype="float32"
        )
        problem = dataclasses.replace(problem, e2m1=reading in ("e2m1", "float4"))
        check(problem, config)


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("depth", [128, 256])
def test_float8_rows_are_converted_once_for_all_columns(group, depth):
    """Where x stays (all of k a block) and where it does not, for two blocks of rows."""
    codes = "int4" if group else "float8_e4m3fn"
    problem = MatmulProblem(
        190, 256, 384, codes, "float8_e4m3fn", group, x_scale=True, out_dtype="float32"
    )
    config = MatmulConfig(96, 128, depth, "before" if group else "end", "cast")
    assert "laid_out" in scratch_shapes(problem, config)
    assert "laid_out" not in scratch_shapes(problem, dataclasses.replace(config, parallel=True))
    check(problem, config)


@pytest.mark.parametrize("chip", sorted(CHIPS))
@pytest.mark.parametrize("m", [4, 80])
def test_mxfp4_is_exact(chip, m):
    """Scales that are powers of two: scaled in bfloat16, no weight is rounded."""
    problem = MatmulProblem(m, 512, 256, "table4", "bfloat16", 32, out_dtype="float32", e2m1=True)
    case, config = cases.make(problem), choose_config(problem, CHIPS[chip])
    scale = 2.0 ** np.round(np.log2(case.arrays["scale"]))
    case.arrays["scale"][:] = scale
    values = np.asarray(E2M1)[np.asarray(case.arrays["codes"]).astype(int) + 8]
    w = values * np.repeat(scale.astype(np.float64), 32, 0)
    x = np.asarray(case.arrays["x"].astype(jnp.float32), np.float64)
    got = np.asarray(cases.run(problem, config, case), np.float64)
    assert (np.abs(got - x @ w) <= 1e-6 * (np.abs(x) @ np.abs(w))).all()


def test_k_that_is_no_multiple_of_a_chunk():
    """Groups of 32 share chunks of 128 only where those divide k."""
    for k in (96, 160, 288):
        problem = MatmulProblem(5, k, 96, "int4", "bfloat16", 32, True, out_dtype="float32")
        for chip in ("v5e", "v6e"):
            check(problem, choose_config(problem, CHIPS[chip]))


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(
    ("codes", "group", "scale"), [("int8", 0, "end"), ("int4", 64, "after"), ("int4", 0, "end")]
)
def test_integers_are_exact(codes, group, scale, zero_point):
    """Integer sums of whole scales and zero points: not one bit is off."""
    problem = MatmulProblem(
        32, 512, 256, codes, "int8", group, zero_point, x_scale=True, out_dtype="float32"
    )
    case = cases.make(problem)
    case.arrays["scale"][:] = 2.0
    case.arrays["x_scale"][:] = 0.5
    x, w = (np.asarray(case.arrays[n]).astype(np.int64) for n in ("x", "codes"))
    if zero_point:
        w = w - np.repeat(case.arrays["zero_point"].astype(np.int64), problem.group, 0)
    config = MatmulConfig(bk=256, scale=scale, reading="cast", operand="int8", **BLOCKS)
    np.testing.assert_array_equal(np.asarray(cases.run(problem, config, case)), x @ w)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e", "v7x"])
def test_int4_times_int4(chip):
    """Multiplied as they are where the matrix units take int4, else as what they take.

    CPUs have no dot of int4; there the same kernel multiplies int8. The dot itself is compiled in
    test_aot.
    """
    operands = {"v4": "bfloat16", "v5e": "int4", "v6e": "int4", "v7x": "float8_e4m3fn"}
    for m, group in ((20, 128), (200, 0)):
        problem = MatmulProblem(
            m, 512, 256, "int4", "int4", group, x_scale=True, out_dtype="float32"
        )
        config = choose_config(problem, CHIPS[chip])
        few = m == 20 or chip != "v7x"  # the others as on v4
        assert config.operand == (operands[chip] if few else "bfloat16")
        on_cpu = "int8" if config.operand == "int4" else config.operand
        check(problem, dataclasses.replace(config, operand=on_cpu))


PARTS = [
    *(
        ("float8_e4m3fn", x, "int4", *how)
        for x in ("bfloat16", "int8")
        for how in ((128, "after", "cast"), (32, "after", "cast"), (0, "end", "cast"))
    ),
    ("int8", "bfloat16", "int4", 128, "after", "cast"),
    ("int8", "bfloat16", "int4", 32, "after", "cast"),
    ("int8", "bfloat16", "int4", 512, "after", "cast"),  # beyond what int32 sums of parts hold
    ("int8", "bfloat16", "int4", 0, "end", "cast"),
    ("int8", "float8_e4m3fn", "int4", 128, "after", "cast"),
    ("int8", "bfloat16", "int8", 64, "after", "cast"),
    ("int8", "bfloat16", "int8", 0, "end", "cast"),
    ("int8", "bfloat16", "int2", 64, "after", "nibbles"),
    ("int8", "bfloat16", "int2", 0, "end", "nibbles"),
    ("int8", "bfloat16", "int2", 32, "after", "pairs"),
    ("int8", "bfloat16", "int2", 0, "end", "pairs"),
    ("int8", "bfloat16", "int3", 128, "after", "nibbles"),
    ("int8", "bfloat16", "int3", 0, "end", "nibbles"),
]


@pytest.mark.parametrize("how", PARTS, ids=lambda how: "-".join(map(str, how)))
def test_x_in_parts(how):
    """Rows of all magnitudes: errors are 2^-21 of a row's largest, or those of float32 sums."""
    operand, x_dtype, codes, group, scale, reading = how
    for zero_point, rows in ((False, 8), (True, 16)):
        problem = MatmulProblem(
            6,
            1024,
            256,
            codes,
            x_dtype,
            group,
            zero_point,
            x_dtype != "bfloat16",
            out_dtype="float32",
        )
        case = cases.make(problem)
        if x_dtype == "bfloat16":
            sizes = 2.0 ** np.array([-90, -30, 0, 7, 60, 0])[:, None]
            sizes[-1] = 0
            x = np.asarray(case.arrays["x"], np.float32) * sizes
            x[1::2, 5] *= 1000
            x = jnp.asarray(x, jnp.bfloat16)
            want = np.asarray(x, np.float64) @ case.weight
            reach = np.abs(np.asarray(x, np.float64)) @ np.abs(case.weight)
            case = case._replace(arrays=case.arrays | {"x": x}, want=want, scale_of_errors=reach)
        config = MatmulConfig(
            rows, 128, 512, scale=scale, reading=reading, operand=operand, vmem_limit_bytes=2**24
        )
        got = np.asarray(cases.run(problem, config, case), np.float64)
        of_largest = np.abs(np.asarray(case.arrays["x"], np.float64)).max(1, keepdims=True)
        bound = 1e-6 * case.scale_of_errors + 2.0**-21 * of_largest * np.abs(case.weight).sum(0)
        assert (np.abs(got - case.want) <= bound).all()


@pytest.mark.parametrize("operand", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("group", "scale"), [(128, "after"), (0, "end")])
def test_parts_of_what_is_no_number(operand, group, scale):
    """Rows with an infinity or a NaN are NaN, the others what they are without them."""
    problem = MatmulProblem(5, 256, 128, "int4", "bfloat16", group, out_dtype="float32")
    config = MatmulConfig(8, 128, 256, scale=scale, reading="cast", operand=operand)
    case = cases.make(problem)
    usual = np.asarray(cases.run(problem, config, case))
    x = case.arrays["x"].at[1, 3].set(jnp.inf).at[2, 7].set(-jnp.inf).at[4, 0].set(jnp.nan)
    got = np.asarray(cases.run(problem, config, case._replace(arrays=case.arrays | {"x": x})))
    assert np.isnan(got[[1, 2, 4]]).all()
    np.testing.assert_array_equal(got[[0, 3]], usual[[0, 3]])


@given(
    rows=st.integers(1, 16),
    codes=st.sampled_from(["int4", "int2"]),
    group=st.sampled_from([0, 128, 256]),
    columns=st.sampled_from([128, 256, 384]),
    zero_point=st.booleans(),
    x_dtype=st.sampled_from(["bfloat16", "int8"]),
)
@settings(max_examples=12, deadline=None)
def test_narrow_codes_as_float8(rows, codes, group, columns, zero_point, x_dtype):
    """As v7x multiplies few rows."""
    problem = MatmulProblem(
        rows,
        512,
        columns,
        codes,
        x_dtype,
        group,
        zero_point,
        x_dtype == "int8",
        out_dtype="float32",
    )
    config = choose_config(problem, CHIPS["v7x"])
    assert (config.operand, config.bm) == ("float8_e4m3fn", 8 if rows <= 8 else 16)
    check(problem, config)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("group", "scale", "bk"), [(0, "end", 256), (128, "after", 512)])
def test_float8_by_its_bits(group, scale, bk, x_dtype):
    """Every code but the two that are no number; a column of the smallest ones, one of zeros."""
    problem = MatmulProblem(
        20, 512, 256, "float8_e4m3fn", x_dtype, group, x_scale=True, out_dtype="float32"
    )
    case, rng = cases.make(problem), np.random.default_rng(0)
    codes = rng.choice([c for c in range(256) if c & 0x7F != 0x7F], (512, 256)).astype(np.uint8)
    codes[:, 0] = rng.choice([*range(8), *range(128, 136)], 512)
    codes[:, 1] = rng.choice([0, 128], 512)
    stored = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
    weight = np.asarray(stored.astype(jnp.float32), np.float64)
    weight = weight * np.repeat(case.arrays["scale"].astype(np.float64), problem.group, 0)
    x = np.asarray(jnp.asarray(case.arrays["x"]).astype(jnp.float32), np.float64)
    x = x * case.arrays["x_scale"]
    config = MatmulConfig(bk=bk, scale=scale, reading="e4m3", **BLOCKS)
    case = case._replace(arrays=case.arrays | {"codes": stored})
    got = np.asarray(cases.run(problem, config, case), np.float64)
    assert (np.abs(got - x @ weight) <= 1e-5 * (np.abs(x) @ np.abs(weight))).all()


@pytest.mark.parametrize("operand", ["float8_e4m3fn", "int8"])
def test_parts_are_exact(operand):
    """Eight significant bits, down to 2^-13 of the largest of a row, rows of any magnitude."""
    rng, count = np.random.default_rng(0), split.PARTS[operand]
    magnitudes = rng.uniform(1, 2, (16, 256)) * 2.0 ** rng.integers(-13, 0, (16, 256))
    magnitudes[:, 0] = rng.uniform(1, 1.99, 16)
    magnitudes *= 2.0 ** np.array([-99, 126, *rng.integers(-99, 126, 14)])[:, None]
    x = jnp.asarray(magnitudes * rng.choice([-1, 1], magnitudes.shape), jnp.bfloat16)
    problem = MatmulProblem(16, 256, 128, "int4")
    config = MatmulConfig(16, 128, 256, "end", "cast", operand)

    def kernel(x_ref, down_ref, up_ref, parts_ref):
        down_ref[...], up_ref[...] = split.factors(x_ref[...], operand)
        parts_ref[...] = split.separated([x_ref[...]], up_ref[...], operand)

    wide = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    shapes = (wide, wide, jax.ShapeDtypeStruct((16 * count, 256), jnp.dtype(operand)))
    call = pl.pallas_call(kernel, out_shape=shapes, interpret=True)
    down, up, parts = (np.asarray(a, np.float64) for a in call(x))
    assert (down * up == split.unit(operand)).all() and (np.log2(up) % 1 == 0).all()
    largest = np.abs(np.asarray(x, np.float64)).max(1) * up[:, 0]
    wanted = {"float8_e4m3fn": 128, "int8": 64}[operand]
    assert (largest >= wanted).all() and (largest < 2 * wanted).all()
    sums = jnp.asarray(parts, jnp.int32 if operand == "int8" else jnp.float32)
    joined = np.asarray(split.joined(sums, problem, config), np.float64) * down[:, :1]
    np.testing.assert_array_equal(joined, np.asarray(x, np.float64))
    assert np.isnan(np.asarray(call(x.at[3, 5].set(jnp.inf))[0])[3]).all()


@pytest.mark.parametrize("reading", ["cast", "bits"])
def test_no_races(reading, capfd):
    """Each block is written once, and nothing is read before it is there."""
    problem = MatmulProblem(20, 512, 256, "int4", "bfloat16", 128, True, out_dtype="float32")
    config = MatmulConfig(bk=256, scale="after", reading=reading, **BLOCKS)
    check(problem, config, interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("codes", "reading", "operand"),
    [("int4", "cast", "bfloat16"), ("int4", "bits", "bfloat16"), ("int2", "nibbles", "int8")],
)
@pytest.mark.parametrize("columns", [256, 768])
def test_codes_fetched_by_the_kernel(columns, codes, reading, operand, capfd):
    """One block of columns and three: each half is there when it is multiplied."""
    problem = MatmulProblem(5, 512, columns, codes, "bfloat16", 128, True, out_dtype="float32")
    blocks = BLOCKS | {"bn": 256, "bk": 512}
    config = MatmulConfig(scale="after", reading=reading, operand=operand, stream=True, **blocks)
    check(problem, config)
    check(problem, config, interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_float32_x_counts_as_bfloat16():
    problem = MatmulProblem(8, 256, 128, "int8", out_dtype="float32")
    config = choose_config(problem, CHIPS["v5e"])
    case = cases.make(problem)
    wide = case._replace(arrays={**case.arrays, "x": case.arrays["x"].astype(jnp.float32)})
    got, want = cases.run(problem, config, wide), cases.run(problem, config, case)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_what_does_not_fit_is_said():
    problem = MatmulProblem(8, 256, 128, "int4", group=64)
    arrays = {
        n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in cases.make(problem).arrays.items()
    }
    config = choose_config(problem, CHIPS["v5e"])

    def call(**changes):
        return jax.eval_shape(
            lambda a: quantized_matmul(**a, problem=problem, config=config), arrays | changes
        )

    with pytest.raises(
        ValueError, match=r"scale has shape \(2, 128\); the problem says \(4, 128\)"
    ):
        call(scale=jax.ShapeDtypeStruct((2, 128), jnp.float32))
    with pytest.raises(ValueError, match="codes is int8; the problem says int4"):
        call(codes=jax.ShapeDtypeStruct((256, 128), jnp.int8))
    with pytest.raises(ValueError, match="groups of 48 do not divide k = 256"):
        dataclasses.replace(problem, group=48)
    with pytest.raises(ValueError, match="codes are one of"):
        dataclasses.replace(problem, codes="int5")
    with pytest.raises(Unsupported, match="groups of 16 are no multiple of 32"):
        choose_config(dataclasses.replace(problem, group=16), CHIPS["v5e"])
    uneven = MatmulProblem(8, 768, 128, "int3", group=96)
    with pytest.raises(Unsupported, match="chunks of 128 and groups of 96"):
        choose_config(uneven, CHIPS["v5e"])
    with pytest.raises(ValueError, match="blocks of 192"):
        cases.run(problem, dataclasses.replace(config, bk=192), cases.make(problem))
