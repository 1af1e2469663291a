"""Codes at the borders of custom derivatives, shard_map and remat: what crosses, what does not.

Values and gradients are bit-equal to the program that shares nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core.schemes import ActScheme
from jaxquant.passes.count import count
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import (
    apply,
    assert_same,
    quantized,
    run,
    run_and_gradient,
    weight,
)

X = jax.random.normal(jax.random.key(9), (8, 6, 16))
TREE = {name: weight(k, 16, 16) for k, name in enumerate("abc")}
GIVEN = {
    name: w.replace(
        act=ActScheme(mode="static"), input_scale=jnp.full((1, 1), 0.02), input_group="../a"
    )
    for name, w in TREE.items()
}
TENSOR = {name: w.replace(act=ActScheme(granularity="tensor")) for name, w in TREE.items()}
SHARE = ShareActivationQuant()


def shared(fn, tree, before, after, x=X):
    """The program before and after sharing, its counts checked, and its inputs."""
    program, inputs = quantized(fn, tree, x)
    result = apply(program, SHARE)
    counts = [count(p.jaxpr).quantizations for p in (program, result)]
    assert counts == [before, after]
    return program, result, inputs


def check(fn, tree, before, after, x=X):
    program, result, inputs = shared(fn, tree, before, after, x)
    assert_same(run_and_gradient(result, inputs), run_and_gradient(program, inputs))
    return result


# -- custom derivatives --------------------------------------------------------------------------


@jax.custom_jvp
def own_jvp(w, x):
    return jnp.tanh(x @ w)


@own_jvp.defjvp
def _(primals, tangents):
    (w, x), (_, dx) = primals, tangents
    return own_jvp(w, x), 2 * dx  # a rule that is not the derivative: it must be what is used


@jax.custom_jvp
def own_jvp_of_few(w, x):
    return jnp.tanh(x @ w)


def _few(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    assert type(dw).__name__ == "SymbolicZero"
    return jnp.tanh(x @ w), dx * x if type(dx).__name__ != "SymbolicZero" else jnp.zeros_like(x)


own_jvp_of_few.defjvp(_few, symbolic_zeros=True)


@jax.custom_vjp
def own_vjp(w, x):
    return jnp.tanh(x @ w)


# x goes to the residuals as it is: JAX hands that on by the number of the operand.
own_vjp.defvjp(
    lambda w, x: (jnp.tanh(x @ w), (w, x)), lambda res, ct: (None, 3 * ct + res[1] @ res[0])
)


def custom_vjp_that_closes_over(p, x):
    @jax.custom_vjp
    def f(y):
        return jnp.tanh(y @ p["a"]) + bias

    bias = x.sum()
    f.defvjp(lambda y: (jnp.sin(y), y), lambda y, ct: (ct * jnp.cos(y),))
    return f(x) + x @ p["b"]


def custom_jvp_twice(p, x):
    return own_jvp(p["a"], x) + own_jvp(p["b"], x) * (x @ p["c"])


def custom_vjp_twice(p, x):
    return own_vjp(p["a"], x) + own_vjp(p["b"], x) * (x @ p["c"])


def symbolic_zeros(p, x):
    return own_jvp_of_few(p["a"], x) + x @ p["b"] + own_jvp_of_few(p["c"], lax.stop_gradient(x))


def in_a_scan(p, x):
    def step(c, _):
        return c + own_vjp(p["a"], x) * own_jvp(p["b"], x), None

    return lax.scan(step, x, None, length=3)[0]


CUSTOM = {
    custom_jvp_twice: (3, 1),
    custom_vjp_twice: (3, 1),
    custom_vjp_that_closes_over: (2, 1),
    symbolic_zeros: (3, 2),  # stop_gradient is there to be met
    in_a_scan: (6, 1),
}


@pytest.mark.parametrize("fn", CUSTOM, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("tree", [TREE, GIVEN], ids=["dynamic", "static"])
def test_custom_derivatives_are_given_codes(fn, tree):
    result = check(fn, tree, *CUSTOM[fn])
    kinds = count(result.jaxpr).primitives
    assert kinds.get("custom_jvp_call", 0) + kinds.get("custom_vjp_call", 0) >= 1


@pytest.mark.parametrize("fn", [custom_jvp_twice, custom_vjp_twice], ids=lambda fn: fn.__name__)
def test_custom_derivatives_that_are_mapped_and_differentiated(fn):
    program, result, inputs = shared(fn, TREE, *CUSTOM[fn])

    def gradients(p):
        def loss(x):
            return jnp.sin(evaluate(p, [*inputs[:-1], x])[0]).sum()

        return jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([X, 2 * X]))

    assert_same(gradients(result), gradients(program))


def test_forward_mode_uses_the_users_rule():
    program, result, inputs = shared(custom_jvp_twice, TREE, 3, 1)

    def tangent(p):
        return jax.jvp(lambda x: evaluate(p, [*inputs[:-1], x]), (X,), (jnp.cos(X),))

    assert_same(jax.jit(lambda: tangent(result))(), jax.jit(lambda: tangent(program))())


# -- shard_map -----------------------------------------------------------------------------------

MESH = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind="auto", sizes=(4, 2)):
    return jax.make_mesh(sizes, ("d", "t"), axis_types=(MESH[kind],) * 2)


def by_rows(mesh, **options):
    """Data parallel: every device has tokens of its own, with scales of their own."""

    def fn(p, x):
        layer = jax.shard_map(
            lambda w, x: jnp.tanh(x @ w), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"),
            **options,
        )  # fmt: skip
        return layer(p["a"], x) + layer(p["b"], x)

    return fn


def by_columns(mesh, **options):
    """Tensor parallel: every device has all of x and some columns of the weight."""

    def fn(p, x):
        layer = jax.shard_map(
            lambda w, x: jnp.tanh(x @ w), mesh=mesh, in_specs=(P(None, "t"), P("d")),
            out_specs=P("d", None, "t"), **options,
        )  # fmt: skip
        return layer(p["a"], x) + layer(p["b"], x)

    return fn


def in_another_shape(mesh):
    def fn(p, x):
        layer = jax.shard_map(
            lambda w, x: jnp.einsum("tbd,dn->btn", x, w), mesh=mesh, in_specs=(P(), P(None, "d")),
            out_specs=P("d"),
        )  # fmt: skip
        y = jnp.swapaxes(x, 0, 1)
        return layer(p["a"], y) + layer(p["b"], y)

    return fn


def by_terms(mesh):
    """The contracted axis is split: every device's range would be that of its part."""

    def fn(p, x):
        layer = jax.shard_map(
            lambda w, x: lax.psum(x @ w, "t"), mesh=mesh, in_specs=(P("t"), P("d", None, "t")),
            out_specs=P("d"),
        )  # fmt: skip
        return jnp.tanh(layer(p["a"], x)) + layer(p["b"], x)

    return fn


