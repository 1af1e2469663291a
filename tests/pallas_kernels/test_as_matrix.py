"""Products as matrices, for kernels that take codes as [k, n] and for those that take [n, k]."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.pallas_kernels import packing, reference
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import Kernel, MatrixProduct, Weight, flatten
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import Unsupported

PLAIN = (((1,), (0,)), ((), ()))
LAST = (((1,), (1,)), ((), ()))
# x, weight, scale, dimension numbers, side: a plain matrix; heads in two free axes; two contracted
# axes in another order; the weight on the left; one scale for all columns; and with the contracted
# axes last: a table that is attended, heads, on the left.
FIRST_LAYOUTS = [
    ((8, 64), (64, 24), (4, 24), PLAIN, "rhs"),
    ((2, 4, 32), (32, 3, 8), (2, 3, 8), (((2,), (0,)), ((), ())), "rhs"),
    ((16, 5, 4), (4, 16, 8), (4, 2, 8), (((0, 2), (1, 0)), ((), ())), "rhs"),
    ((3, 2, 32), (32, 12), (4, 12), (((0,), (2,)), ((), ())), "lhs"),
    ((8, 32), (32, 24), (4, 1), PLAIN, "rhs"),
]
LAST_LAYOUTS = [
    ((8, 64), (24, 64), (24, 4), LAST, "rhs"),
    ((5, 4, 16), (8, 4, 16), (8, 4, 2), (((1, 2), (1, 2)), ((), ())), "rhs"),
    ((3, 2, 32), (3, 4, 32), (3, 4, 1), (((2,), (2,)), ((), ())), "lhs"),
]


def multiply(k_minor, problem):
    """What any kernel is to compute, on whole matrices in float32."""

    def run(x, codes, scale, zero_point, x_scale=None, table=None, interpret=False):
        codes = codes.T if k_minor else codes
        assert codes.shape == (problem.code_rows, problem.n)
        if problem.codes == "int2":
            codes = packing.unpack(codes, 2, 0, problem.k)
        values = codes.astype(jnp.float32)
        if zero_point is not None:
            values = values - jnp.repeat(zero_point, problem.group, 0)
        values = values * jnp.repeat(scale, problem.group, 0)
        rows = x.astype(jnp.float32) * (1.0 if x_scale is None else x_scale)
        return rows @ values

    return run


@pytest.mark.parametrize("act", [None, ActQuant("int8", (1,))], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("layout", "k_minor"),
    [
        *((layout, k_minor) for layout in FIRST_LAYOUTS for k_minor in (False, True)),
        *((layout, True) for layout in LAST_LAYOUTS),  # the others do not take these: see below
    ],
    ids=lambda p: f"{p[1]}-{p[4]}" if isinstance(p, tuple) else "nk" if p else "kn",
)
def test_the_product_is_the_references(layout, k_minor, act):
    x_shape, w_shape, scale_shape, dims, side = layout
    axes = DotAxes.make(dims, len(x_shape), len(w_shape), side)
    act = act and dataclasses.replace(act, reduce_axes=tuple(sorted(axes.x_contract)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    codes = jnp.asarray(rng.integers(-8, 8, w_shape), jnp.int8).astype(jnp.int4)
    scale = jnp.asarray(rng.uniform(0.5, 2, scale_shape), jnp.float32)
    zero = jnp.asarray(rng.integers(-4, 5, scale_shape), jnp.int8)
    weight = Weight("int4", w_shape, scale_shape, zero_point=True)
    problem = flatten(x_shape, "float32", weight, axes, act, "float32", k_last=k_minor)
    kernel = Kernel("one", "it is asked for", multiply(k_minor, problem), k_minor=k_minor)
    product = MatrixProduct(problem, kernel, weight, axes, act)
    got = jax.jit(product)(x, None, codes, scale, zero, None)
    want = reference.dot_general(
        x, codes, scale, zero, dimension_numbers=dims, weight_side=side, act=act
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    # Codes that lie as the kernel wants them are not moved: prepared ones, and [n, k] by nature.
    assert product.moves_codes == (k_minor and layout in FIRST_LAYOUTS)
    ready = dataclasses.replace(product, weight=dataclasses.replace(weight, prepared=True))
    assert not ready.moves_codes


HEADS_FIRST = (((1, 2), (0, 1)), ((), ()))
HEADS_LAST = (((1, 2), (1, 2)), ((), ()))


@pytest.mark.parametrize(
    ("x_shape", "shape", "scale_shape", "packed_axis", "dims"),
    [
        ((8, 64), (64, 24), (4, 24), 0, PLAIN),
        ((8, 64), (24, 64), (24, 4), 1, LAST),
        ((8, 4, 16), (4, 16, 24), (4, 2, 24), 1, HEADS_FIRST),
        ((8, 4, 16), (24, 4, 16), (24, 4, 1), 2, HEADS_LAST),
    ],
)
def test_packed_codes_of_either_orientation(x_shape, shape, scale_shape, packed_axis, dims):
    rng = np.random.default_rng(0)
    values = rng.choice([-3, -1, 1, 3], shape).astype(np.int8)
    codes = packing.pack(jnp.asarray(values), 2, packed_axis)
    scale = jnp.asarray(rng.uniform(0.5, 2, scale_shape), jnp.float32)
    weight = Weight("int2", shape, scale_shape, packed_axis=packed_axis)
    axes = DotAxes.make(dims, len(x_shape), len(shape), "rhs")
    problem = flatten(x_shape, "float32", weight, axes, None, "float32", k_last=True)
    kernel = Kernel("one", "", multiply(True, problem), k_minor=True)
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    got = MatrixProduct(problem, kernel, weight, axes, None)(x, None, codes, scale, None, None)
    want = reference.dot_general(x, jnp.asarray(values), scale, dimension_numbers=dims)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("shape", "packed_axis", "reason"),
    [
        ((16, 4, 24), 0, "along another axis than the contracted one"),
        ((4, 12, 24), 1, "an axis of 12, which ends within a byte"),
    ],
)
def test_packed_codes_that_are_no_matrix_of_bytes(shape, packed_axis, reason):
    weight = Weight("int2", shape, (*shape[:2], 24), packed_axis=packed_axis)
    axes = DotAxes.make(HEADS_FIRST, 3, 3, "rhs")
    with pytest.raises(Unsupported, match=reason):
        flatten((8, *shape[:2]), "bfloat16", weight, axes, None, "bfloat16")


@pytest.mark.parametrize("layout", LAST_LAYOUTS, ids=lambda p: f"{p[1]}-{p[4]}")
def test_contracted_axes_that_come_last_need_a_kernel_that_takes_them(layout):
    x_shape, w_shape, scale_shape, dims, side = layout
    axes = DotAxes.make(dims, len(x_shape), len(w_shape), side)
    weight = Weight("int4", w_shape, scale_shape)
    with pytest.raises(Unsupported, match="are not its first: as a matrix it would have to be"):
        flatten(x_shape, "bfloat16", weight, axes, None, "bfloat16")
    middle = Weight("int4", (8, 32, 4), (8, 2, 4))
    axes = DotAxes.make((((1,), (1,)), ((), ())), 2, 3, "rhs")
    with pytest.raises(Unsupported, match="are not its first or last"):
        flatten((5, 32), "bfloat16", middle, axes, None, "bfloat16", k_last=True)
