"""Several weights with one x in one launch: by value, joined by dispatch, lowered for TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxquant.core.primitives.dots import bind_dots
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import get_qtype
from jaxquant.pallas_kernels.as_matrix import Weight
from jaxquant.pallas_kernels.dispatch import Place, choose
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.pallas_kernels.problem import MatmulProblem, Unsupported
from jaxquant.pallas_kernels.siblings import SiblingProducts, join
from jaxquant.pallas_kernels.tpu.chips import CHIPS
from jaxquant.pallas_kernels.tpu.config import MatmulConfig
from jaxquant.pallas_kernels.tpu.siblings import choose_sibling_config, sibling_matmuls
from tests.pallas_kernels.tpu import cases

DIMS = (((1,), (0,)), ((), ()))
V5E = Place("tpu", "TPU v5 lite")


def check(problems, config, seed=0, interpret=True, cores=1):
    each = [cases.make(p, seed + i) for i, p in enumerate(problems)]
    x = each[0].arrays["x"]
    factors = each[0].arrays.get("x_scale")

    def fn(x, parts):
        return sibling_matmuls(
            x,
            *parts,
            problems=problems,
            config=config,
            cores=cores,
            x_scale=factors,
            table=each[0].arrays.get("table"),
            interpret=interpret,
        )

    parts = [[c.arrays.get(n) for c in each] for n in ("codes", "scale", "zero_point")]
    outs = jax.jit(fn)(x, parts)
    rows = np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)
    rows = rows * (1 if factors is None else factors.astype(np.float64))
    for case, out in zip(each, outs, strict=True):
        want, reach = rows @ case.weight, np.abs(rows) @ np.abs(case.weight)
        own = case._replace(want=want, scale_of_errors=reach)
        cases.assert_close(out, own, config)


@settings(max_examples=10)
@given(
    m=st.sampled_from([1, 20, 130]),
    columns=st.lists(st.sampled_from([256, 300, 384, 512]), min_size=2, max_size=3),
    codes=st.sampled_from(["int4", "int8", "int2"]),
    x_dtype=st.sampled_from(["bfloat16", "int8"]),
    zero_point=st.booleans(),
    chip=st.sampled_from(sorted(CHIPS)),
)
def test_chosen_configs(m, columns, codes, x_dtype, zero_point, chip):
    if codes == "int2":
        columns = [n // 128 * 128 for n in columns]
    problem = MatmulProblem(
        m, 256, 128, codes, x_dtype, 64, zero_point, x_dtype == "int8", out_dtype="float32"
    )
    problems = tuple(dataclasses.replace(problem, n=n) for n in columns)
    check(problems, choose_sibling_config(problems, CHIPS[chip]), cores=CHIPS[chip].cores)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("bk", [128, 256])
def test_no_races(bk, cores, capfd):
    """Several blocks of rows, columns and contracted values, each written and read in turn."""
    problem = MatmulProblem(40, 256, 256, "int4", group=64, out_dtype="float32")
    problems = (problem, dataclasses.replace(problem, n=128 * cores), problem)
    config = MatmulConfig(16, 128, bk, "after", "cast")
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    check(problems, config, interpret=params, cores=cores)
    assert "RACE DETECTED" not in capfd.readouterr().out


def pick(n, codes="int4", groups=4, place=V5E, **options):
    weight = Weight(codes, (256, n), (groups, n))
    axes = DotAxes.make(DIMS, 2, 2, "rhs")
    options = {"out_dtype": "float32"} | options
    return choose((8, 256), "bfloat16", weight, axes, None, place, **options).run


def test_what_is_joined():
    runs = [pick(256), pick(128), pick(128)]
    assert isinstance(join(runs), SiblingProducts)
    assert "not all of them are a kernel's" in join(runs[:1])
    assert "not all of them are a kernel's" in join([pick(256), None])  # one is XLA's
    assert "differ in more than their columns" in join([pick(256), pick(128, groups=2)])
    assert "differ in more than their columns" in join([pick(256), pick(128, "int8")])
    v5p = Place("tpu", "TPU v5")
    assert isinstance(join([pick(256, place=v5p), pick(512, place=v5p)]), SiblingProducts)
    assert "at least 256 share blocks" in join([pick(256, place=v5p), pick(128, place=v5p)])
    lone = dataclasses.replace(runs[0], kernel=dataclasses.replace(runs[0].kernel, together=None))
    assert "take one weight each" in join([lone, lone])
    problem = MatmulProblem(8, 256, 128, "int4", group=64)
    with pytest.raises(Unsupported, match="a weight of 96 columns"):
        choose_sibling_config([problem, dataclasses.replace(problem, n=96)], CHIPS["v5e"])


def test_joined_products_are_those_apart():
    rng = np.random.default_rng(0)
    runs = [pick(256), pick(128)]
    x = jnp.asarray(rng.normal(size=(8, 256)), jnp.bfloat16)
    weights = [
        (
            jnp.asarray(rng.integers(-8, 8, (256, n)), jnp.int4),
            jnp.asarray(rng.uniform(0.5, 2, (4, n)), jnp.float32),
            None,
        )
        for n in (256, 128)
    ]
    joined = join(runs)
    got = jax.jit(lambda x, w: joined(x, None, w, interpret=True))(x, weights)
    for run, out, parts in zip(runs, got, weights, strict=True):
        want = jax.jit(lambda x, w, run=run: run(x, None, *w, None, interpret=True))(x, parts)
        np.testing.assert_allclose(np.asarray(out), np.asarray(want), rtol=1e-5, atol=1e-4)


def test_the_primitive_is_one_launch():
    struct = jax.ShapeDtypeStruct
    weights = tuple(
        QTensor(
            struct((256, n), jnp.dtype("int4")),
            struct((4, n), jnp.float32),
            qtype=get_qtype("int4"),
        )
        for n in (256, 128, 128)
    )

    def fn(x, weights):
        return bind_dots(
            x,
            weights,
            act=None,
            dimension_numbers=DIMS,
            weight_side="rhs",
            precision=None,
            preferred_element_type=None,
            out_shardings=(None,) * 3,
        )

    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(fn).trace(struct((8, 256), jnp.float32), weights)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
