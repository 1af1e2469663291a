"""The pass, its rules, what it takes and what it is called; values are in test_statistics."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as jp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.core import _compat
from jaxquant.core.names import module_scope
from jaxquant.passes import PassManager
from jaxquant.passes.edit_jaxpr import bodies
from jaxquant.passes.insert_observers import InsertObservers, Observation, check_rules, read
from jaxquant.passes.observe_rules import STATISTICS, Observe, observe_rules
from jaxquant.passes.program import trace
from jaxquant.passes.row_statistics import Hessian
from jaxquant.passes.statistics import AbsMax
from tests.passes.zoo import CASES

X = jax.random.normal(jax.random.key(0), (6, 8))
STACK = jax.random.normal(jax.random.key(2), (3, 8, 8)) / 2


# Nothing multiplies in the first two; the last sums over both axes of its weight, one at a time.
UNOBSERVABLE = ("cond_returns_the_weight", "elementwise_use", "used_transposed_as_well")


def stacked(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0] @ p["head"]


PARAMS = {"w": STACK, "head": jnp.ones((8, 5))}


def test_the_pass_adds_outputs_and_changes_none():
    program = trace(stacked, PARAMS, (X,))
    manager = PassManager([InsertObservers({"w": "hessian", "**": "absmax"})], verify="all")
    after = manager.run(program)
    out, found = _call(after, PARAMS, X)
    np.testing.assert_array_equal(out, jax.jit(stacked)(PARAMS, X))
    assert found["w"]["hessian"]["sum"].shape == (3, 8, 8)
    assert set(found["head"]) == {"absmax", "nonfinite"}
    (record,) = manager.records
    assert record.notes == (f"2 operands observed, {12 + 4 * 3 * 65 + 12 + 8} bytes of statistics",)
    text = str(manager.run(program).jaxpr)
    assert text == str(after.jaxpr)


def _call(program, *args):
    flat = program.flatten(*args)
    outs = jax.jit(jaxpr_as_fun(program.jaxpr))(*flat)
    return program.outputs.assemble(program.outputs.leaves(outs, flat))


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in UNOBSERVABLE], ids=str)
def test_every_use_of_a_weight_is_observed_and_nothing_else_changes(case):
    params = case.params()
    program = trace(case.fn, params, case.inputs)
    after = PassManager([InsertObservers("channel_absmax")], verify="all").run(program)
    out, found = _call(after, params, *case.inputs)
    expected = jax.jit(case.fn)(params, *case.inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), out, expected)
    only_looked_up = {"e"} if case.name == "lookup_times_weight" else set()
    assert set(found) >= set(case.axes) - only_looked_up
    assert all(float(jnp.max(states["channel_absmax"])) > 0 for states in found.values()) or (
        case.name == "cond_branches"
    )


def test_one_product_is_added_for_a_hessian_and_none_for_the_rest():
    def dots(jaxpr):
        inner, _ = _compat.open_jaxpr(jaxpr)
        own = sum(e.primitive is jp.dot_general_p for e in inner.eqns)
        return own + sum(dots(sub) for e in inner.eqns for sub in bodies(e))

    program = trace(stacked, PARAMS, (X,))
    assert dots(program.jaxpr) == 2
    for rules, expected in (("hessian", 4), ({"w": "hessian"}, 3), (["absmax", "reservoir"], 2)):
        after = PassManager([InsertObservers(rules)], verify="all").run(program)
        assert dots(after.jaxpr) == expected


def test_what_it_takes_is_known_to_the_byte_before_it_runs():
    program = trace(stacked, PARAMS, (jax.ShapeDtypeStruct(X.shape, X.dtype),))
    observation = Observation(program, observe_rules(list(STATISTICS)))
    sizes = observation.sizes()
    program = trace(stacked, PARAMS, (X,))
    run = Observation(program, observe_rules(list(STATISTICS)))
    state = jax.jit(run.accumulate)(run.init(), *program.flatten(PARAMS, X))
    assert sum(size.bytes for size in sizes) == sum(x.nbytes for x in jax.tree.leaves(state))
    found = read(state["seen"], run.statistics)
    for size in sizes:
        if size.path and size.statistic != "nonfinite":
            value = found[size.path][size.statistic]
            assert value.shape == size.shape
            own = jax.tree.leaves(state["seen"][size.path][size.statistic])
            assert size.bytes == sum(x.nbytes for x in own)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_state_is_donated(sharded):
    x = X
    program = trace(stacked, PARAMS, (X,))
    names = ["absmax", "moving_minmax", "histogram", "hessian", "reservoir"]
    observation = Observation(program, observe_rules(names))
    plain = jax.jit(observation.accumulate)
    accumulate = jax.jit(observation.accumulate, donate_argnums=0)
    state = observation.init()
    if sharded:
        mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        state = jax.device_put(state, NamedSharding(mesh, P()))
    flat = program.flatten(PARAMS, x)
    for _ in range(2):
        before = jax.tree.leaves(state)
        kept = plain(state, *flat)
        state = accumulate(state, *flat)
        assert all(leaf.is_deleted() for leaf in before)
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    text = accumulate.lower(state, *flat).as_text()
    aliases = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    assert aliases == len(jax.tree.leaves(state))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = nn.MultiHeadDotProductAttention(num_heads=2, name=name)(x)
        return x


def test_products_of_two_activations_by_module_and_number():
    from jaxquant.frontends.scopes import linen_scopes

    x = jax.random.normal(jax.random.key(3), (2, 6, 8))
    model = Model()
    variables = model.init(jax.random.key(1), x)

    def fn(tree, x):
        with linen_scopes():
            return model.apply(tree, x)

    program = trace(fn, variables, (x,))
    rules = observe_rules(Observe("first/**", ("absmax", "channel_absmax"), op="weightless"))
    observation = Observation(program, rules)
    _, found = observation(*program.flatten(variables, x))
    sides = [f"{i}/{side}" for i in (0, 1) for side in ("lhs", "rhs")]
    assert set(found) == {f"first/dot_general_{side}" for side in sides}
    p = variables["params"]["first"]
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", x, p[n]["kernel"]) + p[n]["bias"]
        for n in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q / 2, k), -1)
    expected = [jnp.abs(a).max() for a in (q / 2, k, weights, v)]
    seen = [float(s["absmax"]) for s in found.values()]
    np.testing.assert_allclose(sorted(seen), sorted(map(float, expected)), rtol=1e-5)
    assert {s["channel_absmax"].shape for s in found.values()} == {(4,), (6,)}


def test_weightless_products_in_stacked_layers_are_stacked():
    def layer(c, w):
        with module_scope("attn", "SelfAttention"):
            return jnp.tanh(c @ w) @ (c.T @ c), None

    def fn(p, x):
        return lax.scan(layer, x, p["w"])[0]

    program = trace(fn, {"w": STACK}, (X,))
    observation = Observation(program, observe_rules(Observe("attn/*/lhs", op="weightless")))
    _, found = observation(*program.flatten({"w": STACK}, X))
    c, expected = X, []
    for w in STACK:
        expected.append([jnp.abs(c).max(), jnp.abs(jnp.tanh(c @ w)).max()])
        c = jnp.tanh(c @ w) @ (c.T @ c)
    got = [found[f"attn/dot_general_{i}/lhs"]["absmax"] for i in (0, 1)]
    np.testing.assert_allclose(np.sort(np.stack(got, 1)), np.sort(expected), rtol=1e-4)


def test_rules():
    assert observe_rules("absmax") == (Observe("**", (AbsMax(),)),)
    assert observe_rules({"a": "hessian", "b/**": [Hessian(False), "absmax"]}) == (
        Observe("a", (Hessian(),)),
        Observe("b/**", (Hessian(False), AbsMax())),
    )
    program = trace(stacked, PARAMS, (X,))
    both = Observation(program, observe_rules([{"w": "absmax"}, {"**": ["mean", "absmax"]}]))
    assert list(both.statistics["w"]) == ["absmax", "mean", "nonfinite"]
    assert list(both.statistics["head"]) == ["mean", "absmax", "nonfinite"]


def test_errors():
    program = trace(stacked, PARAMS, (X,))
    with pytest.raises(ValueError, match="'nope/.*matches no weight operation; there are: w, head"):
        PassManager([InsertObservers({"nope/**": "absmax"})]).run(program)
    rules = observe_rules(Observe(op="weightless"))
    with pytest.raises(ValueError, match="matches no weightless operation; there are: none"):
        check_rules(rules, Observation(program, rules).met)
    with pytest.raises(ValueError, match="share the name 'hessian'"):
        Observation(program, observe_rules([Hessian(), Hessian(scaled=False)]))
    with pytest.raises(ValueError, match="unknown statistic 'absmin'. Known: absmax, minmax"):
        observe_rules("absmin")
    with pytest.raises(TypeError, match="must be a name, a Statistic"):
        observe_rules(3)
    with pytest.raises(ValueError, match="statistics is empty"):
        Observe("a", ())
    with pytest.raises(ValueError, match="op='dense' must be 'weight' or 'weightless'"):
        Observe(op="dense")


def test_gains_and_lookups_are_no_products():
    def fn(p, ids):
        x = jnp.take(p["e"], ids, axis=0) * jnp.sqrt(8.0)
        x = jnp.einsum("mk,k->mk", x, p["g"]) @ p["w"]
        return x @ p["e"].T

    params = {"e": jnp.ones((10, 8)), "g": jnp.ones(8), "w": jnp.eye(8)}
    program = trace(fn, params, (jnp.arange(4),))
    assert Observation(program, observe_rules("absmax")).met == {"w": True, "e": True}
