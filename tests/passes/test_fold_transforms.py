"""Folds leave the float function as it is; what cannot be folded is refused or explicit."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.extend.core import jaxpr_as_fun

from jaxquant.models import linen as linen_model
from jaxquant.passes.channel_flow import find_channel_groups
from jaxquant.passes.fold_transforms import (
    FACT,
    FoldError,
    FoldTransforms,
    check_same,
    fold_parameters,
)
from jaxquant.passes.pass_manager import PassManager
from jaxquant.passes.program import trace
from tests.passes.fold_zoo import DECODER, Encoder, gated_decoder, gated_params, random_like

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


def random_factors(group, seed=0):
    return np.exp(0.7 * np.random.default_rng(seed).normal(size=group.count))


def fold(fn, params, args, factors=random_factors, unfoldable="leave"):
    """(program after the pass, notes, new parameters in the old tree)."""
    program = trace(fn, params, args)
    manager = PassManager([FoldTransforms(factors, unfoldable)], verify="all")
    after = manager.run(program)
    leaves, treedef = jax.tree.flatten(params)
    named = dict(zip(program.paths[: len(leaves)], leaves))
    new = fold_parameters({p: named[p] for p in after.facts[FACT]}, after.facts[FACT])
    folded = jax.tree.unflatten(treedef, [new.get(path, x) for path, x in named.items()])
    return after, manager.records[0].notes, folded


def evaluate(program, params, *args):
    return jaxpr_as_fun(program.jaxpr)(*program.flatten(params, *args))


def changed(a, b):
    """How many leaves differ."""
    return sum(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def init(model, *args):
    return random_like(model.init(jax.random.key(0), *args))


# --- the function stays -----------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
def test_the_decoder_with_random_factors(scan):
    model = linen_model.Decoder(DECODER.replace(scan_layers=scan))
    params = model.init(jax.random.key(0), TOKENS)
    _, notes, folded = fold(model.apply, params, (TOKENS,))
    assert len(notes) == (5 if scan else 9)
    assert changed(params, folded) == (9 if scan else 18)  # all but embedding and final norm
    run = jax.jit(model.apply)
    before, after = run(params, TOKENS), run(folded, TOKENS)
    assert check_same(before, after, tolerance=1e-5, what="fold") < 1e-5


def test_scanned_and_separate_layers_fold_alike():
    """Factors of a stacked group are those of its layers, one after the other."""
    stacked = linen_model.Decoder(DECODER)
    params = stacked.init(jax.random.key(0), TOKENS)
    (group,) = (
        g for g in find_channel_groups(trace(stacked.apply, params, (TOKENS,)))
        if g.consumers == ("layers/mlp/down/kernel",)
    )  # fmt: skip
    factors = 1 + np.arange(48.0).reshape(group.channels.shape)
    _, _, folded = fold(stacked.apply, params, (TOKENS,), {"layers/mlp/down/kernel": factors})
    old, new = (t["params"]["layers"]["mlp"] for t in (params, folded))
    want = old["down"]["kernel"] * factors.reshape(2, 24)[:, :, None]
    np.testing.assert_allclose(new["down"]["kernel"], want, rtol=1e-6)
    want = old["up"]["kernel"] / factors.reshape(2, 24)[:, None, :]
    np.testing.assert_allclose(new["up"]["kernel"], want, rtol=1e-6)
    assert np.array_equal(new["gate"]["kernel"], old["gate"]["kernel"])


@pytest.mark.parametrize(
    ("fn", "params", "x"),
    [
        (gated_decoder, gated_params(), TOKENS),
        (
            Encoder().apply,
            init(Encoder(), jnp.zeros((2, 3, 16))),
            jax.random.normal(jax.random.key(2), (2, 3, 16)),
        ),
    ],
    ids=["gated_decoder", "encoder"],
)
def test_other_architectures_with_random_factors(fn, params, x):
    _, _, folded = fold(fn, params, (x,))
    assert changed(params, folded) >= 8
    run = jax.jit(fn)
    assert check_same(run(params, x), run(folded, x), tolerance=1e-5, what="fold") < 1e-5


STEPS = {
    "dense": lambda p, i, h: h @ p[f"w{i}"] + p[f"b{i}"],
    "relu": lambda p, i, h: jax.nn.relu(h),
    "tanh": lambda p, i, h: jnp.tanh(h),
    "gain": lambda p, i, h: h * p[f"b{i}"],
    "norm": lambda p, i, h: h / jnp.sqrt(1e-3 + jnp.mean(h * h, -1, keepdims=True)) * p[f"b{i}"],
    "gated": lambda p, i, h: jax.nn.silu(h @ p[f"w{i}"]) * (h @ p[f"v{i}"]),
    "residual": lambda p, i, h: h + jax.nn.relu(h @ p[f"w{i}"]) @ p[f"v{i}"],
    "halves": lambda p, i, h: jnp.concatenate([h[:, 4:], h[:, :4] @ p[f"v{i}"][:4, :4]], 1),
    "heads": lambda p, i, h: jnp.repeat(h.reshape(-1, 4, 2)[:, ::2], 2, 1).reshape(h.shape),
    "mixed": lambda p, i, h: jax.nn.softmax(h @ h.T / 9) @ (h @ p[f"w{i}"]),
    "tied": lambda p, i, h: jax.nn.relu(h @ p["w0"]) @ p["w0"].T,
    "scan": lambda p, i, h: jax.lax.scan(
        lambda c, w: (jax.nn.relu(c * w[0]) @ w[1:9] @ w[9:], None),
        h, jnp.stack([jnp.concatenate([p[f"b{i}"][None], p[f"w{i}"], p[f"v{i}"]])] * 2),
    )[0],
    "loop": lambda p, i, h: jax.lax.fori_loop(0, 2, lambda _, c: c * p[f"b{i}"] @ p[f"w{i}"], h),
    "remat": lambda p, i, h: jax.checkpoint(lambda c: jnp.abs(c) @ p[f"w{i}"])(h),
}  # fmt: skip


@settings(max_examples=12)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=6), st.integers(0, 99))
def test_random_programs_stay_the_same(names, seed):
    """Every group of every program, with random factors at once: nothing found is wrong."""
    keys = jax.random.split(jax.random.key(seed), 3 * 7 + 1)
    params = {}
    for i in range(7):
        params[f"w{i}"] = jax.random.normal(keys[3 * i], (8, 8)) / 3
        params[f"v{i}"] = jax.random.normal(keys[3 * i + 1], (8, 8)) / 3
        params[f"b{i}"] = 1 + 0.3 * jax.random.normal(keys[3 * i + 2], (8,))
    x = jax.random.normal(keys[-1], (5, 8))

    def fn(p, x):
        for i, name in enumerate(names):
            x = STEPS[name](p, i, x)
        return x @ p["w6"]

    _, _, folded = fold(fn, params, (x,), lambda g: random_factors(g, seed))
    run = jax.jit(fn)
    check_same(run(params, x), run(folded, x), tolerance=1e-4, what=str(names))


def test_bfloat16_parameters_stay_bfloat16_and_powers_of_two_are_exact():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gated_params())
    _, _, folded = fold(
        gated_decoder, params, (TOKENS,), lambda g: 2.0 ** (np.arange(g.count) % 5 - 2)
    )
    assert {x.dtype for x in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}
    assert changed(params, folded) == 10  # all but the embedding
    before, after = gated_decoder(params, TOKENS), gated_decoder(folded, TOKENS)
    assert np.array_equal(np.asarray(before, np.float32), np.asarray(after, np.float32))


# --- what cannot be folded --------------------------------------------------------------------


def gelu_mlp(p, x):
    return jax.nn.gelu(x @ p["a"]) @ p["b"]


MLP = {
    "a": jax.random.normal(jax.random.key(0), (6, 8)),
    "b": jax.random.normal(jax.random.key(1), (8, 4)),
}
X = jax.random.normal(jax.random.key(2), (3, 6))


def test_refused_with_the_reason():
    with pytest.raises(FoldError, match=r"b: .*(tanh|powers 1 and 3)") as error:
        fold(gelu_mlp, MLP, (X,), {"b": np.ones(8)}, "refuse")
    assert "'multiply' makes explicit operations" in str(error.value)
    assert "pass 'fold_transforms'" in error.value.__notes__[0]


def test_left_out_with_a_note():
    program, notes, folded = fold(gelu_mlp, MLP, (X,), {"b": 2 * np.ones(8)}, "leave")
    assert changed(MLP, folded) == 0 and program.facts[FACT] == {}
    assert notes[0].startswith("b: left as it is: ")


def count(jaxpr, name):
    return str(jaxpr).count(f" = {name} ")


def test_an_explicit_operation_in_front_of_the_product():
    s = np.exp(np.random.default_rng(0).normal(size=8))
    program, notes, folded = fold(gelu_mlp, MLP, (X,), {"b": s}, "multiply")
    assert notes == ("b: the input is divided by an explicit operation",)
    assert changed(MLP, folded) == 1
    np.testing.assert_allclose(folded["b"], MLP["b"] * s[:, None], rtol=1e-6)
    before = trace(gelu_mlp, MLP, (X,)).jaxpr
    assert count(program.jaxpr, "mul") == count(before, "mul") + 1
    (after,) = evaluate(program, folded, X)
    check_same(gelu_mlp(MLP, X), after, tolerance=1e-5, what="multiply")
    with pytest.raises(FoldError, match="changed the function"):  # without the operation
        check_same(gelu_mlp(MLP, X), gelu_mlp(folded, X), tolerance=1e-5, what="multiply")


def test_explicit_operations_inside_a_scan_have_factors_for_each_layer():
    def fn(p, x):
        def body(x, layer):
            return x + jax.nn.gelu(x @ layer["a"]) @ layer["b"].T, None

        return jax.lax.scan(jax.checkpoint(body), x, p)[0]

    keys = jax.random.split(jax.random.key(0), 2)
    params = {k: jax.random.normal(key, (3, 6, 8)) / 4 for k, key in zip("ab", keys)}
    program, _, folded = fold(fn, params, (X,), unfoldable="multiply")
    assert changed(params, folded) == 2
    (after,) = evaluate(program, folded, X)
    check_same(fn(params, X), after, tolerance=1e-5, what="multiply")
    sub = [e for e in program.jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    assert len(sub) == 1 and "checkpoint" in str(sub[0]) or "remat" in str(sub[0])


def test_a_tied_table_cannot_be_scaled_even_explicitly():
    model = linen_model.Decoder(DECODER)
    params = model.init(jax.random.key(0), TOKENS)
    factors = {"embed/embedding": 2 * np.ones(16)}
    with pytest.raises(FoldError, match="embed/embedding: reduce_sum: reduces over the channels"):
        fold(model.apply, params, (TOKENS,), factors, "multiply")


# --- powers, and groups of features -------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "power"),
    [
        (lambda h: jax.nn.relu(h) ** 2, 2),
        (lambda h: (lambda r: r * r)(jax.nn.relu(h)), 2),
        (lambda h: jnp.sqrt(jax.nn.relu(h)), 0.5),
        (lambda h: jax.lax.rsqrt(jnp.abs(h)), -0.5),
        (lambda h: jnp.abs(h) ** -3, -3),
        (lambda h: jnp.concatenate([jax.nn.relu(h[:, 4:]) ** 2, jnp.abs(h[:, :4]) ** 2], 1), 2),
    ],
)
def test_a_power_in_between_is_absorbed_by_its_root(between, power):
    def fn(p, x):
        return between(x @ p["a"]) @ p["b"]

    program, _, _ = fold(fn, MLP, (X,))
    (b,) = program.facts[FACT]["b"]
    (a,) = program.facts[FACT]["a"]
    want = b.ravel() ** (-1 / power)
    if a.shape == (1, 8) and not np.allclose(a.ravel(), want):
        want = np.roll(want, 4)  # concatenated the other way round
    np.testing.assert_allclose(a.ravel(), want, rtol=1e-6)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), MLP)
        new = fold_parameters(wide, program.facts[FACT])
        before, after = fn(wide, np.asarray(X, np.float64)), fn(new, np.asarray(X, np.float64))
        check_same(before, after, tolerance=1e-12, what="fold")


def conv(x, w, groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_convolutions_in_groups_of_features_pass_factors_on(groups):
    shapes = {"a": (3, 5, 8), "g": (3, 8 // groups, 16), "b": (3, 16, 4)}
    keys = jax.random.split(jax.random.key(3), 3)
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    x = jax.random.normal(jax.random.key(4), (2, 6, 5))

    def fn(p, x):
        h = jax.nn.relu(conv(jax.nn.relu(conv(x, p["a"])), p["g"], groups))
        return conv(h, p["b"])

    program, _, _ = fold(fn, params, (x,))
    facts = program.facts[FACT]
    assert facts["b"][0].shape == (1, 16, 1)
    assert any(array.shape[-1] == 16 for array in facts["g"])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        new = {**wide, **fold_parameters(wide, facts)}
        before, after = fn(wide, np.asarray(x, np.float64)), fn(new, np.asarray(x, np.float64))
        check_same(before, after, tolerance=1e-12, what="fold")
    assert not np.allclose(new["g"], wide["g"])


def test_factors_within_a_group_are_cancelled_by_its_kernel():
    """Two readers of one value: a plain convolution asks for factors, the grouped one follows."""
    shapes = {"a": (3, 5, 8), "g": (3, 4, 6), "b": (3, 8, 4)}
    keys = jax.random.split(jax.random.key(3), 3)
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    x = jax.random.normal(jax.random.key(4), (2, 6, 5))

    def fn(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        return conv(h, p["b"]), conv(h, p["g"], 2)

    program, _, folded = fold(fn, params, (x,))
    factors = program.facts[FACT]["b"][0].ravel()
    got = program.facts[FACT]["g"][0]
    assert got.shape == (1, 4, 6)
    np.testing.assert_allclose(got[0, :, :3], factors[:4, None] * np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(got[0, :, 3:], factors[4:, None] * np.ones(3), rtol=1e-6)
    for before, after in zip(fn(params, x), fn(folded, x), strict=True):
        check_same(before, after, tolerance=1e-5, what="fold")


# --- wrong use and wrong folds ----------------------------------------------------------------


def test_errors_name_what_is_allowed():
    args = (gated_decoder, gated_params(), (TOKENS,))
    with pytest.raises(ValueError, match="no product contracts this weight; those that do: a, b"):
        fold(*args, {"g": np.ones(16)})
    with pytest.raises(ValueError, match=r"'a' have shape \(7,\); its channels have \(2, 1, 1, 16"):
        fold(*args, {"a": np.ones(7)})
    with pytest.raises(ValueError, match="'a' must be positive"):
        fold(*args, {"a": np.zeros(16)})
    with pytest.raises(ValueError, match="for 'a' and for 'b', which share their input"):
        fold(*args, {"a": np.ones(16), "b": np.ones(16)})
    with pytest.raises(ValueError, match=r"unfoldable='no' must be one of \['refuse'"):
        FoldTransforms({}, "no")


def test_channels_that_must_share_a_factor_get_the_geometric_mean():
    factors = np.exp(np.random.default_rng(3).normal(size=(2, 1, 1, 16)))
    _, _, folded = fold(gated_decoder, gated_params(), (TOKENS,), {"d": factors})
    heads = np.log(factors.reshape(2, 2, 2, 4))  # layer, key head, query head of it, feature
    shared = np.exp(heads.mean(2, keepdims=True)) * np.ones((1, 1, 2, 1))
    want = gated_params()["d"] * shared.reshape(2, 16)[:, :, None]
    np.testing.assert_allclose(folded["d"], want, rtol=1e-5)
    check_same(
        gated_decoder(gated_params(), TOKENS), gated_decoder(folded, TOKENS),
        tolerance=1e-5, what="fold",
    )  # fmt: skip


def test_a_wrong_fold_is_caught_with_figures():
    params = gated_params()
    _, _, folded = fold(gated_decoder, params, (TOKENS,))
    wrong = {**folded, "g": folded["g"] * 1.001}
    with pytest.raises(FoldError, match=r"differs by up to .* largest magnitude is .* allowed is"):
        check_same(
            gated_decoder(params, TOKENS), gated_decoder(wrong, TOKENS),
            tolerance=1e-5, what="fold",
        )  # fmt: skip
    with pytest.raises(FoldError):
        check_same(jnp.ones(3), jnp.full(3, jnp.nan), tolerance=1e-5, what="fold")


def test_a_second_fold_adds_to_the_first():
    program = trace(gated_decoder, gated_params(), (TOKENS,))
    once = FoldTransforms({"w": 2 * np.ones(24)})
    twice = once.run(once.run(program).program).program
    assert len(twice.facts[FACT]["w"]) == 2
    new = fold_parameters(gated_params(), twice.facts[FACT])
    np.testing.assert_allclose(new["w"], 4 * gated_params()["w"], rtol=1e-6)


def test_the_pass_is_a_frozen_dataclass():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FoldTransforms({}).unfoldable = "leave"
