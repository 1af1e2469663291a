"""The rewriter against dequantize-then-float, on every way a program can use its weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.qtensor import QTensor, is_qtensor
from jaxquant.frontends.function import transform
from jaxquant.passes.rewrite import StrictError
from tests.passes.zoo import CASES, K_N, Case, X, matmul, quantize_axes
from tests.passes.zoo import elementwise_use as elementwise_use_fn


def dequantized(tree):
    return jax.tree.map(lambda x: x.dequantize() if is_qtensor(x) else x, tree, is_leaf=is_qtensor)


def assert_close(actual, expected, tol=3e-5):
    def check(a, e):
        assert a.dtype == e.dtype and a.shape == e.shape
        scale = np.max(np.abs(np.asarray(e, np.float64)), initial=1e-6)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), atol=tol * scale, rtol=0
        )

    jax.tree.map(check, actual, expected)


def primitives_of(jaxpr) -> list[str]:
    found = []

    def walk(j):
        j = getattr(j, "jaxpr", j)
        for eqn in j.eqns:
            found.append(str(eqn.primitive))
            for value in eqn.params.values():
                for sub in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                        walk(sub)

    walk(jaxpr)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dequantize_then_float(case: Case):
    events = []
    qparams = case.quantized(case.params())
    fn = transform(case.fn, on_event=events.append)
    assert_close(
        fn(qparams, *case.inputs), case.fn(dequantized(qparams), *case.inputs), case.tolerance
    )
    paths = {e.path for e in events if e.action == "dequantized"}
    assert paths == set(case.dequantized)
    quantized = {name for e in events if e.action == "quantized" for name in e.path.split(",")}
    assert quantized >= set(case.axes) - set(case.dequantized)
    assert all(e.reason and e.source for e in events)


@pytest.mark.parametrize("case", [c for c in CASES if not c.dequantized], ids=str)
def test_float_products_with_weights_are_gone(case: Case):
    qparams = case.quantized(case.params())
    before = primitives_of(jax.make_jaxpr(case.fn)(case.params(), *case.inputs))
    after = primitives_of(jax.make_jaxpr(transform(case.fn))(qparams, *case.inputs))
    quantized = [p for p in after if p.startswith("quantized_") or p == "dequantize"]
    assert quantized
    products = ("dot_general", "conv_general_dilated", "ragged_dot_general")
    lost = sum(before.count(p) for p in products) - sum(after.count(p) for p in products)
    assert lost >= 1 or "gather" in after


@pytest.mark.parametrize("case", [c for c in CASES if c.has_gradient], ids=str)
def test_gradient_of_the_input(case: Case):
    """Also through remat, scan and custom rules: the user's own rule decides."""
    qparams = case.quantized(case.params())

    def loss(fn):
        def inner(x, tree):
            out = fn(tree, x, *case.inputs[1:])
            return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(out))

        return inner

    actual = jax.grad(loss(transform(case.fn)))(case.inputs[0], qparams)
    expected = jax.grad(loss(case.fn))(case.inputs[0], dequantized(qparams))
    assert_close(actual, expected, case.tolerance)


def test_float_call_is_the_function_itself():
    calls = []

    def fn(p, x):
        calls.append(type(p["w"]))
        return x @ p["w"]

    p = {"w": jnp.ones((8, 6))}
    np.testing.assert_array_equal(transform(fn)(p, X), X @ p["w"])
    assert calls[0] is type(p["w"])  # the array itself, no tracer: nothing was traced


def test_eager_calls_trace_once_per_signature():
    traces = []

    def fn(p, x, *, train, scale=1.0):
        traces.append((x.shape, train, scale))
        return (x @ p["w"]) * (scale if train else 1)

    quantized = transform(fn)
    q = {"w": quantize_axes(jnp.ones((8, 6)), (0,))}
    for _ in range(3):
        quantized(q, X, train=True)
    assert len(traces) == 1
    quantized(q, X, train=False)
    quantized(q, X[:2], train=False)
    assert len(traces) == 3
    quantized(q, X, train=1)  # equal to True and of the same hash, but another value
    assert len(traces) == 4


def test_float_quantized_float_in_one_process():
    p = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    q = {"w": quantize_axes(p["w"], (0,))}
    fn = jax.jit(transform(matmul))
    first, quantized, again = fn(p, X), fn(q, X), fn(p, X)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(quantized, jax.jit(transform(matmul))(q, X))
    np.testing.assert_array_equal(first, jax.jit(matmul)(p, X))


def test_unhashable_static_argument_still_works():
    def fn(p, x, options):
        return x @ p["w"] * options["s"].value

    class Box:
        __hash__ = None

        def __init__(self, value):
            self.value = value

    q = {"w": quantize_axes(jnp.ones((8, 6)), (0,))}
    out = transform(fn)(q, X, {"s": Box(2.0)})
    assert_close(out, 2 * (X @ q["w"].dequantize()))


def test_parameter_returned_unchanged_stays_quantized():
    q = {"w": quantize_axes(jnp.ones((8, 6)), (0,))}
    y, back = transform(lambda p, x: (x @ p["w"], p))(q, X)
    assert isinstance(back["w"], QTensor)
    np.testing.assert_array_equal(back["w"].codes, q["w"].codes)


def test_static_results_come_back():
    q = {"w": quantize_axes(jnp.ones((8, 6)), (0,))}
    out = transform(lambda p, x: {"y": x @ p["w"], "n": 3, "name": "a", "none": None})(q, X)
    assert (out["n"], out["name"], out["none"]) == (3, "a", None)


def test_strict_names_parameter_and_line():
    q = {"w": quantize_axes(jnp.ones(K_N["w"]), (0,))}
    with pytest.raises(StrictError, match=r"'w' would be dequantized at .*zoo.py.*tanh"):
        transform(elementwise_use_fn, strict=True)(q, X)


def test_vmap_of_the_transformed_function():
    q = {"w": quantize_axes(jax.random.normal(jax.random.key(0), (8, 6)), (0,))}
    xs = jax.random.normal(jax.random.key(1), (4, 5, 8))
    out = jax.vmap(transform(matmul), in_axes=(None, 0))(q, xs)
    assert_close(out, xs @ q["w"].dequantize())
    stacked = jax.tree.map(lambda a: jnp.stack([a, a, a, a]), q)
    out = jax.vmap(transform(matmul))(stacked, xs)
    assert_close(out, xs @ q["w"].dequantize())


def test_remat_policy_sees_a_quantized_dot_as_a_dot():
    """The policy saves the product, so the backward pass does not compute it again."""
    from jax.ad_checkpoint import print_saved_residuals  # noqa: F401  (documents the idea)

    q = {"w": quantize_axes(jax.random.normal(jax.random.key(0), (8, 8)), (0,))}

    def count(policy):
        @jax.checkpoint
        def plain(p, x):
            return jnp.sum(jnp.sin(jnp.sin(x @ p["w"]) @ p["w"]))

        block = jax.checkpoint(plain.__wrapped__, policy=policy)
        fn = transform(lambda p, x: block(p, x))
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: fn(q, x)))(X)
        return primitives_of(jaxpr).count("quantized_dot_general")

    everything = count(jax.checkpoint_policies.everything_saveable)
    nothing = count(jax.checkpoint_policies.nothing_saveable)
    dots = count(jax.checkpoint_policies.dots_saveable)
    assert nothing > dots
    assert dots == everything
