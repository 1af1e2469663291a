"""Products with batch axes: one kernel over all elements, by value, and when there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.primitives import quantized_dot_general
from jaxquant.core.quantize_array import quantize_array
from jaxquant.pallas_kernels import reference
from jaxquant.pallas_kernels.activation import ActQuant
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Place
from tests.core.primitives.spmd_world import close, kernels_on_cpu
from tests.pallas_kernels import test_dispatch

EXPERTS = (((2,), (1,)), ((0,), (0,)))
# x, weight, scale, dimension numbers, side: experts; two batch axes that x has last, in another
# order; x with no rows of its own; scales that all share; the weight on the left; two free axes.
LAYOUTS = [
    ((3, 8, 256), (3, 256, 96), (3, 4, 96), EXPERTS, "rhs"),
    ((256, 2, 3, 5), (3, 2, 256, 128), (3, 1, 2, 128), (((0,), (2,)), ((2, 1), (0, 1))), "rhs"),
    ((256, 2, 3, 5), (3, 2, 256, 128), (3, 2, 2, 128), (((0,), (2,)), ((1, 2), (1, 0))), "rhs"),
    ((3, 256), (3, 256, 96), (1, 4, 96), (((1,), (1,)), ((0,), (0,))), "rhs"),
    ((2, 128, 5), (2, 128, 48), (2, 4, 48), (((1,), (1,)), ((0,), (0,))), "lhs"),
    ((2, 5, 128), (2, 128, 3, 32), (2, 2, 3, 32), EXPERTS, "rhs"),
]


V6E = Place("tpu", "TPU v6 lite")
pick = functools.partial(test_dispatch.pick, dims=EXPERTS, place=V6E)


@pytest.mark.parametrize("act", [None, ActQuant("int8", ())], ids=["float", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda p: f"{p[1]}-{p[2]}-{p[4]}")
def test_the_kernel_is_the_reference(layout, act):
    choice = test_dispatch.agrees_with_the_reference(layout, act, True, V6E)
    assert choice.name == "pallas tpu v6e: int4, scale after the dot", choice
    assert "mapped over batch axes" in choice.reason


def test_a_static_scale_for_each_element():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 128)), jnp.bfloat16)
    codes, scale = jnp.ones((2, 128, 32), jnp.int4), jnp.ones((2, 2, 32), jnp.float32)
    given = jnp.asarray([0.02, 0.05], jnp.float32).reshape(2, 1, 1)
    act = ActQuant("int8", (1, 2), static=True)
    choice = pick((2, 8, 128), Weight("int4", (2, 128, 32), (2, 2, 32)), act=act)
    got = choice.run(x, None, codes, scale, None, given, interpret=True)
    want = reference.dot_general(x, codes, scale, None, given, dimension_numbers=EXPERTS, act=act)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("qtype", "experts", "m"),
    [("int4", 3, 5), ("int8", 1, 33), ("int2", 2, 1), ("int3", 2, 8), ("float8_e4m3", 2, 16)],
)
def test_a_mapped_product_and_its_gradient(monkeypatch, qtype, experts, m):
    problems = kernels_on_cpu(monkeypatch, interpret=True)
    keys = jax.random.split(jax.random.key(0), 3)
    w = quantize_array(jax.random.normal(keys[0], (experts, 256, 128)), qtype, (1, 64, 1))
    w = w.replace(dtype=jnp.dtype("bfloat16"))
    x = jax.random.normal(keys[1], (experts, m, 256), jnp.bfloat16)
    y = jax.random.normal(keys[2], (experts, m, 128), jnp.float32)

    def mapped(x, w):
        dims = (((1,), (0,)), ((), ()))
        return jax.vmap(
            lambda x, w: quantized_dot_general(x, w, dims, preferred_element_type=jnp.float32)
        )(x, w)

    def pulled(x, w):
        value, pull = jax.vjp(lambda x: mapped(x, w), x)
        return value, pull(y)[0]

    got, back = jax.jit(pulled)(x, w)
    jax.clear_caches()
    transposed = qtype not in ("int2", "int3")  # of those XLA's route
    assert [(p.m, p.k, p.n) for p in problems] == [(m, 256, 128)] * (1 + transposed)
    weight = np.asarray(w.dequantize(), np.float64)
    close(got, np.asarray(x, np.float64) @ weight, rtol=1e-2)
    close(back.astype(jnp.float32), np.asarray(y, np.float64) @ weight.swapaxes(1, 2), rtol=1e-2)


GROUPED = Weight("int4", (3, 256, 128), (3, 4, 128))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": Weight("int4", (4, 256, 128), (2, 4, 128))}, "blocks along batch axis 0"),
        (
            {
                "weight": Weight("int4", (256, 3, 128), (4, 3, 128)),
                "dims": (((2,), (0,)), ((0,), (1,))),
            },
            "batch axes (1,) of the weight are not its first",
        ),
        ({"weight": Weight("int4", (3, 256, 128), (3, 1, 128))}, "XLA fuses the conversion"),
        ({"place": Place("cuda", "NVIDIA H200")}, "pallas cuda: "),
    ],
)
def test_why_not(change, reason):
    weight = change.get("weight", GROUPED)
    choice = pick(**({"x_shape": (weight.shape[0], 8, 256), "weight": weight} | change))
    assert choice.name == "xla" and reason in choice.reason


def test_the_program_for_tpu_has_one_kernel():
    """Of all experts, and none of the codes are converted outside of it."""
    choice = pick((3, 8, 256), GROUPED)
    arrays = [
        jax.ShapeDtypeStruct((3, 8, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((3, 256, 128), jnp.int4),
        jax.ShapeDtypeStruct((3, 4, 128), jnp.float32),
    ]
    jaxpr = jax.make_jaxpr(lambda x, w, s: choice.run(x, None, w, s, None, None))(*arrays)
    (call,) = [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
    assert call.params["grid_mapping"].grid[0] == 3
    outside = {eqn.primitive.name for eqn in jaxpr.eqns} - {"pallas_call"}
    assert not outside & {"dot_general", "convert_element_type"}
