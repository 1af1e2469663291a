"""share_activation_quant: fewer quantizations, the same bits, the same gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.schemes import ActScheme
from jaxquant.passes.count import count
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import (
    apply,
    assert_same,
    placed,
    quantized,
    run,
    run_and_gradient,
    weight,
)
from tests.passes.zoo import CASES

X = jax.random.normal(jax.random.key(9), (2, 6, 16))
SHARE = ShareActivationQuant()
TREE = {
    "q": weight(0, 16, 4, 2),
    "k": weight(1, 16, 2, 2),
    "v": weight(2, 16, 2, 2),
    "out": weight(3, 8, 16),
}


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhc->bthc", x, p[name]) for name in "qkv")
    mixed = jnp.tanh(q) * jnp.repeat(jnp.sin(k) + v, 2, axis=2)
    return x + mixed.reshape(*x.shape[:-1], 8) @ p["out"]


def quantizations(program):
    return count(program.jaxpr).quantizations


def check(fn, tree, *args, before, after, grad=True):
    """Counts, values and gradients of a program and of what the pass makes of it."""
    program, inputs = quantized(fn, tree, *args)
    shared = apply(program, SHARE)
    assert (quantizations(program), quantizations(shared)) == (before, after)
    assert count(shared.jaxpr).launches == count(program.jaxpr).launches
    both = run_and_gradient if grad else run
    assert_same(both(shared, inputs), both(program, inputs))
    return shared


def test_query_key_and_value_quantize_once():
    program, _ = quantized(attention, TREE, X)
    shared = check(attention, TREE, X, before=4, after=2)
    counts = count(shared.jaxpr)
    assert counts.primitives["quantize_activation"] == 2
    assert counts.quantized_bytes == X.nbytes + X.nbytes // 2
    assert count(program.jaxpr).quantized_bytes == 3 * X.nbytes + X.nbytes // 2
    (note,) = SHARE.run(program).notes
    assert note.startswith("float32[2,6,16] is quantized once for 3 products: ")


@pytest.mark.parametrize(
    "act", [ActScheme(granularity="tensor"), ActScheme("float8_e4m3"), ActScheme("float8_e5m2")]
)
def test_other_schemes(act):
    tree = {name: w.replace(act=act) for name, w in TREE.items()}
    check(attention, tree, X, before=4, after=2)


def test_schemes_that_differ_are_not_mixed():
    tree = {**TREE, "k": TREE["k"].replace(act=None)}
    tree["v"] = tree["v"].replace(act=ActScheme(granularity="tensor"))
    check(attention, tree, X, before=3, after=3)


def test_static_scales_are_shared_if_they_are_one_array():
    act = ActScheme(mode="static")
    same, other = jnp.full((1, 1, 1), 0.02), jnp.full((1, 1, 1), 0.03)
    tree = {name: TREE[name].replace(act=act, input_scale=same) for name in "qkv"}
    tree["out"] = TREE["out"].replace(act=None)
    check(attention, tree, X, before=3, after=3)  # three inputs of the program

    def query_is_key(p, x):
        q, k = (jnp.einsum("btd,dhc->bthc", x, p["q"]) for _ in range(2))
        v = jnp.einsum("btd,dhc->bthc", x, p["v"])
        return jnp.sin(q) + jnp.tanh(k) + jnp.repeat(v, 2, axis=2)

    tree["v"] = tree["v"].replace(input_scale=other)
    check(query_is_key, tree, X, before=3, after=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_of_using_a_weight(case):
    """Through scans, loops, branches, remat, jit, custom derivatives and vmap."""
    act = ActScheme()
    tree = {
        name: w.replace(act=act) if name in case.axes else w
        for name, w in case.quantized(case.params()).items()
    }
    program, inputs = quantized(case.fn, tree, *case.inputs)
    shared = apply(program, SHARE)
    assert quantizations(shared) <= quantizations(program)
    names = count(shared.jaxpr).primitives
    assert names.get("quantize_activation", 0) == quantizations(shared)  # none is implicit
    both = run_and_gradient if case.has_gradient else run
    assert_same(both(shared, inputs), both(program, inputs))


def _experts(p, x, sizes):
    rows = x.reshape(12, 16)
    gate = jax.lax.ragged_dot(rows, p["gate"], sizes)
    return jax.nn.silu(gate) * jax.lax.ragged_dot(rows, p["up"], sizes)


def _two_kernels(p, x):
    image = x.reshape(2, 6, 4, 4)
    return [
        jax.lax.conv_general_dilated(
            image, p[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for name in ("near", "far")
    ]


@pytest.mark.parametrize("act", [ActScheme(), ActScheme(granularity="tensor")], ids=str)
def test_ragged_dots_share(act):
    tree = {n: weight(k, 3, 16, 8, axes=(1,), act=act) for k, n in enumerate(("gate", "up"))}
    sizes = jnp.array([3, 0, 9])
    check(_experts, tree, X, sizes, before=2, after=1)
    program, inputs = quantized(_experts, tree, X, sizes)
    shared = apply(program, SHARE)
    both = jnp.stack([X, 2 * X])
    outs = [
        jax.vmap(lambda x, p=p: evaluate(p, [*inputs[:-2], x, sizes]))(both)
        for p in (shared, program)
    ]
    np.testing.assert_allclose(outs[0][0], outs[1][0], rtol=1e-6)


@pytest.mark.parametrize(
    "act", [ActScheme(), ActScheme(granularity="tensor"), ActScheme(mode="static")], ids=str
)
def test_convolutions_share(act):
    tree = {
        name: weight(k, size, size, 4, 8, axes=(0, 1, 2), act=act)
        for k, (name, size) in enumerate({"near": 1, "far": 3}.items())
    }
    static = act.mode == "static"
    if static:
        tree = {n: w.replace(input_scale=jnp.full((1,) * 4, 0.02)) for n, w in tree.items()}
    check(_two_kernels, tree, X, before=2, after=2 if static else 1)
    program, inputs = quantized(_two_kernels, tree, X)
    shared = apply(program, SHARE)
    both = jnp.stack([X, 2 * X], axis=1)
    outs = [
        jax.vmap(lambda x, p=p: evaluate(p, [*inputs[:-1], x]), 1)(both) for p in (shared, program)
    ]
    for got, want in zip(*outs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    batched = jax.make_jaxpr(jax.vmap(lambda x: evaluate(shared, [*inputs[:-1], x]), 1))(both)
    if act.granularity == "token" or static:  # the mapped axis joins the batch
        assert count(batched).primitives["quantized_conv_general_dilated"] == 2


# -- the same value in another shape ---------------------------------------------------------

A, B = weight(4, 16, 8), weight(5, 16, 8)
SHAPES = {
    "each converts for itself": lambda p, x: [
        jax.lax.dot_general(x.astype(jnp.bfloat16), p[name], (((2,), (0,)), ((), ())))
        for name in "ab"
    ],
    "reshape": lambda p, x: [x @ p["a"], x.reshape(12, 16) @ p["b"]],
    "reshape of the contracted axes": lambda p, x: [
        x @ p["a"],
        jnp.einsum("btij,ijn->btn", x.reshape(2, 6, 4, 4), p["b"].reshape(4, 4, 8)),
    ],
    "transpose": lambda p, x: [x @ p["a"], jnp.einsum("dtb,dn->tbn", x.T, p["b"])],
    "broadcast": lambda p, x: [
        x @ p["a"],
        jnp.einsum("ebtd,dn->ebtn", jnp.broadcast_to(x, (3, 2, 6, 16)), p["b"]),
    ],
    "two ways of one": lambda p, x: [
        jnp.swapaxes(x, 0, 1) @ p["a"],
        x.reshape(12, 16) @ p["b"],
    ],
    "widened": lambda p, x: [
        (x16 := x.astype(jnp.bfloat16)).astype(jnp.float32) @ p["a"],
        jax.lax.dot_general(x16, p["b"], (((2,), (0,)), ((), ()))),
    ],
}


@pytest.mark.parametrize("name", SHAPES)
def test_one_quantization_for_all_shapes_of_a_value(name):
    check(SHAPES[name], {"a": A, "b": B}, X, before=2, after=1)


APART = {
    "another range": lambda p, x: [x @ p["a"], x.reshape(2, 6, 2, 8) @ p["b"][:8]],
    "a narrower type": lambda p, x: [
        x @ p["a"],
        x.astype(jnp.bfloat16).astype(jnp.float32) @ p["b"],
    ],
    "another axis contracted": lambda p, x: [
        x @ p["a"],
        jnp.einsum("btd,tn->bdn", x, p["b"][:6]),
    ],
    "a name for remat": lambda p, x: [x @ p["a"], checkpoint_name(x, "kept") @ p["b"]],
    "a barrier": lambda p, x: [x @ p["a"], jax.lax.optimization_barrier(x) @ p["b"]],
}


@pytest.mark.parametrize("name", APART)
def test_what_keeps_a_quantization_of_its_own(name):
    # A weight of one scale per column may be cut along the contracted axis.
    check(APART[name], {"a": A, "b": B}, X, before=2, after=2)


@st.composite
def moves(draw):
    """A chain of moves of an array with axes (4, 2, 3, 8), the last of which is contracted."""
    steps, shape, at = [], [4, 2, 3, 8], 3
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["transpose", "merge", "split", "unit"]))
        if kind == "transpose":
            order = draw(st.permutations(range(len(shape))))
            steps.append(lambda x, order=tuple(order): jnp.transpose(x, order))
            shape, at = [shape[i] for i in order], order.index(at)
        elif kind == "unit":
            where = draw(st.integers(0, len(shape)))
            shape, at = [*shape[:where], 1, *shape[where:]], at + (where <= at)
            steps.append(lambda x, s=tuple(shape): x.reshape(s))
        elif kind == "merge":
            free = [i for i in range(len(shape) - 1) if at not in (i, i + 1)]
            if free:
                i = draw(st.sampled_from(free))
                shape, at = [*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]], at - (i < at)
                steps.append(lambda x, s=tuple(shape): x.reshape(s))
        else:
            even = [i for i in range(len(shape)) if i != at and shape[i] % 2 == 0]
            if even:
                i = draw(st.sampled_from(even))
                shape, at = [*shape[:i], 2, shape[i] // 2, *shape[i + 1 :]], at + (i < at)
                steps.append(lambda x, s=tuple(shape): x.reshape(s))
    return steps, at


@settings(max_examples=12)
@given(left=moves(), right=moves(), scheme=st.sampled_from(["token", "tensor"]))
def test_random_chains_of_moves(left, right, scheme):
    x = jax.random.normal(jax.random.key(1), (4, 2, 3, 8))

    def fn(p, x):
        outs = []
        for (steps, at), w in zip((left, right), (p["a"], p["b"]), strict=True):
            moved = functools.reduce(lambda y, step: step(y), steps, x)
            outs.append(jax.lax.dot_general(moved, w, (((at,), (0,)), ((), ()))))
        return outs

    act = ActScheme(granularity=scheme)
    tree = {"a": weight(6, 8, 4, act=act), "b": weight(7, 8, 4, act=act)}
    check(fn, tree, x, before=2, after=1, grad=False)


# -- other transformations -------------------------------------------------------------------


def stack_of_layers(remat):
    def fn(p, x):
        layer = lambda x, p: x + jnp.tanh(attention(p, x))  # noqa: E731
        layer = jax.checkpoint(layer, policy=remat) if remat else layer
        return jax.lax.scan(lambda x, p: (layer(x, p), None), x, p)[0]

    return fn


POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}
LAYERS = jax.tree.map(lambda part: jnp.stack([part, part[::-1], part]), TREE)


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_in_a_scan(policy):
    shared = check(stack_of_layers(POLICIES[policy]), LAYERS, X, before=12, after=6)
    assert len(shared.jaxpr.jaxpr.eqns) <= 2  # still one scan


def test_gradient_inside_the_program():
    def fn(p, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(stack_of_layers(None)(p, x))))(x)

    check(fn, LAYERS, X, before=12, after=6)


def test_vmap_of_the_edited_program():
    program, inputs = quantized(attention, TREE, X[:, :3])
    shared = apply(program, SHARE)
    at = [len(inputs) - 1 if i == len(inputs) - 1 else None for i in range(len(inputs))]
    at[-1] = 0
    batch = [*inputs[:-1], jnp.stack([X[:, :3], 3 * X[:, 3:]])]
    outs = [
        jax.jit(jax.vmap(lambda *flat, p=p: evaluate(p, flat), at))(*batch)
        for p in (program, shared)
    ]
    assert_same(outs[1], outs[0])
    assert_same(outs[1][0][1], run(shared, [*inputs[:-1], 3 * X[:, 3:]])[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(None, "t"), P("t", None)], ids=["columns", "rows"])
def test_on_a_mesh(kind, spec):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind, kind))
    out = P("d", None, spec[1]) if kind is AxisType.Explicit else None

    def fn(p, x):
        return [jnp.einsum("btd,dn->btn", x, p[n], out_sharding=out) for n in "ab"]

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d", None, spec[0])))
        check(fn, {"a": placed(A, mesh, spec), "b": placed(B, mesh, spec)}, x, before=2, after=1)


def test_inside_shard_map():
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    act = ActScheme(mode="static")
    tree = {"a": A, "b": B, "c": A.replace(act=act, input_scale=jnp.full((1, 1), 0.02))}

    def fn(p, x):
        return jax.shard_map(
            lambda p, x: [x @ p[n] for n in "abc"],
            mesh=mesh,
            in_specs=({n: P(None, "t") for n in "abc"}, P("d")),
            out_specs=P("d", None, "t"),
        )(p, x)

    check(fn, tree, jnp.concatenate([X, X]), before=3, after=2)


def test_constraints_and_names_stay():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def fn(p, x):
        y = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, None, "d")))
        return [x @ p["a"], checkpoint_name(y, "y") @ p["b"]]

    # The verifier counts both; a constraint is not seen through either.
    check(fn, {"a": A, "b": B}, X, before=2, after=2)


def test_nothing_to_do():
    program, inputs = quantized(attention, {n: w.replace(act=None) for n, w in TREE.items()}, X)
    assert SHARE.run(program).program is program
    assert np.isfinite(run(program, inputs)[0]).all()
