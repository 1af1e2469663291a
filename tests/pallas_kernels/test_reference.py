import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.pallas_kernels import reference
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.dot_method import DotMethod, choose_dot
from tests.pallas_kernels import dot_oracle as oracle


def run(problem: oracle.Problem, act: ActQuant | None = None, **options):
    x, values, scale, zero_point, dims, side, _ = problem
    fn = functools.partial(
        reference.dot_general, dimension_numbers=dims, weight_side=side, act=act, **options
    )
    return jax.jit(fn)(x, values, scale, zero_point)


def fake_quantized(x, act):
    codes, scale = jax.jit(quantize_activation, static_argnums=1)(x, act)
    return np.asarray(codes).astype(np.float64) * np.asarray(scale, np.float64)


@settings(max_examples=10)
@given(problem=oracle.problems())
def test_float_activations(problem):
    w = oracle.weight(problem.values, problem.scale, problem.zero_point)
    oracle.assert_close(run(problem), oracle.product(problem.x, w, problem))


@settings(max_examples=15)
@given(
    problem=oracle.problems(),
    per_tensor=st.booleans(),
    dtype=st.sampled_from(["int8", "int4", "float8_e4m3fn"]),
    on_cpu=st.booleans(),
)
def test_quantized_activations(problem, per_tensor, dtype, on_cpu):
    axes = tuple(range(problem.x.ndim)) if per_tensor else problem.x_contract
    act = ActQuant(dtype, axes)
    w = oracle.weight(problem.values, problem.scale, problem.zero_point)
    want = oracle.product(fake_quantized(problem.x, act), w, problem)
    oracle.assert_close(run(problem, act, on_cpu=on_cpu), want)


# Every method, on one problem that all of its kind fit: x [3, 2, 16], w [16, 4].
def _fixed(scale_shape, zero_point=None):
    rng = np.random.default_rng(0)
    return oracle.Problem(
        rng.normal(size=(3, 2, 16)).astype(np.float32),
        rng.integers(-7, 8, (16, 4)).astype(np.int8),
        rng.uniform(0.5, 2, scale_shape).astype(np.float32),
        None if zero_point is None else np.full(scale_shape, zero_point),
        (((2,), (0,)), ((), ())),
        "rhs",
        (2,),
    )


INT8, INT4, FP8 = (ActQuant(dtype, (2,)) for dtype in ("int8", "int4", "float8_e4m3fn"))
METHODS = {
    DotMethod.INT8: [(INT8, (1, 4)), (INT4, (1, 4)), (INT8, (1, 1))],
    DotMethod.INT8_GROUPS: [(INT8, (2, 4)), (INT4, (2, 4)), (INT8, (8, 1))],
    DotMethod.INT8_LOOP: [(INT8, (2, 4)), (INT4, (2, 4)), (INT8, (8, 1))],
    DotMethod.CODES: [(None, (1, 4)), (INT8, (1, 2)), (INT4, (1, 2)), (FP8, (1, 4))],
    DotMethod.SCALED_INPUT: [(None, (16, 1)), (None, (4, 1))],
    DotMethod.GROUPS: [(None, (2, 4)), (None, (4, 1))],
    DotMethod.DEQUANTIZE: [(None, (2, 4)), (INT8, (16, 4)), (FP8, (1, 2))],
}


@pytest.mark.parametrize("zero_point", [None, 3, 2.5])
@pytest.mark.parametrize(
    ("method", "act", "scale_shape"),
    [(m, *case) for m, cases in METHODS.items() for case in cases],
    ids=lambda v: getattr(v, "name", getattr(v, "dtype", str(v))),
)
def test_every_method(method, act, scale_shape, zero_point):
    problem = _fixed(scale_shape, zero_point)
    x = problem.x if act is None else fake_quantized(problem.x, act)
    want = oracle.product(x, oracle.weight(*problem[1:4]), problem)
    oracle.assert_close(run(problem, act, method=method), want)


@pytest.mark.parametrize("scale_shape", [(1, 4), (1, 2), (1, 1)])
def test_fp8_on_both_sides(scale_shape):
    problem = _fixed(scale_shape)
    values = jnp.asarray(problem.values, jnp.float8_e4m3fn)
    want = oracle.product(fake_quantized(problem.x, FP8), oracle.weight(*problem[1:4]), problem)
    for on_cpu in (False, True):
        got = run(problem._replace(values=values), FP8, on_cpu=on_cpu)
        oracle.assert_close(got, want)


