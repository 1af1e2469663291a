"""What crosses the border of a body: codes in the place of floats, and one operand each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as jp

from jaxquant.core.schemes import ActScheme
from jaxquant.passes.body_operands import merge_operands
from jaxquant.passes.count import count
from jaxquant.passes.fuse_siblings import FuseSiblings
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import (
    apply,
    assert_same,
    quantized,
    run,
    run_and_gradient,
    weight,
)

X = jax.random.normal(jax.random.key(9), (2, 6, 16))
TREE = {name: weight(k, 16, 16) for k, name in enumerate("abc")}
STATIC = {
    name: w.replace(act=ActScheme(mode="static"), input_scale=jnp.full((1, 1), 0.02))
    for name, w in TREE.items()
}
SHARE = ShareActivationQuant()


def busy(y):
    """Too much for a body that is inlined."""
    for _ in range(5):
        y = jnp.sin(y) * 0.5 + y
    return y


@jax.jit
def layer(w, x):
    return busy(x @ w)


def bodies_that_are_called(p, x):
    return [layer(p[name], x) for name in "abc"]


def body_and_caller(p, x):
    return layer(p["a"], x.reshape(12, 16)), x @ p["b"]


def calls_in_calls(p, x):
    return jax.jit(lambda p, x: busy(layer(p["a"], x) + layer(p["b"], x)))(p, x), x @ p["c"]


def scan_constant(p, x):
    """Cross attention: every step reads the same keys."""
    return lax.scan(lambda c, _: (jnp.tanh(c + x @ p["a"]) @ p["b"], None), x, None, length=4)[0]


def scan_constant_in_another_shape(p, x):
    def step(c, _):
        return jnp.tanh(c + jnp.einsum("tbd,dn->btn", jnp.swapaxes(x, 0, 1), p["a"])), None

    return lax.scan(step, x, None, length=4)[0]


def scan_in_scan(p, x):
    def inner(c, _):
        return jnp.tanh(c + x @ p["a"]), None

    return lax.scan(lambda c, _: (lax.scan(inner, c, None, length=3)[0], None), x, None, length=2)[
        0
    ]


def all_branches(p, x):
    branches = [lambda x, n=n: jnp.tanh(x @ p[n]) for n in "ab"]
    return lax.switch(x.sum().astype(int) % 2, branches, x) + x @ p["c"]


def one_branch_and_the_caller(p, x):
    return lax.cond(x.sum() > 0, lambda x: jnp.tanh(x @ p["a"]), lambda x: x, x) + x @ p["c"]


# For each program: how often it quantizes, before and after; of a loop, in all its steps.
PROGRAMS = {
    bodies_that_are_called: (3, 1),
    body_and_caller: (2, 1),
    calls_in_calls: (3, 1),
    scan_constant: (8, 5),
    scan_constant_in_another_shape: (4, 1),
    scan_in_scan: (6, 1),
    all_branches: (2, 1),
    one_branch_and_the_caller: (2, 1),
}


def check(fn, tree, before, after):
    program, inputs = quantized(fn, tree, X)
    shared = apply(program, SHARE)
    assert (count(program.jaxpr).quantizations, count(shared.jaxpr).quantizations) == (
        before,
        after,
    )
    assert_same(run_and_gradient(shared, inputs), run_and_gradient(program, inputs))
    return program, shared, inputs


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_quantized_by_the_caller(fn):
    program, shared, _ = check(fn, TREE, *PROGRAMS[fn])
    names = count(shared.jaxpr).primitives
    for kind in ("scan", "cond", "jit"):
        assert names.get(kind) == count(program.jaxpr).primitives.get(kind)
    assert names["quantize_activation"] == PROGRAMS[fn][1]


@pytest.mark.parametrize("fn", [bodies_that_are_called, scan_in_scan], ids=lambda fn: fn.__name__)
def test_given_scales_cross_as_well(fn):
    tree = {name: w.replace(input_group="../a") for name, w in STATIC.items()}
    check(fn, tree, *PROGRAMS[fn])


def test_of_a_while_loop():
    def fn(p, x):
        def step(state):
            return state[0] + 1, jnp.tanh(state[1] + x @ p["a"])

        return lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]

    program, inputs = quantized(fn, TREE, X)
    shared = apply(program, SHARE)
    (loop,) = (e for e in shared.jaxpr.jaxpr.eqns if e.primitive is jp.while_p)
    assert "quantize_activation" not in count(loop.params["body_jaxpr"]).primitives
    assert count(shared.jaxpr).primitives["quantize_activation"] == 1
    assert_same(run(shared, inputs), run(program, inputs))
    (note,) = SHARE.run(program).notes
    assert note.startswith("float32[2,6,16] is quantized before the body that reads it")


def test_vmap_of_codes_that_are_a_constant_of_a_scan():
    program, inputs = quantized(scan_constant, TREE, X)
    shared = apply(program, SHARE)
    at = [None] * (len(inputs) - 1) + [0]
    batch = [*inputs[:-1], jnp.stack([X, 2 * X])]

    def mapped(p):
        fn = jax.vmap(lambda *flat: jax.core.eval_jaxpr(p.jaxpr.jaxpr, p.jaxpr.consts, *flat), at)
        return jax.jit(fn)(*batch)

    assert_same(mapped(shared), mapped(program))


def only_one_branch(p, x):
    return lax.cond(x.sum() > 0, lambda x: jnp.tanh(x @ p["a"]), lambda x: x, x)


def what_a_loop_carries(p, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ p["a"]), None), x, None, length=4)[0]


def a_remat(p, x):
    return jax.checkpoint(lambda p, x: jnp.tanh(x @ p["a"]))(p, x) + x @ p["b"]


@pytest.mark.parametrize(
    "fn", [only_one_branch, what_a_loop_carries, a_remat], ids=lambda fn: fn.__name__
)
def test_what_stays_inside(fn):
    program, _ = quantized(fn, TREE, X)
    shared = apply(program, SHARE)
    assert count(shared.jaxpr).quantizations == count(program.jaxpr).quantizations


def test_a_jitted_call_keeps_what_it_says():
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, P("d"))

    def fn(p, x):
        free = jax.jit(lambda w, x: busy(x @ w), donate_argnums=1)
        placed = jax.jit(lambda w, x: busy(x @ w), in_shardings=(None, split))
        return free(p["a"], x), placed(p["b"], x)

    with jax.set_mesh(mesh):
        program, inputs = quantized(fn, TREE, X)
        shared = apply(program, SHARE)  # the verifier counts donations
        calls = [e for e in shared.jaxpr.jaxpr.eqns if e.primitive is jp.jit_p]
        assert [len(e.params["donated_invars"]) for e in calls] == [len(e.invars) for e in calls]
        # A call that says where its input lies quantizes it there.
        assert ["quantize_activation" in count(e.params["jaxpr"]).primitives for e in calls] == [
            False,
            True,
        ]
        for got, want in zip(run(shared, inputs), run(program, inputs), strict=True):
            np.testing.assert_array_equal(got, want)


# -- one operand each ----------------------------------------------------------------------------


def test_a_body_reads_once_what_it_is_handed_twice():
    @jax.jit
    def mixed(w, v, query, keys):
        return busy(jnp.tanh(query @ w) + keys @ v)

    def fn(p, x):
        return mixed(p["a"], p["b"], x, x)

    _, shared, _ = check(fn, TREE, 2, 1)
    fused = apply(shared, FuseSiblings())
    assert count(fused.jaxpr).primitives["quantized_dots"] == 1


def test_weights_of_one_group_in_a_scan_become_one_equation():
    stacked = jax.tree.map(lambda part: jnp.stack([part, part[::-1], 2 * part]), STATIC)
    group = {name: w.replace(input_group="../a") for name, w in stacked.items()}

    def fn(p, x):
        def step(x, p):
            return x + jnp.tanh(x @ p["a"]) * (x @ p["b"]) + x @ p["c"], None

        return lax.scan(step, x, p)[0]

    apart, _ = quantized(fn, stacked, X)
    assert count(apply(apart, SHARE).jaxpr).quantizations == 9
    program, shared, inputs = check(fn, group, 9, 3)
    fused = apply(shared, FuseSiblings())
    assert count(fused.jaxpr).primitives["quantized_dots"] == 3
    assert count(fused.jaxpr).launches == 3
    assert_same(run(fused, inputs), run(apart, inputs))
    assert_same(run(fused, inputs), run(program, inputs))


def test_layers_of_one_group_keep_their_scales():
    """Weights are of one group, but the products read different layers of them."""
    scales = jnp.array([0.02, 0.03]).reshape(2, 1, 1)
    group = {
        name: jax.tree.map(lambda part: jnp.stack([part, part]), w).replace(
            input_scale=scales, input_group="../a"
        )
        for name, w in STATIC.items()
    }
    check(lambda p, x: [x @ p["a"][0], x @ p["b"][1], x @ p["c"][1]], group, 3, 2)


def test_a_carry_is_no_constant():
    def fn(x):
        return lax.scan(lambda c, _: ((c[1], c[0] + 1), None), (x, x), None, length=3)[0]

    closed = jax.make_jaxpr(fn)(X)
    assert merge_operands(closed) is closed
