"""elide_roundtrips: codes at hand are used; bit-equal, or within the bound that is stated."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as jp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.quantize_array import quantize_array
from jaxquant.core.schemes import ActScheme
from jaxquant.passes.count import count
from jaxquant.passes.elide_roundtrips import ElideRoundtrips
from jaxquant.passes.fuse_siblings import FuseSiblings
from jaxquant.passes.pass_manager import PassManager
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import (
    DYNAMIC,
    apply,
    assert_same,
    gradient,
    quantized,
    run,
    run_and_gradient,
    weight,
)
from tests.passes.zoo import CASES

X = jax.random.normal(jax.random.key(9), (2, 6, 16))
SHARE, ELIDE = ShareActivationQuant(), ElideRoundtrips()
TREE = {"a": weight(0, 16, 8), "b": weight(1, 16, 8), "h": weight(2, 16, 4)}


def quantizations(program):
    return count(program.jaxpr).quantizations


def check(fn, tree, *args, before, after):
    """Quantizations before and after; values and gradients bit-equal."""
    program, inputs = quantized(fn, tree, *args)
    shared = apply(program, SHARE)
    elided = apply(shared, ELIDE)
    assert (quantizations(shared), quantizations(elided)) == (before, after)
    assert_same(run_and_gradient(elided, inputs), run_and_gradient(program, inputs))
    return elided


# -- parts of what is quantized ------------------------------------------------------------------

PARTS = {
    "the last token has a head": lambda p, x: [x @ p["a"], x[:, -1] @ p["h"]],
    "the part comes first": lambda p, x: [x[:, 2:4] @ p["h"], x @ p["a"]],
    "a token by number": lambda p, x: [
        x @ p["a"],
        jax.lax.dynamic_slice_in_dim(x, jnp.int32(x[0, 0, 0] > 0), 2, axis=1) @ p["h"],
    ],
    "shifted tokens": lambda p, x: [
        x @ p["a"],
        x[:, 1:].reshape(10, 16) @ p["b"],
        jnp.einsum("tbd,dn->btn", jnp.swapaxes(x, 0, 1)[:-1], p["h"]),
    ],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_takes_its_codes(name):
    count_before = 3 if name == "shifted tokens" else 2
    check(PARTS[name], TREE, X, before=count_before, after=1)


WHOLE_RANGES = {
    "a slice of what is contracted": (DYNAMIC, lambda p, x: [x @ p["a"], x[..., :8] @ p["h"][:8]]),
    "a slice of one range": (
        ActScheme(granularity="tensor"),
        lambda p, x: [x @ p["a"], x[:, -1] @ p["h"]],
    ),
    "arithmetic": (DYNAMIC, lambda p, x: [x @ p["a"], jnp.tanh(x) @ p["h"]]),
}


@pytest.mark.parametrize("name", WHOLE_RANGES)
def test_a_part_with_a_range_of_its_own_is_quantized(name):
    act, fn = WHOLE_RANGES[name]
    tree = {key: w.replace(act=act) for key, w in TREE.items()}
    check(fn, tree, X, before=2, after=2)


def test_codes_that_leave_a_quantized_product():
    """One product's output, in two forms, is quantized once for the products behind it."""

    def fn(p, x):
        y = x @ p["wide"]  # [2, 6, 16]
        heads = y.reshape(2, 6, 4, 4).swapaxes(1, 2)
        return [y @ p["a"], jnp.einsum("bhtc,hcn->btn", heads, p["b4"]), y[:, 0] @ p["h"]]

    tree = {**TREE, "wide": weight(3, 16, 16), "b4": weight(4, 4, 4, 8, axes=(0, 1))}
    check(fn, tree, X, before=3, after=2)


