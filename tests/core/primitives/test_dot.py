"""quantized_dot_general: values, types, batching and gradients against float64."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxquant.core.primitives import (
    describe_lowering,
    quantized_attention_dot,
    quantized_dot_general,
)
from jaxquant.core.primitives.weights import act_quant
from jaxquant.core.qtensor import QTensor, make_qtensor
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from jaxquant.pallas_kernels.activation import quantize_activation
from tests.core.primitives.spmd_world import kernels_on_cpu
from tests.pallas_kernels import dot_oracle as oracle

MATMUL = (((1,), (0,)), ((), ()))
DYNAMIC = ActScheme()
INT4 = ActScheme("int4")
QTYPES = [
    "int8",
    "int4",
    "int3",
    "int2",
    "int1",
    "float8_e4m3",
    "float8_e5m2",
    "nf4",
    "mxfp4",
    "nvfp4",
]


def weight_of(problem: oracle.Problem, act=None, qtype="int4") -> QTensor:
    codes = jnp.asarray(problem.values, qtype)
    return make_qtensor(codes, jnp.asarray(problem.scale), problem.zero_point, qtype=qtype, act=act)


def multiply(problem: oracle.Problem, x, w):
    return quantized_dot_general(x, w, problem.dimension_numbers, weight_side=problem.weight_side)


def random(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def primitives_in(jaxpr) -> list[str]:
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for sub in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                names += primitives_in(getattr(sub, "jaxpr", sub))
    return names


@settings(max_examples=10)
@given(problem=oracle.problems())
def test_value_and_gradient_for_any_dimension_numbers(problem):
    w = weight_of(problem)
    floats = oracle.weight(problem.values, problem.scale, problem.zero_point)
    rng = np.random.default_rng(0)

    @jax.jit
    def value_and_pullback(x, cotangent):
        out, pull = jax.vjp(lambda x: multiply(problem, x, w), x)
        return out, pull(cotangent)[0]

    want = oracle.product(problem.x, floats, problem)
    cotangent = rng.normal(size=want.shape).astype(np.float32)
    out, x_bar = value_and_pullback(problem.x, cotangent)
    oracle.assert_close(out, want)
    assert x_bar.shape == problem.x.shape
    for _ in range(3):  # <cotangent, f(v)> == <x_bar, v>, since f is linear
        v = rng.normal(size=problem.x.shape)
        left = np.sum(cotangent * oracle.product(v, floats, problem))
        right = np.sum(np.asarray(x_bar, np.float64) * v)
        reach = np.linalg.norm(v) * np.linalg.norm(np.asarray(x_bar)) + 1e-6
        assert abs(left - right) <= 1e-5 * reach


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("act", [None, DYNAMIC, INT4, ActScheme("float8_e4m3")], ids=str)
def test_every_qtype(qtype, act):
    w = _quantized(qtype, (64, 24), act)
    x = random(2, 12, 64)
    floats = np.asarray(w.dequantize(), np.float64)
    got = jax.jit(lambda x, w: quantized_dot_general(x, w, MATMUL))(x, w)
    oracle.assert_close(got, seen(x, act, (1,)) @ floats)


def _quantized(qtype, shape, act=None, block=None):
    size = {"nf4": 32, "mxfp4": 32, "nvfp4": 16}.get(qtype, 64)
    w = quantize_array(random(1, *shape), qtype, block or (size, *(1,) * (len(shape) - 1)))
    return w.replace(act=act)


def seen(x, act, contract, static_scale=None):
    """What the product sees of x, float64."""
    if act is None:
        return np.asarray(x, np.float64)
    scheme = act_quant(act, x.ndim, contract)
    codes, scale = jax.jit(quantize_activation, static_argnums=1)(x, scheme, static_scale)
    return np.asarray(codes).astype(np.float64) * np.asarray(scale, np.float64)


def test_codes_by_definition():
    x = np.array([[0.0, 1.0, -127.0, 63.5, 0.5], [1e-3, -2e-3, 5e-4, 0, 0], [0, 0, 0, 0, 0]])
    codes, scale = quantize_activation(jnp.asarray(x, jnp.float32), act_quant(DYNAMIC, 2, (1,)))
    np.testing.assert_allclose(scale[:2, 0], [1.0, 2e-3 / 127], rtol=1e-6)
    np.testing.assert_array_equal(codes[0], [0, 1, -127, 64, 0])  # half to even
    np.testing.assert_array_equal(codes[1:], [[64, -127, 32, 0, 0], [0, 0, 0, 0, 0]])
    x = jnp.asarray([[0.0, 7.0, -6.5, 5.5, -0.5, 20.0], [1e-3, -2e-3, 5e-4, 0, 0, 0]])
    codes, scale = quantize_activation(x, act_quant(INT4, 2, (1,)))
    assert codes.dtype == jnp.int4
    np.testing.assert_allclose(scale[:, 0], [20 / 7, 2e-3 / 7], rtol=1e-6)
    want = [[0, 2, -2, 2, 0, 7], [4, -7, 2, 0, 0, 0]]
    np.testing.assert_array_equal(codes.astype(jnp.int8), want)
    static = act_quant(ActScheme("int4", mode="static"), 2, (1,))
    codes, _ = quantize_activation(x, static, static_scale=jnp.ones((1, 1)))
    np.testing.assert_array_equal(codes[0].astype(jnp.int8), [0, 7, -6, 6, 0, 7])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_rows_stay_visible_and_do_not_spread(bad):
    x = np.ones((3, 8), np.float32)
    x[1, 2] = bad
    w = _quantized("int8", (8, 4), DYNAMIC, (8, 1))
    out = np.asarray(quantized_dot_general(jnp.asarray(x), w, MATMUL))
    assert not np.isfinite(out[1]).any()
    assert np.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_activations(scale):
    x = jnp.clip(random(0, 4, 16), -1, 1) * np.float32(scale)
    w = _quantized("int8", (16, 4), DYNAMIC, (16, 1)).replace(scale=jnp.full((1, 4), 1e-3))
    got = np.asarray(quantized_dot_general(x, w, MATMUL), np.float64)
    want = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max() + 1e-30)


def test_integer_dot_is_exact():
    w = quantize_array(random(1, 32, 8), "int8", (32, 1), symmetric=False).replace(act=DYNAMIC)
    w = w.replace(zero_point=jnp.round(w.zero_point).astype(jnp.int32), scale=jnp.ones((1, 8)))
    x = np.random.default_rng(0).integers(-127, 128, (6, 32)).astype(np.float32)
    x[:, 0] = 127  # so that codes are x itself
    got = jax.jit(lambda x: quantized_dot_general(x, w, MATMUL))(x)
    want = x.astype(np.int64) @ (np.asarray(w.codes, np.int64) - np.asarray(w.zero_point))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("act", [None, DYNAMIC], ids=str)
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_narrow_floats(dtype, act, preferred):
    w = _quantized("int8", (64, 8), act).replace(dtype=np.dtype(dtype))
    x = (100 * random(0, 4, 64)).astype(dtype)
    fn = functools.partial(
        quantized_dot_general, dimension_numbers=MATMUL, preferred_element_type=preferred
    )
    got = jax.jit(fn)(x, w)
    assert got.dtype == (preferred or dtype)
    want = seen(x.astype(jnp.float32), act, (1,)) @ np.asarray(
        w.replace(dtype=np.dtype("float32")).dequantize(), np.float64
    )
    oracle.assert_close(got, want, 2e-5 if preferred else 5e-3)


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize("rows", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize(
    ("qtype", "block", "act"),
    [
        ("int8", (64, 1), None),
        ("int4", (16, 1), None),
        ("float8_e4m3", (64, 1), ActScheme("float8_e4m3")),
    ],
    ids=str,
)
def test_transposed_results_of_narrow_floats(qtype, block, act, rows, side):
    """XLA's CPU backend cannot run a bfloat16 product whose transpose it folded into it."""
    w = _quantized(qtype, (64, 24), act, block).replace(dtype=np.dtype(jnp.bfloat16))
    x = random(0, *rows, 64).astype(jnp.bfloat16)
    last = len(rows)
    dims = (((0,), (last,)), ((), ())) if side == "lhs" else (((last,), (0,)), ((), ()))
    fn = functools.partial(
        quantized_dot_general,
        dimension_numbers=dims,
        weight_side=side,
        preferred_element_type=jnp.float32,
    )
    got = jax.jit(lambda x, w: jnp.moveaxis(fn(x, w), 0, -1))(x, w)
    floats = np.asarray(w.replace(dtype=np.dtype("float32")).dequantize(), np.float64)
    want = seen(x.astype(jnp.float32), act, (last,)) @ floats
    want = np.moveaxis(np.moveaxis(want, -1, 0) if side == "lhs" else want, 0, -1)
    oracle.assert_close(got, want, 2e-5)


