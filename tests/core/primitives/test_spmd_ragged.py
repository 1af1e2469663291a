"""Rows grouped by expert on 8 devices: experts, their columns, what is summed, and rows split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxquant.core.primitives import quantized_ragged_dot
from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from jaxquant.frontends.function import transform
from jaxquant.pallas_kernels import dispatch, ragged_dispatch
from jaxquant.pallas_kernels.activation import ActQuant, quantize_activation
from jaxquant.pallas_kernels.as_matrix import Kernel
from tests.core.primitives.spmd_world import (
    AUTO,
    EXPLICIT,
    close,
    collectives,
    kernels_on_cpu,
    mesh_of,
    place,
    place_weight,
)

X = jax.random.normal(jax.random.key(0), (24, 32))
W = jax.random.normal(jax.random.key(1), (8, 32, 16))
# Rows behind the last group, empty groups, all rows in one of the last.
SIZES = [[3, 0, 5, 1, 4, 2, 0, 6], [0, 0, 0, 0, 0, 0, 24, 0], [3] * 8, [0] * 8]


@pytest.fixture
def problems(monkeypatch):
    noted = []

    def select(problem, device_kind, forced):
        noted.append(problem)

        def multiply(x, codes, scale, zero_point, *, group_sizes, x_scale, table, interpret):
            group = problem.product.group
            w = codes.astype(jnp.float32) * jnp.repeat(scale, group, axis=1)
            out = jax.lax.ragged_dot(x.astype(jnp.float32), w, group_sizes)
            out = jnp.where(jnp.arange(len(x))[:, None] < group_sizes.sum(), out, 0)
            return out if x_scale is None else out * x_scale

        return Kernel("ragged on cpu", "this is a test", multiply)

    kernels_on_cpu(monkeypatch)
    monkeypatch.setitem(ragged_dispatch.SELECT, "cpu", select)
    assert "cpu" in dispatch.PLATFORMS
    yield noted
    jax.clear_caches()


def exact(x, w, sizes):
    x, w = np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64)
    out, row = np.zeros((len(x), w.shape[2])), 0
    for expert, size in enumerate(sizes):
        out[row : row + size] = x[row : row + size] @ w[expert]
        row += size
    return out


SPLITS = {
    "experts": (P("model", None, None), (12, 32, 16, 2), ["all-reduce"]),
    "columns": (P(None, None, "model"), (12, 32, 4, 8), []),
    "contracted": (P(None, "model", None), (12, 8, 16, 8), ["all-reduce"]),
    "all of it": (P(("data", "model"), None, None), (24, 32, 16, 1), None),
    "two ways": (P("data", None, "model"), (24, 32, 4, 4), None),
}


@pytest.mark.parametrize("how", SPLITS)
def test_values_and_gradient(problems, how):
    spec, own, moved = SPLITS[how]
    mesh, w = mesh_of(AUTO), quantize_array(W, "int4", (1, 8, 1))
    with jax.set_mesh(mesh):
        x, placed = place(X, mesh, P("data", None)), place_weight(w, mesh, spec)
        fn = jax.jit(quantized_ragged_dot)
        for sizes in SIZES:
            close(fn(x, placed, jnp.array(sizes)), exact(X, w, sizes) + 0.0)
        grad = jax.jit(jax.grad(lambda x, *rest: quantized_ragged_dot(x, *rest).sum()))
        got = grad(x, placed, jnp.array(SIZES[0]))
        back = grad.lower(x, placed, jnp.array(SIZES[0])).compile().as_text()
        found = collectives(quantized_ragged_dot, x, placed, jnp.array(SIZES[0]))
    owner = np.repeat(np.arange(8), SIZES[0])
    want = np.zeros(X.shape)
    want[: len(owner)] = np.asarray(w.dequantize(), np.float64).sum(2)[owner]
    close(got, want)
    p = problems[0].product
    assert (p.m, p.k, p.n, problems[0].experts) == own
    if moved is not None:
        assert list(found) == moved
    # No expert is gathered, in codes or in floats: [experts, ...] has three axes, rows have two.
    assert re.findall(r"\[\d+,\d+,\d+\]\S* all-gather", back) == []


@pytest.mark.parametrize("spec", [P("model", None, None), P(None, "model", None)], ids=str)
def test_rows_are_quantized_as_if_they_were_whole(problems, spec):
    mesh, w = mesh_of(AUTO), quantize_array(W, "int4", (1, 8, 1)).replace(act=ActScheme())
    codes, scale = quantize_activation(X, ActQuant("int8", (1,)))
    with jax.set_mesh(mesh):
        x, placed = place(X, mesh, P("data", None)), place_weight(w, mesh, spec)
        got = jax.jit(quantized_ragged_dot)(x, placed, jnp.array(SIZES[0]))
    floats = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
    close(got, exact(floats, w, SIZES[0]))
    assert problems[0].product.x_dtype == "int8"


def test_without_a_record_it_is_the_partitioners(problems):
    mesh, w = mesh_of(AUTO), quantize_array(W, "int4", (1, 8, 1))
    with jax.set_mesh(mesh):
        placed = place_weight(w, mesh, P("model", None, None)).replace(mesh_layout=None)
        x, sizes = place(X, mesh, P("data", None)), jnp.array(SIZES[0])
        close(jax.jit(quantized_ragged_dot)(x, placed, sizes), exact(X, w, SIZES[0]))
        forced = jax.jit(lambda *a: quantized_ragged_dot(*a, implementation="pallas"))
        with pytest.raises(ValueError, match=r"jaxquant\.with_shardings"):
            forced(x, placed, sizes)
    assert problems == []


def test_xlas_operations_are_wrapped_too(problems, monkeypatch):
    """Where no kernel fits; its partitioner would gather the dequantized experts."""
    monkeypatch.delitem(ragged_dispatch.SELECT, "cpu")
    mesh, w = mesh_of(AUTO), quantize_array(W, "int3", (1, 8, 1))
    with jax.set_mesh(mesh):
        x, sizes = place(X, mesh, P("data", None)), jnp.array(SIZES[0])
        for spec in (P("model", None, None), P(None, "model", None), P(None, None, "model")):
            placed = place_weight(w, mesh, spec)
            fn = jax.jit(lambda *a: quantized_ragged_dot(*a))
            close(fn(x, placed, sizes), exact(X, w, SIZES[0]))
            text = fn.lower(x, placed, sizes).compile().as_text()
            assert "all-gather" not in text
    assert problems == []


@pytest.mark.parametrize("out", [P(None, None), P("data", None), P(None, "model")], ids=str)
@pytest.mark.parametrize("how", ["experts", "columns", "contracted"])
def test_an_explicit_mesh(problems, how, out):
    """The types of the arrays are the record; JAX asks for the sharding of the result."""
    spec, _, _ = SPLITS[how]
    mesh, w = mesh_of(EXPLICIT), quantize_array(W, "int4", (1, 8, 1))
    fn = transform(lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes, out_sharding=out))
    with jax.set_mesh(mesh):
        x, placed = place(X, mesh, P("data", None)), place_weight(w, mesh, spec)
        got = jax.jit(fn)({"w": placed}, x, jnp.array(SIZES[0]))
    assert got.sharding.spec == out
    close(got, exact(X, w, SIZES[0]))
    assert problems
