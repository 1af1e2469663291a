"""Names of parameters and modules: round trips, boxes, and what JAX's transforms do to scopes."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.core import names


def _paths(tree):
    return [names.path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_linen_collections_and_boxes():
    tree = {
        "params": {
            "attn": {"value": {"kernel": jnp.ones(2)}},
            "boxed": nn.Partitioned(jnp.ones(2), ("x",)),
            "layers": [jnp.ones(1), jnp.ones(1)],
        },
        "batch_stats": {"mean": jnp.ones(2)},
    }
    assert _paths(tree) == [
        "batch_stats/mean",
        "attn/value/kernel",
        "boxed",
        "layers/0",
        "layers/1",
    ]


def test_nnx_state_and_module():
    model = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=False)
    expected = {f"{m}/{p}" for m in ("query", "key", "value", "out") for p in ("kernel", "bias")}
    assert expected <= set(_paths(nnx.state(model)))
    assert expected <= set(_paths(model))
    assert expected <= set(_paths(nnx.to_pure_dict(nnx.state(model))))


def test_plain_keys_and_empty():
    assert names.path_string(("params", "a", 0)) == "a/0"
    assert names.path_string(()) == ""
    assert names.path_string(("params",)) == "params"


_segment = st.text(st.characters(codec="ascii", exclude_characters="/()\x00"), min_size=1)


@given(st.lists(_segment, max_size=4), st.from_regex(r"[A-Za-z_]\w*", fullmatch=True))
def test_scope_round_trip(path, cls):
    text = "/".join(path)
    scope = f"jq:{names._encode(text)}:{cls}"
    assert "/" not in scope
    assert names.innermost_module(["outer", scope, "inner"]) == (text, cls)


@pytest.mark.parametrize("split", [True, False])
def test_scopes_survive_autodiff_and_vmap(split):
    def fn(x):
        with (
            names.module_scope(("blocks", 0), "Block"),
            names.module_scope("blocks/0/up", nn.Dense),
        ):
            return jnp.sin(x) * x

    jaxpr = jax.make_jaxpr(jax.vmap(jax.grad(fn)))(jnp.ones(3))
    assert len(jaxpr.jaxpr.eqns) > 2
    for eqn in jaxpr.jaxpr.eqns:
        stack = eqn.source_info.name_stack
        entries = str(stack).split("/") if split else [e.name for e in stack.stack]
        assert names.innermost_module(entries) == ("blocks/0/up", "Dense")


def test_no_module_scope():
    assert names.innermost_module(()) is None
    assert names.innermost_module(("Dense", "jvp(mlp)")) is None


def test_names_of_groups_are_ways_to_the_first():
    firsts = {"0/q/w": "0/q/w", "0/k/w": "0/q/w", "1/q/w": "1/q/w", "1/k/w": "1/q/w"}
    groups = names.group_names(firsts | {"a": "a", "b": "a"})
    assert groups == dict.fromkeys(firsts, "../../q/w") | {"a": "../a", "b": "../a"}
    assert all(names.group_first(f"model/{p}", groups[p]) == f"model/{firsts[p]}" for p in firsts)
    assert names.group_first("", "../a") == "a"