@pytest.mark.parametrize("block", [(64, 1), (16, 1)])
def test_wider_weight_is_not_narrowed(block):
    w = _quantized("int8", (64, 8), None, block)
    x = random(0, 12, 64).astype(jnp.bfloat16)
    got = jax.jit(lambda x: quantized_dot_general(x, w, MATMUL))(x)
    assert got.dtype == jnp.float32
    oracle.assert_close(got, seen(x.astype(jnp.float32), None, (1,)) @ np.asarray(w.dequantize()))


# -- batching ------------------------------------------------------------------------------------

PARTS = ["x", "codes", "scale", "zero_point", "input_scale"]
EINSUMS = {
    # name: dimension numbers, side, x shape, codes shape, scale shape
    "right": (MATMUL, "rhs", (5, 8), (8, 6), (2, 6)),
    "left": ((((0, 1), (0, 2)), ((2,), (1,))), "lhs", (4, 2, 3, 5), (4, 3, 2), (1, 3, 1)),
}


def _subsets():
    for mask in range(1, 2 ** len(PARTS)):
        yield tuple(p for i, p in enumerate(PARTS) if mask >> i & 1)


SUBSETS = [("right", b) for b in _subsets()]
SUBSETS += [("left", b) for b in _subsets() if len(b) in (1, len(PARTS)) or b == ("x", "scale")]


