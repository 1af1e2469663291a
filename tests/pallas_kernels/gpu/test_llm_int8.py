"""LLM.int8(): outliers found and split as in float64, both products in one launch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu_aot import Job, available, measure
from jaxquant.pallas_kernels.gpu.chips import CHIPS
from jaxquant.pallas_kernels.gpu.config import shared_bytes
from jaxquant.pallas_kernels.gpu.llm_int8 import (
    CAPACITY_UNIT,
    choose_outlier_config,
    find_outliers,
    integer_problem,
    llm_int8_matmul,
    split_outliers,
)
from jaxquant.pallas_kernels.problem import Unsupported
from tests.pallas_kernels.gpu.llm_int8_cases import (
    activations,
    arguments,
    expected,
    reference_split,
    wide,
)
from tests.pallas_kernels.gpu.test_on_chip import CHIP

H200 = CHIPS["H200"]
HAS_MOSAIC_GPU = jax.__version_info__ >= (0, 11)
interpreted = pytest.mark.skipif(
    not HAS_MOSAIC_GPU, reason="THIS JAX HAS NO MOSAIC GPU TO INTERPRET: NO GPU KERNEL RAN"
)
on_chip = pytest.mark.skipif(
    CHIP is None or not HAS_MOSAIC_GPU,
    reason="THERE IS NO HOPPER GPU, OR JAX_PLATFORMS HIDES IT: NO GPU KERNEL RAN ON A CHIP",
)
compiled = pytest.mark.skipif(
    not available(),
    reason="JAX'S CUDA COMPILERS ARE NOT INSTALLED (pip install jax[cuda13]), OR THIS JAX IS OLDER"
    " THAN 0.11: NO GPU KERNEL WAS COMPILED",
)


@pytest.mark.parametrize("count", [0, 1, 5, 64, 70, 128])
def test_outliers_are_found_and_counted(count):
    columns = np.random.default_rng(count).permutation(128)[:count]
    x = activations(6, 128, columns)
    indices, mask, overflow = jax.jit(find_outliers)(x)
    size = np.abs(wide(x)).max(axis=0)
    found = np.asarray(indices)[np.asarray(mask)]
    assert len(set(np.asarray(indices).tolist())) == CAPACITY_UNIT
    assert len(found) == min(count, CAPACITY_UNIT) and set(found) <= set(columns)
    # Those with the largest magnitudes (bfloat16 has equal ones), in order.
    assert np.array_equal(size[found], np.sort(size[columns])[::-1][:CAPACITY_UNIT])
    assert int(overflow) == max(0, count - CAPACITY_UNIT)


def test_the_threshold_is_an_outlier_itself():
    x = jnp.zeros((2, 64), jnp.bfloat16).at[1, 7].set(-6.0).at[0, 9].set(5.96875)
    indices, mask, overflow = find_outliers(x)
    assert np.asarray(indices)[np.asarray(mask)].tolist() == [7] and int(overflow) == 0
    assert int(find_outliers(x, threshold=5.0).mask.sum()) == 2


@pytest.mark.parametrize("count", [0, 3, 64])
def test_split_is_that_of_float64(count):
    columns = np.random.default_rng(count).permutation(64)[:count]
    x = activations(9, 64, columns).at[4].set(0.0)
    indices, mask, _ = find_outliers(x)
    codes, scale, outliers = jax.jit(split_outliers)(x, indices, mask)
    rest, expected = reference_split(x, columns)
    np.testing.assert_allclose(wide(scale), expected, rtol=1e-6)
    assert codes.dtype == jnp.int8 and not wide(codes)[:, columns].any()
    assert np.abs(wide(codes) - rest / expected).max() <= 0.5 + 1e-4
    chosen = wide(x)[:, np.asarray(indices)] * np.asarray(mask)
    assert outliers.dtype == x.dtype and np.array_equal(wide(outliers), chosen)


def test_nan_stays_in_its_row():
    """Beside outliers or in their columns, and also if it makes a column the largest."""
    x = activations(5, 128, [3, 9]).at[1, 20].set(jnp.nan).at[2, 3].set(jnp.nan)
    x = x.at[3, 40].set(jnp.inf)
    indices, mask, overflow = find_outliers(x)
    assert sorted(np.asarray(indices)[np.asarray(mask)].tolist()) == [3, 9, 40]
    assert int(overflow) == 0
    split = split_outliers(x, indices, mask)
    assert np.isnan(wide(split.scale)).ravel().tolist() == [False, True, False, False, False]
    assert np.isnan(wide(split.outliers)).any(axis=1).tolist() == [False, False, True, False, False]
    assert np.isinf(wide(split.outliers)).any(axis=1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("capacity", [0, -64, 32, 96, 192])
def test_other_capacities_are_refused(capacity):
    x = jnp.zeros((2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=rf"capacity \(now {capacity}\).*multiple of 64"):
        find_outliers(x, capacity=capacity)
    with pytest.raises(ValueError, match=rf"capacity \(now {capacity}\).*multiple of 64"):
        choose_outlier_config(2, 128, 64, H200, capacity)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", jnp.zeros((4, 128), jnp.float32)),
        ("codes", jnp.zeros((128, 64), jnp.int8)),
        ("codes", jnp.zeros((64, 128), jnp.int32)),
        ("scale", jnp.zeros((64, 1))),
        ("indices", jnp.zeros(64, jnp.uint8)),
        ("mask", jnp.zeros(64)),
        ("mask", jnp.zeros(32, bool)),
    ],
)
def test_wrong_arrays_are_named(name, value):
    config = choose_outlier_config(4, 128, 64, H200)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        llm_int8_matmul(**(arguments() | {name: value}), config=config)


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(Unsupported, match="outlier columns of .* do not fit the"):
        choose_outlier_config(2048, 4096, 4096, H200, 1024)


@pytest.mark.skipif(HAS_MOSAIC_GPU, reason="only an older jax has no Mosaic GPU; this one has it")
def test_an_older_jax_is_told():
    config = choose_outlier_config(4, 128, 64, H200)
    with pytest.raises(Unsupported, match="no Mosaic GPU"):
        llm_int8_matmul(**arguments(), config=config)


def run(given, out_dtype="float32", interpret=True):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams() if interpret else False
    (m, k), n, capacity = given["x"].shape, given["codes"].shape[0], given["indices"].size
    config = choose_outlier_config(m, k, n, H200, capacity, out_dtype)

    def fn(given):
        return llm_int8_matmul(**given, config=config, out_dtype=out_dtype, interpret=params)

    return jax.jit(fn)(given)


@interpreted
@pytest.mark.parametrize(
    ("m", "k", "n", "count", "capacity"),
    [
        (21, 256, 144, 5, 64),  # ragged rows and columns
        (5, 192, 72, 0, 64),  # no outliers: the int8 product
        (16, 64, 64, 64, 64),  # nothing but outliers
        (130, 320, 264, 90, 128),  # several blocks of rows, two units of outliers
        (8, 128, 64, 80, 64),  # more than there are places for
    ],
)
def test_both_products_are_those_of_float64(m, k, n, count, capacity):
    outliers = np.random.default_rng(k).permutation(k)[:count]
    given = arguments(m, k, n, outliers, capacity)
    want, _ = expected(given)
    got = wide(run(given))
    assert got.shape == (m, n)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@interpreted
def test_results_in_bfloat16_and_nan():
    given = arguments(4, 128, 64)
    want, _ = expected(given)
    got = run(given, "bfloat16")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(got), want, rtol=2**-8, atol=1e-5 * np.abs(want).max())
    given["x"] = given["x"].at[1, 20].set(jnp.nan).at[2, 3].set(jnp.nan)
    bad = np.isnan(wide(run(given, "bfloat16")))
    assert bad[1:3].all() and not bad[[0, 3]].any()


@on_chip
@pytest.mark.parametrize(("m", "k", "n"), [(16, 4096, 4096), (2048, 4096, 1024), (3, 320, 136)])
def test_both_products_on_a_chip(m, k, n):
    given = arguments(m, k, n, np.random.default_rng(m).permutation(k)[:50])
    want, _ = expected(given)
    got = wide(run(given, interpret=False))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def program(m, k, n, capacity):
    """What is compiled, and its arguments; `benchmarks.gpu_aot` calls it in its own process."""
    config = choose_outlier_config(m, k, n, H200, capacity)

    def fn(x, codes, scale, indices, mask):
        return llm_int8_matmul(x, codes, scale, indices, mask, config=config)

    shapes = {
        "x": ((m, k), jnp.bfloat16),
        "codes": ((n, k), jnp.int8),
        "scale": ((1, n), jnp.float32),
        "indices": ((capacity,), jnp.int32),
        "mask": ((capacity,), jnp.bool_),
    }
    return fn, [jax.ShapeDtypeStruct(*of) for of in shapes.values()]


@compiled
def test_it_compiles_to_one_launch_with_both_products():
    sizes = {
        "few": (16, 4096, 4096, 64),
        "many": (2048, 4096, 4096, 64),
        "two units": (2048, 4096, 4096, 128),
        "ragged": (3, 320, 136, 64),
    }
    maker = f"{__name__}:program"
    keys = ("m", "k", "n", "capacity")
    got = measure([Job(n, maker, dict(zip(keys, s, strict=True))) for n, s in sizes.items()])
    assert {n: s.error for n, s in got.items() if s.error} == {}
    for name, (m, k, n, capacity) in sizes.items():
        (kernel,) = got[name].kernels  # one launch
        kinds = {key.split(".", 1)[1] for key in kernel.mma}
        assert kinds == {"s32.s8.s8", "f32.bf16.bf16"}, name
        assert (kernel.spills, kernel.stack, kernel.complaints) == (0, 0, []), name
        config = choose_outlier_config(m, k, n, H200, capacity)
        most = shared_bytes(integer_problem(m, k, n, "bfloat16"), config)
        most += 2 * capacity * (config.bm + config.tile_n)
        assert 0 < kernel.shared <= most <= H200.shared_bytes, name
        # The weight is neither copied nor converted as a whole.
        assert [move for move in got[name].moves if f"[{n},{k}]" in move] == [], name