def choose(x_shape, scale_shape, act, dtype=np.int8, w_shape=(256, 512)):
    axes = DotAxes.make((((1,), (0,)), ((), ())), 2, 2, "rhs")
    return choose_dot(x_shape, w_shape, np.dtype(dtype), scale_shape, axes, act)


def test_choice_bounds_partial_sums():
    act = ActQuant("int8", (1,))
    assert choose((1, 256), (2, 512), act).method is DotMethod.INT8_GROUPS
    assert choose((2, 256), (2, 512), act).method is DotMethod.INT8_LOOP
    assert choose((8, 256), (2, 512), None).method is DotMethod.GROUPS
    assert choose((9, 256), (2, 512), None).method is DotMethod.DEQUANTIZE
    wide = {"w_shape": (256, 2**22)}
    assert choose((1, 256), (2, 2**22), act, **wide).method is DotMethod.INT8_LOOP
    assert choose((1, 256), (2, 2**22), None, **wide).method is DotMethod.DEQUANTIZE
    assert choose((8, 256), (64, 512), act).method is DotMethod.DEQUANTIZE
    assert "too short" in choose((8, 256), (64, 512), act).reason


def test_choice_avoids_overflow():
    act = ActQuant("int8", (1,))
    assert choose((1, 66311), (1, 1), act, w_shape=(66311, 1)).method is DotMethod.INT8
    assert choose((1, 66312), (1, 1), act, w_shape=(66312, 1)).method is DotMethod.CODES
    assert "too long" in choose((1, 2**18), (2, 1), act, w_shape=(2**18, 1)).reason


def test_a_loop_over_groups_needs_no_memory_for_all_sums():
    act = ActQuant("int8", (1,))
    fn = jax.jit(
        functools.partial(
            reference.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), act=act
        )
    )
    args = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in [((256, 512), np.float32), ((512, 256), np.int8), ((16, 256), np.float32)]
    ]
    memory = fn.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20  # all groups' sums would take 4 MiB


@pytest.mark.parametrize("side", ["rhs", "lhs"])
@pytest.mark.parametrize("act", [None, ActQuant("int8", (1,))])
@pytest.mark.parametrize("scale_shape", [(1, 1, 6), (4, 1, 3), (1, 1, 1)])
def test_int4_columns_read_in_pairs(side, act, scale_shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 32)).astype(np.float32)  # 3 rows meet 32 contracted values
    values = rng.integers(-8, 8, (32, 2, 6)).astype(np.int8)
    scale = rng.uniform(0.5, 2, scale_shape).astype(np.float32)
    zero_point = rng.uniform(-3, 3, scale_shape).astype(np.float32)
    dims = (((1,), (0,)), ((), ())) if side == "rhs" else (((0,), (1,)), ((), ()))
    fn = functools.partial(
        reference.dot_general, dimension_numbers=dims, weight_side=side, act=act, on_cpu=True
    )
    args = (x, jnp.asarray(values, jnp.int4), scale, zero_point)
    problem = oracle.Problem(x, values, scale, zero_point, dims, side, (1,))
    seen = x if act is None else fake_quantized(x, act)
    want = oracle.product(seen, oracle.weight(values, scale, zero_point), problem)
    oracle.assert_close(jax.jit(fn)(*args), want)
    assert "bitcast_convert" in str(jax.make_jaxpr(fn)(*args))


def test_static_scale_per_expert():
    rng = np.random.default_rng(0)
    x, values = rng.normal(size=(5, 8)).astype(np.float32), rng.integers(-7, 8, (3, 8, 4))
    given = np.array([0.01, 0.02, 0.05], np.float32).reshape(3, 1, 1)
    act = ActQuant("int8", (0, 1), static=True)
    fn = functools.partial(
        reference.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), act=act
    )
    got = jax.jit(fn)(x, values.astype(np.int8), np.ones((1, 1, 4), np.float32), None, given)
    for e in range(3):
        codes = np.clip(np.rint(x.astype(np.float64) / given[e, 0, 0]), -127, 127)
        want = codes * given[e, 0, 0].astype(np.float64) @ values[e]
        oracle.assert_close(got[:, e], want)
    with pytest.raises(ValueError, match="size 8 on the weight's contracted axis 1"):
        fn(x, values.astype(np.int8), np.ones((1, 1, 4)), None, np.ones((3, 8, 1)))


def test_an_activation_of_size_zero():
    problem = _fixed((1, 4))
    for act in (None, INT8):
        assert run(problem._replace(x=problem.x[:0]), act).shape == (0, 2, 4)