@pytest.mark.parametrize(
    ("einsum", "batched"), SUBSETS, ids=lambda v: v if v in EINSUMS else "+".join(v)
)
def test_vmap_over_every_subset(einsum, batched):
    dims, side, x_shape, w_shape, scale_shape = EINSUMS[einsum]
    rng, size = np.random.default_rng(0), 3
    lead = {p: (size,) if p in batched else () for p in PARTS}
    x = rng.normal(size=(*lead["x"], *x_shape)).astype(np.float32)
    codes = rng.integers(-7, 8, (*lead["codes"], *w_shape)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (*lead["scale"], *scale_shape)).astype(np.float32)
    zero = rng.integers(-3, 4, (*lead["zero_point"], *scale_shape)).astype(np.int8)
    given_scale = rng.uniform(0.01, 0.02, (*lead["input_scale"], *(1,) * len(w_shape)))
    act = ActScheme(mode="static")
    # Batch axes go last, so that the rule has to move them.
    values = [x, codes, scale, zero, given_scale.astype(np.float32)]
    at = [a.ndim - 1 if p in batched else None for p, a in zip(PARTS, values, strict=True)]
    moved = [np.moveaxis(a, 0, -1) if d is not None else a for a, d in zip(values, at, strict=True)]

    def fn(x, codes, scale, zero, input_scale):
        w = make_qtensor(codes, scale, zero, input_scale, qtype="int8", act=act)
        return quantized_dot_general(x, w, dims, weight_side=side)

    got = jax.jit(jax.vmap(fn, at))(*moved)
    for i in range(size):
        xi, ci, si, zi, gi = (
            a[i] if p in batched else a for p, a in zip(PARTS, values, strict=True)
        )
        x_contract = dims[0][0 if side == "rhs" else 1]
        one = np.asarray(gi, np.float32).reshape((1,) * xi.ndim)
        left, right = seen(xi, act, x_contract, jnp.asarray(one)), oracle.weight(ci, si, zi)
        want = oracle.dot(*((left, right) if side == "rhs" else (right, left)), dims)
        oracle.assert_close(got[i], want)


@pytest.mark.parametrize("qtype", ["int3", "nvfp4", "int8"])
def test_vmap_of_packed_and_nested_scales(qtype):
    stacked = jax.vmap(lambda k: _quantized_with(qtype, k))(jnp.arange(3))
    x = random(0, 5, 64)
    fn = jax.jit(jax.vmap(lambda w: quantized_dot_general(x, w, MATMUL)))
    for i, out in enumerate(fn(stacked)):
        one = jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
        oracle.assert_close(out, np.asarray(x, np.float64) @ np.asarray(one.dequantize()))


@pytest.mark.parametrize(("qtype", "group"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("rows", [3, 40])
def test_e2m1_by_a_tpu_kernel(monkeypatch, qtype, group, rows):
    """Whatever a scale is stored in, the kernel gets it as floats."""
    problems = kernels_on_cpu(monkeypatch, interpret=True)
    w = quantize_array(random(1, 256, 128), qtype, (group, 1))
    x = random(2, rows, 256).astype(jnp.bfloat16)
    got = jax.jit(functools.partial(quantized_dot_general, dimension_numbers=MATMUL))(x, w)
    assert [(p.codes, p.e2m1, p.group) for p in problems] == [("table4", True, group)]
    floats, weight = np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64)
    error = np.abs(np.asarray(got, np.float64) - floats @ weight)
    assert (error <= 2.0**-7 * (np.abs(floats) @ np.abs(weight))).all()


def _quantized_with(qtype, key):
    w = jax.random.normal(jax.random.key(key), (64, 8))
    block = (16, 1) if qtype == "nvfp4" else (64, 1)
    packed = -2 if qtype == "int3" else None
    return quantize_array(w, qtype, block, packed_axis=packed, double_quant=qtype == "int8")


def test_vmap_keeps_a_scale_per_example():
    x = jnp.stack([random(0, 4, 16), 100 * random(1, 4, 16)])
    act = ActScheme(granularity="tensor")
    w = _quantized("int8", (16, 4), act, (16, 1))
    one = lambda x: quantized_dot_general(x, w, MATMUL)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(one)(x), jnp.stack([one(x[0]), one(x[1])]), rtol=1e-6)


