"""silu(x @ gate) * (x @ up) in one launch: by value, its configs, and lowered for every chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.gated import choose_gated_config, gated_matmul
from tests.pallas_kernels.tpu import cases

INT4 = MatmulProblem(20, 256, 384, "int4", group=64, out_dtype="float32")


def check(problem, config, interpret=True):
    gate, up = (cases.make(problem, seed) for seed in (0, 1))
    x, factors = gate.arrays["x"], gate.arrays.get("x_scale")
    rows = np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)
    rows = rows * (1 if factors is None else factors.astype(np.float64))
    # A gate opens within a few units: values of 8 at most.
    factor = np.float32(2.0 ** -np.ceil(np.log2(np.abs(rows @ gate.weight).max() / 8)))
    for case in (gate, up):
        case.arrays["scale"] *= factor
    parts = [tuple(c.arrays.get(n) for n in ("codes", "scale", "zero_point")) for c in (gate, up)]

    biases = [c.arrays.get("bias") for c in (gate, up)]

    def fn(x, gate, up):
        return gated_matmul(
            x,
            gate,
            up,
            problem=problem,
            config=config,
            biases=tuple(biases) if problem.bias else None,
            x_scale=factors,
            table=case.arrays.get("table"),
            interpret=interpret,
        )

    got = np.asarray(jax.jit(fn)(x, *parts), np.float64)
    (a, a_reach), (b, b_reach) = (
        (rows @ w + (bias if problem.bias else 0), np.abs(rows) @ np.abs(w))
        for w, bias in zip((factor * gate.weight, factor * up.weight), biases, strict=True)
    )
    want = a / (1 + np.exp(-a)) * b
    tolerance = 2.0**-8 if config.scale == "before" else 1e-5
    # The slope of silu is at most 1.1.
    bound = tolerance * (1.1 * a_reach * (np.abs(b) + tolerance * b_reach) + np.abs(a) * b_reach)
    assert (np.abs(got - want) <= bound + 1e-6).all()


@settings(max_examples=6)
@given(
    m=st.sampled_from([1, 20, 130]),
    n=st.sampled_from([128, 384]),
    codes=st.sampled_from(["int4", "int8", "int2", "table4"]),
    x_dtype=st.sampled_from(["bfloat16", "int8"]),
    zero_point=st.booleans(),
    bias=st.booleans(),
    chip=st.sampled_from(sorted(CHIPS)),
)
def test_chosen_configs(m, n, codes, x_dtype, zero_point, bias, chip):
    table = codes == "table4"
    problem = dataclasses.replace(
        INT4,
        m=m,
        n=n,
        codes=codes,
        x_dtype=x_dtype,
        zero_point=zero_point and not table,
        bias=bias,
        e2m1=table,
    )
    problem = dataclasses.replace(problem, x_scale=x_dtype == "int8")
    check(problem, choose_gated_config(problem, CHIPS[chip]))


@pytest.mark.parametrize("scale", ["after", "before"])
def test_no_races(scale, capfd):
    """Two blocks of rows by three of columns: the gate's sums are those of the step."""
    config = MatmulConfig(16, 128, 256, scale, "cast")
    check(INT4, config, pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out


def test_what_is_refused():
    deep = dataclasses.replace(INT4, k=65536)
    with pytest.raises(Unsupported, match="two weights with k = 65536"):
        choose_gated_config(deep, CHIPS["v4"])
    case = cases.make(INT4)
    parts = case.arrays["codes"], case.arrays["scale"], None
    for problem, config in (
        (INT4, MatmulConfig(16, 128, 128, "after", "cast")),
        (dataclasses.replace(INT4, residual=True), MatmulConfig(16, 128, 256, "after", "cast")),
    ):
        with pytest.raises(ValueError, match="all of k is one block"):
            gated_matmul(case.arrays["x"], parts, parts, problem=problem, config=config)


@pytest.mark.parametrize("m", [16, 1024])
def test_both_weights_fit(m):
    """At the shapes of a model, by blocks of fewer columns where both do not."""
    problem = MatmulProblem(m, 4096, 14336, "int4", group=128)
    for chip in CHIPS.values():
        if (chip.name, m) == ("v4", 1024):
            continue  # 16 MiB: all of k is no block of many rows
        config = choose_gated_config(problem, chip)
        assert config.bk == 4096 and not config.stream and 14336 % config.bn == 0
