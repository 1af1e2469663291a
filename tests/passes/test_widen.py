"""A program in wider floats is the program on float32 parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core.primitives import dot_general_p

from jaxquant.passes.program import trace
from jaxquant.passes.widen import wide_array, widened
from tests.passes.fold_zoo import Encoder

W = jax.random.normal(jax.random.key(0), (6, 6)).astype(jnp.bfloat16)
X = jax.random.normal(jax.random.key(1), (3, 6)).astype(jnp.bfloat16)


def run(fn, *args):
    program = trace(fn, args[0], args[1:])
    jaxpr = widened(program)
    outs = jax.jit(jaxpr_as_fun(jaxpr))(*map(wide_array, program.flatten(*args)))
    return jaxpr, outs


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0]))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))


def scanned(w, x):
    def step(x, w):
        y = jnp.dot(x, w, preferred_element_type=jnp.float32)
        return y.astype(x.dtype), x.sum()

    x, sums = lax.scan(step, x, jnp.stack([w, w.T]) / 3)
    return x, sums


def looped(w, x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ w / 3), (0, x))[1]


def branched(w, x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: -x @ w.T, x)


def remade(w, x):
    return jax.checkpoint(lambda x: jax.jit(jnp.tanh)(doubled(clipped(x @ w))))(x)


def counted(w, x):
    return lax.conv_general_dilated(x[:, :, None], w[:3, :, None], (1,), "SAME",
                                    dimension_numbers=("NWC", "WOI", "NWC"))  # fmt: skip


@pytest.mark.parametrize("fn", [scanned, looped, branched, remade, counted])
def test_it_is_the_function_in_float32(fn):
    jaxpr, outs = run(fn, W, X)
    assert "bf16" not in str(jaxpr)
    with jax.default_matmul_precision("highest"):
        want = jax.tree.leaves(fn(W.astype(jnp.float32), X.astype(jnp.float32)))
    for got, right in zip(outs, want, strict=True):
        np.testing.assert_allclose(got, right, rtol=2e-5, atol=1e-6)


def test_a_flax_model_and_float32_stay_what_they_are():
    x = jax.random.normal(jax.random.key(2), (2, 3, 16))
    model = Encoder()
    variables = model.init(jax.random.key(0), x)
    _, (got,) = run(model.apply, variables, x)
    np.testing.assert_allclose(got, model.apply(variables, x), rtol=1e-5, atol=1e-5)


def test_products_are_of_the_highest_precision():
    jaxpr, _ = run(lambda w, x: x @ w, W, X)
    (eqn,) = [e for e in jaxpr.jaxpr.eqns if e.primitive is dot_general_p]
    assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2


def test_what_cannot_be_widened_runs_as_it_is():
    def bits(w, x):
        return lax.bitcast_convert_type(x, jnp.int16), jax.pure_callback(
            lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x @ w
        )

    jaxpr, (as_int, called) = run(bits, W, X)
    np.testing.assert_array_equal(as_int, lax.bitcast_convert_type(X, jnp.int16))
    assert called.dtype == jnp.float32
    np.testing.assert_allclose(called, (X @ W).astype(jnp.float32), rtol=2e-2, atol=2e-2)