# -- differentiation -----------------------------------------------------------------------------


@pytest.mark.parametrize("act", [None, DYNAMIC, ActScheme("float8_e5m2")], ids=str)
@pytest.mark.parametrize("block", [(16, 1), (4, 1), (1, 8), (4, 4)], ids=str)
def test_gradient_is_straight_through(act, block):
    w = _quantized("int8", (16, 8), act, block)
    x, cotangent = random(3, 5, 16), random(4, 5, 8)
    floats = np.asarray(w.dequantize(), np.float64)
    fn = lambda x: quantized_dot_general(x, w, MATMUL)  # noqa: E731
    _, pull = jax.vjp(fn, x)
    oracle.assert_close(pull(cotangent)[0], np.asarray(cotangent, np.float64) @ floats.T)
    _, tangent = jax.jvp(fn, (x,), (x,))
    oracle.assert_close(tangent, np.asarray(x, np.float64) @ floats)


def test_second_order():
    w = _quantized("int8", (8, 4), None, (8, 1))
    fn = lambda x: jnp.sum(jnp.tanh(quantized_dot_general(x, w, MATMUL)))  # noqa: E731
    floats = w.dequantize()
    want = jax.hessian(lambda x: jnp.sum(jnp.tanh(x @ floats)))(random(0, 2, 8))
    oracle.assert_close(jax.hessian(fn)(random(0, 2, 8)), np.asarray(want, np.float64), 1e-4)


def test_backward_pass_stays_quantized():
    w = _quantized("int8", (16, 8), DYNAMIC, (16, 1))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: quantized_dot_general(x, w, MATMUL).sum()))(
        random(0, 5, 16)
    )
    names = primitives_in(jaxpr.jaxpr)
    assert names.count("quantized_dot_general") == 2
    assert "dot_general" not in names


@pytest.mark.parametrize("part", ["scale", "zero_point"])
def test_gradient_of_a_part_is_an_error(part):
    w = make_qtensor(jnp.ones((8, 4), jnp.int8), jnp.ones((1, 4)), jnp.ones((1, 4)), qtype="int8")
    fn = lambda p: quantized_dot_general(random(0, 3, 8), w.replace(**{part: p}), MATMUL).sum()  # noqa: E731
    message = f"{part} of a quantized weight.*stop_gradient.*float leaves"
    with pytest.raises(TypeError, match=message):
        jax.grad(fn)(getattr(w, part))


# -- other transformations -------------------------------------------------------------------------


def test_scan_over_stacked_layers_with_remat():
    layers = jax.vmap(lambda k: _layer(k))(jnp.arange(3))

    def apply(x, layers):
        step = jax.checkpoint(lambda x, w: jnp.tanh(quantized_dot_general(x, w, MATMUL)))
        return jax.lax.scan(lambda x, w: (step(x, w), None), x, layers)[0].sum()

    def floats(x, weights):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x.sum()

    x = random(0, 4, 16)
    weights = [jax.tree.map(lambda leaf: leaf[i], layers).dequantize() for i in range(3)]  # noqa: B023
    value, grad = jax.jit(jax.value_and_grad(apply))(x, layers)
    want, want_grad = jax.value_and_grad(floats)(x, weights)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    oracle.assert_close(grad, np.asarray(want_grad, np.float64), 1e-4)


def _layer(key):
    return quantize_array(jax.random.normal(jax.random.key(key), (16, 16)) / 4, "int8", (16, 1))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("case", ["int8", "int4 groups", "fp8", "nf4"])