@pytest.mark.parametrize("tree", [TREE, GIVEN], ids=["dynamic", "static"])
@pytest.mark.parametrize("make", [by_rows, by_columns, in_another_shape], ids=lambda f: f.__name__)
def test_shards_are_given_codes(make, tree):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        result = check(make(mesh), tree, 2, 1)
    one, two = (e for e in result.jaxpr.jaxpr.eqns if str(e.primitive) == "shard_map")
    assert "quantize_activation" not in count(one.params["jaxpr"]).primitives
    assert one.invars[-2:] == two.invars[-2:]
    inside = one.params["jaxpr"].invars[-2:]
    parts = [
        tuple(n // m for n, m in zip(outer.aval.shape, inner.aval.shape, strict=True))
        for outer, inner in zip(one.invars[-2:], inside, strict=True)
    ]
    # A scale for each token is split as the tokens are; one that is given is not.
    assert parts == [parts[0], (1, 1, 1) if tree is GIVEN else parts[0]]
    assert sorted(parts[0]) == [1, 1, 4]


def test_shards_whose_types_are_not_checked():
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        program, result, inputs = shared(by_columns(mesh, check_vma=False), TREE, 2, 1)
        assert_same(run(result, inputs), run(program, inputs))


@pytest.mark.parametrize("tree", [TREE, GIVEN], ids=["dynamic", "static"])
def test_shards_on_an_explicit_mesh(tree):
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        program, result, inputs = shared(by_rows(mesh), tree, 2, 1, x)
        assert_same(run(result, inputs), run(program, inputs))


def test_a_range_of_a_part_stays_with_the_part():
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        check(by_terms(mesh), TREE, 2, 2)
        check(by_rows(mesh), TENSOR, 2, 2)
        # A scale that is given is one for all parts.
        check(by_terms(mesh), GIVEN, 2, 1)


def test_an_axis_that_is_split_over_one_device_is_whole():
    mesh = mesh_of(sizes=(8, 1))
    with jax.set_mesh(mesh):
        check(by_terms(mesh), TREE, 2, 1)


def test_part_of_a_mesh():
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        check(by_rows(mesh, axis_names={"d"}), TREE, 2, 1)


# -- remat ---------------------------------------------------------------------------------------


def rematted(policy):
    def fn(p, x):
        def mlp(p, x):
            return jnp.tanh(x @ p["a"]) * (x @ p["b"])

        return jnp.sin(jax.checkpoint(mlp, policy=policy)(p, x)) + x @ p["c"]

    return fn


@pytest.mark.parametrize(
    "policy",
    [None, jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.everything_saveable],
    ids=["default", "nothing", "everything"],
)
def test_remat_keeps_what_it_kept(policy):
    """One quantization inside for both products, which the backward pass does once more."""
    program, result, inputs = shared(rematted(policy), TREE, 3, 2)

    def kept(p):
        _, back = jax.vjp(lambda x: evaluate(p, [*inputs[:-1], x]), X)
        return sorted((str(r.dtype), r.shape) for r in jax.tree.leaves(back))

    floats = [item for item in kept(program) if item[1] == X.shape]
    assert [item for item in kept(result) if item[1] == X.shape] == floats
    assert all(dtype == "float32" for dtype, _ in floats)
    assert_same(run_and_gradient(result, inputs), run_and_gradient(program, inputs))


def test_inside_of_a_remat_codes_cross_as_elsewhere():
    def fn(p, x):
        def body(p, x):
            y = jnp.sin(x)
            return lax.scan(lambda c, _: (jnp.tanh(c + y @ p["a"]), None), y, None, length=4)[0]

        return jax.checkpoint(body)(p, x)

    result = check(fn, TREE, 4, 1)
    (remat,) = result.jaxpr.jaxpr.eqns
    assert "quantize_activation" in [str(e.primitive) for e in remat.params["jaxpr"].eqns]
