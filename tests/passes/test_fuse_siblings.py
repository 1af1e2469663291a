"""fuse_siblings: one equation for products of one input, the same bits, the same gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as jp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.schemes import ActScheme
from jaxquant.passes.count import count
from jaxquant.passes.fuse_siblings import FuseSiblings
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import (
    DYNAMIC,
    apply,
    assert_same,
    gradient,
    placed,
    quantized,
    run,
    run_and_gradient,
    weight,
)

X = jax.random.normal(jax.random.key(9), (2, 6, 16))
SHARE, FUSE = ShareActivationQuant(), FuseSiblings()


def tree(act=DYNAMIC, **kwargs):
    return {
        "q": weight(0, 16, 4, 2, act=act, **kwargs),
        "k": weight(1, 16, 2, 2, act=act, **kwargs),
        "v": weight(2, 16, 2, 2, act=act, **kwargs),
        "gate": weight(3, 16, 8, act=act, **kwargs),
        "up": weight(4, 16, 8, act=act, **kwargs),
        "down": weight(5, 8, 16, act=act, **kwargs),
    }


TREE = tree()


def block(p, x):
    """Grouped-query attention without softmax, with biases in between; a gated product."""
    q = jnp.einsum("btd,dhc->bthc", x, p["q"]) + 0.5
    k = jnp.einsum("btd,dhc->bthc", x, p["k"]) - 0.5
    v = jnp.einsum("btd,dhc->bthc", x, p["v"])
    y = (jnp.tanh(q) * jnp.repeat(jnp.sin(k) + v, 2, axis=2)).reshape(*x.shape[:-1], 8)
    y = jnp.concatenate([y, y], axis=-1)
    return (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def check(fn, tree, *args, launches, siblings, grad=True):
    """Launches before and after; values and gradients bit-equal to the program unshared."""
    program, inputs = quantized(fn, tree, *args)
    fused = apply(program, SHARE, FUSE)
    counts = count(fused.jaxpr)
    assert (count(program.jaxpr).launches, counts.launches) == launches
    assert counts.primitives.get("quantized_dots", 0) == siblings
    both = run_and_gradient if grad else run
    assert_same(both(fused, inputs), both(program, inputs))
    return fused


@pytest.mark.parametrize("act", [DYNAMIC, None, ActScheme(granularity="tensor")], ids=str)
@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_attention_and_gated_product(act, qtype):
    fused = check(block, tree(act, qtype=qtype), X, launches=(6, 3), siblings=2)
    assert count(fused.jaxpr).quantizations == (3 if act else 0)
    sizes = [
        [var.aval.shape for var in eqn.outvars]
        for eqn in fused.jaxpr.jaxpr.eqns
        if eqn.primitive.name == "quantized_dots"
    ]
    assert sizes == [[(2, 6, 4, 2), (2, 6, 2, 2), (2, 6, 2, 2)], [(2, 6, 8)] * 2]


def test_notes_name_the_siblings():
    program, _ = quantized(lambda p, x: [x @ p["gate"], x @ p["up"]], TREE, X)
    (note,) = FUSE.run(SHARE.run(program).program).notes
    assert note.startswith("2 products of one input in one equation: ")


def test_input_that_is_not_shared_yet_is_left_alone():
    program, _ = quantized(block, TREE, X)
    assert FUSE.run(program).program is program


KINDS = {
    "qtype": lambda p: {"a": p["gate"], "b": weight(4, 16, 8, qtype="int4")},
    "scheme": lambda p: {"a": p["gate"], "b": p["up"].replace(act=None)},
    "zero point": lambda p: {
        "a": p["gate"],
        "b": p["up"].replace(zero_point=jnp.ones_like(p["up"].scale)),
    },
    "groups": lambda p: {
        "a": p["gate"],
        "b": p["up"].replace(scale=jnp.tile(p["up"].scale, (2, 1))),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_different_kinds_stay_apart(kind):
    check(lambda p, x: [x @ p["a"], x @ p["b"]], KINDS[kind](TREE), X, launches=(2, 2), siblings=0)


def test_other_dimension_numbers_stay_apart():
    p = {"a": TREE["gate"], "b": weight(4, 8, 16, axes=(1,))}
    fn = lambda p, x: [x @ p["a"], jnp.einsum("btd,nd->btn", x, p["b"])]  # noqa: E731
    check(fn, p, X, launches=(2, 2), siblings=0)
    # A transposed weight is one of the other layout: its codes are transposed, not the product.
    check(lambda p, x: [x @ p["a"], x @ p["b"].T], p, X, launches=(2, 1), siblings=1)


def test_slices_of_stacked_weights_move_ahead():
    p = {"w": weight(7, 3, 16, 8, axes=(1,))}
    fused = check(
        lambda p, x: [jnp.tanh(x @ p["w"][i]) for i in range(3)], p, X, launches=(3, 1), siblings=1
    )
    names = [eqn.primitive.name for eqn in fused.jaxpr.jaxpr.eqns]
    assert names.index("quantized_dots") < names.index("tanh")


def test_a_weight_that_depends_on_a_sibling_stays_behind():
    def fn(p, x):
        first = x @ p["w"][0]
        chosen = jnp.int32(first.sum() > 0)
        return [first, x @ p["w"][chosen], x @ p["w"][chosen + 1], x @ p["w"][2]]

    p = {"w": weight(7, 3, 16, 8, axes=(1,))}
    check(fn, p, X, launches=(4, 2), siblings=2, grad=False)


def test_an_effect_keeps_its_place():
    def fn(p, x):
        first = x @ p["gate"]
        jax.debug.callback(lambda _: None, first)
        return [first, x @ p["up"]]

    program, _ = quantized(fn, TREE, X)
    fused = apply(program, SHARE, FUSE)  # the verifier counts effects
    names = [eqn.primitive.name for eqn in fused.jaxpr.jaxpr.eqns]
    assert names.index("quantized_dots") < names.index("debug_callback")


def test_halves_of_one_weight():
    halves = lambda p, x: [x @ half for half in jnp.split(p["gate"], 2, axis=1)]  # noqa: E731
    check(halves, TREE, X, launches=(2, 1), siblings=1)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_scan_of_remat(policy):
    def fn(p, x):
        layer = lambda x, p: x + jnp.tanh(block(p, x))  # noqa: E731
        layer = jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, policy))
        return jax.lax.scan(lambda x, p: (layer(x, p), None), x, p)[0]

    layers = jax.tree.map(lambda part: jnp.stack([part, part[::-1]]), TREE)
    fused = check(fn, layers, X, launches=(12, 6), siblings=4, grad=False)
    program, inputs = quantized(fn, layers, X)
    # The residual reads x as well: the same cotangents, added in another order.
    got, want = gradient(fused, inputs)[0], gradient(program, inputs)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    # A saved product is not computed again: the backward pass has its transposes only.
    loss = lambda x: evaluate(fused, [*inputs[:-1], x])[0].sum()  # noqa: E731
    again = count(jax.make_jaxpr(jax.grad(loss))(X)).primitives["quantize_activation"]
    assert again == (6 if policy == "dots_saveable" else 12)


def test_vmap_and_second_order():
    program, inputs = quantized(block, TREE, X)
    fused = apply(program, SHARE, FUSE)
    batch = jnp.stack([X, 2 * X])

    def outs(program, x):
        return evaluate(program, [*inputs[:-1], x])[0]

    def norm_of_gradient(program, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(outs(program, x))))(x) ** 2)

    for fn in (outs, jax.grad(norm_of_gradient, 1)):
        got, want = (jax.jit(jax.vmap(lambda x, p=p: fn(p, x)))(batch) for p in (fused, program))  # noqa: B023
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(None, "t"), P("t", None)], ids=["columns", "rows"])
def test_on_a_mesh(kind, spec):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind, kind))
    out = P("d", None, spec[1]) if kind is AxisType.Explicit else None

    def fn(p, x):
        return [jnp.einsum("btd,dn->btn", x, p[n], out_sharding=out) for n in ("gate", "up")]

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d", None, spec[0])))
        p = {name: placed(TREE[name], mesh, spec) for name in ("gate", "up")}
        check(fn, p, x, launches=(2, 1), siblings=1, grad=kind is AxisType.Auto)


def test_inside_shard_map():
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)

    def fn(p, x):
        return jax.shard_map(
            lambda p, x: [x @ p["gate"], x @ p["up"]],
            mesh=mesh,
            in_specs=({n: P(None, "t") for n in ("gate", "up")}, P("d")),
            out_specs=P("d", None, "t"),
        )(p, x)

    p, x = {n: TREE[n] for n in ("gate", "up")}, jnp.concatenate([X, X])
    program, inputs = quantized(fn, p, x)
    fused = apply(program, SHARE, FUSE)
    assert count(fused.jaxpr).launches == 1
    assert_same(run(fused, inputs), run(program, inputs))
    # One sum over devices instead of two: the same terms in another order.
    got, want = gradient(fused, inputs), gradient(program, inputs)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)


def test_each_converts_for_itself():
    def fn(p, x):
        half = lambda: x.astype(jnp.bfloat16)  # noqa: E731
        dims = (((2,), (0,)), ((), ()))
        return [jax.lax.dot_general(half(), p[n], dims) for n in ("gate", "up")]

    program, inputs = quantized(fn, TREE, X)
    fused = apply(program, SHARE, FUSE)
    assert count(fused.jaxpr).launches == 1
    assert sum(e.primitive is jp.convert_element_type_p for e in fused.jaxpr.jaxpr.eqns) == 2
    assert_same(run(fused, inputs), run(program, inputs))
    # Two cotangents are added in bfloat16 (2**-8 of the larger term), not in float32.
    got, want = gradient(fused, inputs)[-1], gradient(program, inputs)[-1]
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7 * np.abs(want).max())