def test_lowers_for_other_platforms(platform, case):
    act = None if case in ("int4 groups", "nf4") else DYNAMIC
    w = {
        "int8": lambda: _quantized("int8", (64, 8), act),
        "int4 groups": lambda: _quantized("int4", (64, 8), act, (32, 1)),
        "fp8": lambda: _quantized("float8_e4m3", (64, 8), ActScheme("float8_e4m3")),
        "nf4": lambda: _quantized("nf4", (64, 8)),
    }[case]()
    fn = jax.jit(jax.grad(lambda x: quantized_dot_general(x, w, MATMUL).sum()))
    text = fn.trace(random(0, 16, 64)).lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text


def test_lowers_for_several_platforms_at_once():
    w = _quantized("float8_e4m3", (64, 8), ActScheme("float8_e4m3"))
    fn = jax.jit(lambda x: quantized_dot_general(x, w, MATMUL))
    x = random(0, 16, 64)
    exported = jax.export.export(fn, platforms=("cpu", "tpu", "cuda"))(x)
    np.testing.assert_allclose(exported.call(x), fn(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("qtype", "group", "act"),
    [("int8", 64, ActScheme()), ("int4", 32, ActScheme()), ("int4", 32, None), ("int4", 64, None)],
)
def test_a_symbolic_number_of_rows(qtype, group, act):
    """An exported program serves every batch size; what is chosen by the rows counts as many."""
    w = quantize_array(random(1, 64, 8), qtype, (group, 1)).replace(act=act)
    (rows,) = jax.export.symbolic_shape("rows")
    fn = jax.jit(lambda x: quantized_dot_general(x, w, MATMUL))
    exported = jax.export.export(fn)(jax.ShapeDtypeStruct((rows, 64), jnp.float32))
    for n in (1, 5, 40):
        x = random(0, n, 64)
        np.testing.assert_allclose(exported.call(x), fn(x), rtol=1e-5, atol=1e-5)


def test_one_quantization_for_all_dots_that_share_an_input():
    ws = [_quantized("int8", (16, n), DYNAMIC, (16, 1)) for n in (8, 4, 4)]
    fn = jax.jit(lambda x: [quantized_dot_general(x, w, MATMUL) for w in ws])
    text = fn.lower(random(0, 32, 16)).compile().as_text()
    # The quantized input is the only s8 of its shape; each dot has its own sums.
    assert text.count("s8[32,16]{1,0} fusion(") == 1
    assert text.count("f32[32]{0} reduce(") == 1


def test_types_and_errors_are_those_of_dot_general():
    w = _quantized("int8", (16, 4), None, (16, 1))
    with pytest.raises(TypeError, match="contracting dimensions to have the same shape"):
        quantized_dot_general(random(0, 3, 8), w, MATMUL)
    with pytest.raises(ValueError, match="static .* no input_scale"):
        quantized_dot_general(random(0, 3, 16), w.replace(act=ActScheme(mode="static")), MATMUL)


def test_description_names_what_runs():
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    describe = lambda qtype, act, block=None: describe_lowering(  # noqa: E731
        x, _quantized(qtype, (64, 8), act, block), MATMUL
    )
    assert describe("int8", DYNAMIC)[0] == "xla: int8 dot"
    assert describe("int4", DYNAMIC, (32, 1)) == (
        "xla: int8 dot per group, in a loop",
        "group scales (32), 256 rows",
    )
    assert describe("int8", None)[0] == "xla: float dot on codes"
    assert describe("int4", None, (32, 1))[0] == "xla: dequantize, then float dot"
    assert describe("mxfp4", DYNAMIC)[0] == "xla: int8 dot per group, in a loop"
    assert describe("nf4", DYNAMIC, (64, 1))[0] == "xla: float dot on codes"
    assert describe("float8_e4m3", ActScheme("float8_e4m3"))[0] == "xla: fp8 dot"


# -- products of two activations ------------------------------------------------------------


def test_attention_products():
    q, k = random(0, 2, 5, 3, 16), random(1, 2, 7, 3, 16)
    dims = (((3,), (3,)), ((0, 2), (0, 2)))
    fn = lambda q, k: quantized_attention_dot(q, k, dims, DYNAMIC)  # noqa: E731
    want = oracle.dot(seen(q, DYNAMIC, (3,)), seen(k, DYNAMIC, (3,)), dims)
    oracle.assert_close(jax.jit(fn)(q, k), want)
    grads = jax.grad(lambda q, k: fn(q, k).sum(), (0, 1))(q, k)
    wants = jax.grad(lambda q, k: jax.lax.dot_general(q, k, dims).sum(), (0, 1))(q, k)
    for got, want in zip(grads, wants, strict=True):
        oracle.assert_close(got, np.asarray(want, np.float64))
    with pytest.raises(ValueError, match="static"):
        quantized_attention_dot(q, k, dims, ActScheme(mode="static"))
