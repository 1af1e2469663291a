"""The numeric check of transforms is sharp whatever a model computes in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms.transforms.subject import Subject
from jaxquant.algorithms.transforms.unchanged import check_unchanged
from jaxquant.passes.fold_transforms import (
    FACT,
    FoldError,
    FoldTransforms,
    check_same,
    fold_parameters,
)
from jaxquant.passes.program import trace
from tests.passes.fold_zoo import gated_decoder, gated_params

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


def short(dtype):
    return jax.tree.map(lambda x: x.astype(dtype), gated_params())


def subject(params):
    paths = list(params)
    return Subject(gated_decoder, params, sorted(paths), ((TOKENS,), {}), "test")


def folded(params, wrong=1.0):
    """(subject, program, fold): random factors, of which one group's weights are off by `wrong`."""
    own = subject(params)
    rng = np.random.default_rng(0)
    step = FoldTransforms(lambda group: np.exp(0.5 * rng.normal(size=group.count)), "leave")
    program = step.run(own.program).program
    factors = dict(program.facts[FACT])
    factors["w"] = tuple(wrong * array for array in factors["w"])
    return own, program, functools.partial(fold_parameters, factors=factors)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_fold_that_is_right_passes(dtype):
    own, program, fold = folded(short(dtype))
    new = own.after(program, fold)
    assert new["w"].dtype == dtype
    assert not np.array_equal(new["w"], own.parameters["w"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_one_percent_is_caught(dtype):
    own, program, fold = folded(short(dtype), wrong=1.01)
    with pytest.raises(FoldError, match=r"test changed the function.*allowed is 1e-05"):
        own.after(program, fold)
    if dtype is not jnp.float32:  # in the model's own dtype it hides among what is rounded
        params = own.parameters
        outs = [jax.jit(gated_decoder)(p, TOKENS) for p in (params, {**params, **fold(params)})]
        check_same(*outs, tolerance=0.05, what="test")


def test_parameters_that_their_dtype_cannot_hold_are_caught():
    params, x = {"a": jnp.full((4, 4), 0.5, jnp.float16), "b": jnp.eye(4, dtype=jnp.float16)}, None
    x = jnp.ones((2, 4), jnp.float16)
    program = trace(lambda p, x: (x @ p["a"]) @ p["b"], params, (x,))

    def fold(p):
        return {"a": p["a"] * p["a"].dtype.type(2**-14) / 2**11, "b": p["b"] * 2**14 * 2.0**11}

    with pytest.raises(FoldError, match="rounded to the model's dtype"):
        check_unchanged(
            program, program, program.flatten(params, x), fold, tolerance=None, what="test"
        )


def test_public_functions_are_as_sharp_in_bfloat16():
    params = short(jnp.bfloat16)
    smoothed = jq.smooth(gated_decoder, params, calibration=[TOKENS])
    turned = jq.rotate(gated_decoder, params, TOKENS)
    for new in (smoothed, turned):
        assert new["w"].dtype == jnp.bfloat16 and not np.array_equal(new["w"], params["w"])