def test_in_bodies():
    def fn(p, x):
        def step(x, w):
            y = jax.checkpoint(lambda x: jnp.tanh(x @ w) + (x[:, :1] @ w))(x)
            return y, y[:, -1]

        return jax.lax.scan(step, x, p["w"])

    tree = {"w": weight(5, 3, 16, 16, axes=(1,))}
    program, inputs = quantized(fn, tree, X)
    elided = apply(program, SHARE, ELIDE, FuseSiblings())
    assert (quantizations(program), quantizations(elided)) == (6, 3)
    assert_same(run(elided, inputs), run(program, inputs))
    np.testing.assert_allclose(
        gradient(elided, inputs)[0], gradient(program, inputs)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_of_using_a_weight(case):
    tree = {
        name: w.replace(act=DYNAMIC) if name in case.axes else w
        for name, w in case.quantized(case.params()).items()
    }
    program, inputs = quantized(case.fn, tree, *case.inputs)
    shared = apply(program, SHARE)
    elided = apply(shared, ELIDE)
    fired = {"lookup_times_weight", "cond_returns_the_weight"}
    assert (elided is not shared) == (case.name in fired)
    fused = apply(elided, FuseSiblings())
    for got, want in zip(run(fused, inputs), run(program, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# -- activations that are codes and scale ----------------------------------------------------------


def embed(key, *shape, largest=127, qtype="int8"):
    """A table with one scale a row, whose largest code is ``largest``."""
    w = quantize_array(jax.random.normal(jax.random.key(key), shape), qtype, (1, shape[1]))
    codes = w.codes.astype(jnp.int32)
    if largest != 127:
        codes = jnp.clip(codes, -largest, largest)
    return w.replace(codes=codes.astype(w.codes.dtype))


IDS = jnp.array([[1, 4, 2], [0, 3, 9]])


def factorized(p, ids):
    """An embedding of few features, projected to many (Lan et al. 2019, arXiv:1909.11942)."""
    return jnp.take(p["e"], ids, axis=0) @ p["a"]


def exact(p, x):
    """The product of the values that codes and scales stand for, in float64."""
    e, a = (np.asarray(w.codes, np.float64) * np.asarray(w.scale, np.float64) for w in (x, p))
    return e @ a


@pytest.mark.parametrize("largest", [127, 90, 7])
@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_rows_of_a_quantized_embedding(largest, qtype):
    tree = {"e": embed(6, 10, 16, largest=largest, qtype=qtype), "a": TREE["a"]}
    program, inputs = quantized(factorized, tree, IDS)
    elided = apply(program, SHARE, ELIDE)
    assert (quantizations(program), quantizations(elided)) == (1, 0)
    got, before = run(elided, inputs)[0], run(program, inputs)[0]
    want = exact(tree["a"], tree["e"])[np.asarray(IDS)]
    magnitudes = np.abs(np.asarray(tree["a"].dequantize())).sum(0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    rows = np.asarray(tree["e"].dequantize())[np.asarray(IDS)]
    half_a_step = np.abs(rows).max(-1, keepdims=True) / 127 / 2
    assert (np.abs(np.asarray(before) - got) <= half_a_step * magnitudes * 1.001 + 1e-6).all()
    if largest == 127 and qtype == "int8":  # the same codes; scales within 4 ulp
        np.testing.assert_allclose(got, before, rtol=4 * 2**-23, atol=0)
    else:
        assert np.abs(got - want).max() < np.abs(before - want).max()


def test_an_activation_that_is_a_qtensor():
    x = quantize_array(X, "int8", (1, 1, 16))
    fn = lambda p, x: [jnp.swapaxes(x, 0, 1) @ p["a"], x[:, -1] @ p["h"]]  # noqa: E731
    program, inputs = quantized(fn, TREE, x)
    elided = apply(program, SHARE, ELIDE)
    assert (quantizations(program), quantizations(elided)) == (2, 0)
    for got, before in zip(run(elided, inputs), run(program, inputs), strict=True):
        np.testing.assert_allclose(got, before, rtol=4 * 2**-23)
    (note, _) = ELIDE.run(SHARE.run(program).program).notes
    assert "is what codes and scales stand for" in note


KEPT = {
    "a static scale": {"a": TREE["a"].replace(
        act=ActScheme(mode="static"), input_scale=jnp.full((1, 1), 0.02))},
    "8-bit floats": {"a": TREE["a"].replace(act=ActScheme("float8_e4m3"))},
    "a scale per block": {"e": quantize_array(jnp.ones((10, 16)), "int8", (1, 4))},
    "a zero point": {"e": quantize_array(jnp.ones((10, 16)), "int8", (1, 16), symmetric=False)},
    "a table": {"e": quantize_array(jnp.ones((10, 16)), "nf4", (1, 16))},
    "bfloat16": {"e": embed(6, 10, 16).replace(dtype=np.dtype(jnp.bfloat16))},
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_is_quantized_again(name):
    tree = {"e": embed(6, 10, 16), "a": TREE["a"], **KEPT[name]}
    program, inputs = quantized(factorized, tree, IDS)
    elided = apply(program, SHARE, ELIDE)
    assert quantizations(elided) == 1
    assert_same(run(elided, inputs), run(program, inputs))


# -- weights that were dequantized for a product only ----------------------------------------------


def switched(p, x):
    """One of two experts, chosen as a value."""
    w = jax.lax.cond(x[0, 0, 0] > 0, lambda: p["a"], lambda: p["b"])
    return x @ w


def test_a_weight_that_a_cond_chose_leaves_it_as_codes():
    program, inputs = quantized(switched, TREE, X)
    elided = apply(program, SHARE, ELIDE)
    before, after = (count(p.jaxpr).primitives for p in (program, elided))
    assert (before["dequantize"], before["dot_general"]) == (1, 1)
    assert (after.get("dequantize"), after.get("dot_general")) == (None, None)
    assert after["quantized_dot_general"] == 1
    (cond,) = (e for e in elided.jaxpr.jaxpr.eqns if e.primitive is jp.cond_p)
    assert [v.aval.str_short() for v in cond.outvars] == ["int8[16,8]", "float32[1,8]"]
    for x in (X, -X):
        inputs[-1] = x
        weights = TREE["a" if x[0, 0, 0] > 0 else "b"]
        floats = np.asarray(weights.dequantize(), np.float64)
        terms = np.abs(np.asarray(x)) @ np.abs(floats)
        bound = (16 + 2) * 2**-23 * terms
        got, want = run(elided, inputs)[0], run(program, inputs)[0]
        assert (np.abs(np.asarray(got, np.float64) - np.asarray(x, np.float64) @ floats)
                <= bound).all()  # fmt: skip
        assert (np.abs(got - want) <= bound).all()
        np.testing.assert_allclose(
            gradient(elided, inputs)[0], gradient(program, inputs)[0], rtol=1e-5, atol=1e-5
        )


def test_a_chosen_weight_with_another_reader_stays_float():
    def fn(p, x):
        w = jax.lax.cond(x[0, 0, 0] > 0, lambda: p["a"], lambda: p["b"])
        return x @ w, jnp.tanh(w)

    program, _ = quantized(fn, TREE, X)
    assert ELIDE.run(program).program is program


def test_branches_of_different_kinds_stay_float():
    tree = {**TREE, "b": weight(1, 16, 8, qtype="int4")}
    program, _ = quantized(switched, tree, X)
    assert ELIDE.run(program).program is program


def test_a_product_of_two_weights():
    """Low-rank weights multiplied first: the left one was dequantized for the product alone."""
    tree = {"u": weight(7, 16, 4, act=None), "v": weight(8, 4, 8, act=None)}
    program, inputs = quantized(lambda p, x: x @ (p["u"] @ p["v"]), tree, X)
    elided = apply(program, SHARE, ELIDE)
    np.testing.assert_allclose(run(elided, inputs)[0], run(program, inputs)[0], rtol=1e-5)


def test_rows_that_were_looked_up_stay_activations():
    tree = {"e": embed(6, 10, 16), "f": jnp.ones((16, 4))}
    program, inputs = quantized(lambda p, ids: jnp.take(p["e"], ids, axis=0) @ p["f"], tree, IDS)
    assert ELIDE.run(program).program is program
    assert run(program, inputs)[0].shape == (2, 3, 4)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_symbolic_sizes(granularity):
    """jax.export with shape polymorphism: decided without asking how large a size is."""
    act = ActScheme(granularity=granularity)
    tree = {name: w.replace(act=act) for name, w in TREE.items()}
    tree["e"] = embed(6, 10, 16)

    def fn(p, ids):
        x = jnp.take(p["e"], ids, axis=0)
        y = jnp.tanh(x)
        return [x @ p["a"], y @ p["a"], y.reshape(-1, 16) @ p["b"], y[:, -1] @ p["h"]]

    ids = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, t"), jnp.int32)
    steps = (SHARE, ELIDE, FuseSiblings())

    def call(tree, ids):
        program, inputs = quantized(fn, tree, ids)
        return evaluate(PassManager(steps, verify="all").run(program), inputs)

    exported = jax.export.export(jax.jit(call))(tree, ids)
    for got, want in zip(exported.call(tree, IDS), jax.jit(call)(tree, IDS), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_to_multiply():
    program, inputs = quantized(PARTS["the last token has a head"], TREE, X[:0])
    for out in run(apply(program, SHARE, ELIDE, FuseSiblings()), inputs):
        assert out.shape[0] == 0


# -- transformations -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind, kind))

    def fn(p, x):
        return [
            jnp.einsum("btd,dn->btn", x, p["a"]),
            jnp.einsum("bd,dn->bn", x[:, -1], p["h"]),
        ]

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        program, inputs = quantized(fn, TREE, x)
        elided = apply(program, SHARE, ELIDE)
        # On an explicit mesh parts are not taken: shardings are spelt for x only.
        assert quantizations(elided) == (1 if kind is AxisType.Auto else 2)
        assert_same(run(elided, inputs), run(program, inputs))


def test_a_chosen_weight_under_vmap_jit_and_scan():
    def fn(p, x):
        def step(c, x):
            return c + 1, jax.jit(jax.vmap(lambda row: switched(p, row[None])[0] + c))(x)

        return jax.lax.scan(step, 0.0, jnp.stack([x, -x]))[1]

    program, inputs = quantized(fn, TREE, X)
    elided = apply(program, SHARE, ELIDE)
    np.testing.assert_allclose(
        run(elided, inputs)[0], run(program, inputs)[0], rtol=1e-5, atol=1e-5
    )
