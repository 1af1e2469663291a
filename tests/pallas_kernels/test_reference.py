import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.pallas_kernels import reference
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from tests.pallas_kernels import dot_oracle as oracle


def run(problem: oracle.Problem, act: ActQuant | None = None, **options):
    x, values, scale, zero_point, dims, side, _ = problem
    fn = functools.partial(
        reference.dot_general, dimension_numbers=dims, weight_side=side, act=act, **options
    )
    return jax.jit(fn)(x, values, scale, zero_point)


def fake_quantized(x, act):
    codes, scale = quantize_activation(jnp.asarray(x), act)
    return np.asarray(codes).astype(np.float64) * np.asarray(scale, np.float64)


@settings(max_examples=40, deadline=None)
@given(problem=oracle.problems())
def test_float_activations(problem):
    w = oracle.weight(problem.values, problem.scale, problem.zero_point)
    oracle.assert_close(run(problem), oracle.product(problem.x, w, problem))


@settings(max_examples=40, deadline=None)
@given(problem=oracle.problems(), per_tensor=st.booleans(), dtype=st.sampled_from(["int8", "float8_e4m3fn"]))  # fmt: skip
def test_quantized_activations(problem, per_tensor, dtype):
    axes = tuple(range(problem.x.ndim)) if per_tensor else problem.x_contract
    act = ActQuant(dtype, axes)
    w = oracle.weight(problem.values, problem.scale, problem.zero_point)
    want = oracle.product(fake_quantized(problem.x, act), w, problem)
    oracle.assert_close(run(problem, act), want)
