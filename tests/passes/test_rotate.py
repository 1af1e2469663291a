"""Rotations leave the function as it is; what they reach is found by dataflow."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.extend.core import jaxpr_as_fun

from jaxquant.models import linen as linen_model
from jaxquant.passes.find_turns import find_turns
from jaxquant.passes.fold_transforms import FoldError, check_same
from jaxquant.passes.pass_manager import PassManager
from jaxquant.passes.program import trace
from jaxquant.passes.rotate import FACT, Rotate, rotate_parameters
from tests.passes.fold_zoo import DECODER, Encoder, gated_decoder, gated_params, random_like

TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


def decoder(**changes):
    model = linen_model.Decoder(DECODER.replace(**changes))
    params = model.init(jax.random.key(0), TOKENS)
    noisy = random_like(params)
    gains = lambda path, x, y: y if "scale" in jax.tree_util.keystr(path) else x  # noqa: E731
    return model.apply, jax.tree_util.tree_map_with_path(gains, params, noisy)


def rotate(fn, params, x, tolerance=1e-5, **options):
    """Runs the pass and checks the function; gives program, notes and new parameters by path."""
    program = trace(fn, params, (x,))
    manager = PassManager([Rotate(**options)], verify="all")
    after = manager.run(program)
    leaves, treedef = jax.tree.flatten(params)
    named = dict(zip(program.paths[: len(leaves)], leaves))
    new = rotate_parameters(named, after.facts[FACT])
    turned = jax.tree.unflatten(treedef, [new.get(path, v) for path, v in named.items()])
    want, got = (
        jax.jit(jaxpr_as_fun(p.jaxpr))(*p.flatten(t, x))
        for p, t in ((program, params), (after, turned))
    )
    check_same(want, got, tolerance=tolerance, what="rotate")
    return after, manager.records[0].notes, named, new


def axes(found):
    return {(path, spot.dim) for path, spot, _ in found.absorbed}


LAYER = {
    ("layers/attention/query/kernel", 1), ("layers/attention/key/kernel", 1),
    ("layers/attention/value/kernel", 1), ("layers/attention/out/kernel", 3),
    ("layers/mlp/gate/kernel", 1), ("layers/mlp/up/kernel", 1), ("layers/mlp/down/kernel", 2),
}  # fmt: skip


@pytest.mark.parametrize("remat", [False, True])
def test_the_residual_stream_of_the_scanned_decoder(remat):
    fn, params = decoder(tie_embeddings=False, remat=remat)
    program, notes, old, new = rotate(fn, params, TOKENS)
    stream, heads = (found for found, _ in program.facts[FACT])
    assert axes(stream) == LAYER | {("embed/embedding", 1), ("lm_head/kernel", 0)}
    assert {path for path, _ in stream.gains} == {
        "layers/attention_norm/scale", "layers/mlp_norm/scale", "norm/scale",
    }  # fmt: skip
    assert axes(heads) == {("layers/attention/value/kernel", 3), ("layers/attention/out/kernel", 2)}
    assert not stream.fixes_ones and stream.joins == 2 and stream.explicit == ()
    assert set(new) == set(old)  # every parameter changed
    assert all((new[path] == 1).all() for path, _ in stream.gains)
    assert notes[0].startswith("residual stream of 16 channels, joined by 2 sums: 9 parameters")


def test_the_stream_of_separate_layers():
    fn, params = decoder(tie_embeddings=False, scan_layers=False)
    program, *_ = rotate(fn, params, TOKENS)
    stream, *heads = (found for found, _ in program.facts[FACT])
    assert stream.joins == 4 and len(stream.absorbed) == 2 + 7 * 2 and len(heads) == 2


def test_the_rotated_table_is_the_table_times_the_matrix():
    fn, params = decoder(tie_embeddings=False)
    program, _, old, new = rotate(fn, params, TOKENS, heads=False)
    q = program.facts[FACT][0][1].matrix()
    np.testing.assert_allclose(new["embed/embedding"], old["embed/embedding"] @ q, atol=1e-5)
    gain = np.asarray(old["norm/scale"], np.float64)
    want = q.T @ (gain[:, None] * np.asarray(old["lm_head/kernel"], np.float64))
    np.testing.assert_allclose(new["lm_head/kernel"], want, atol=1e-5)


def test_a_tied_head_needs_explicit_operations():
    fn, params = decoder()
    with pytest.raises(FoldError, match=r"gain norm/scale cannot be folded.*online=True allows"):
        rotate(fn, params, TOKENS)
    program, notes, old, new = rotate(fn, params, TOKENS, online=True, tolerance=3e-5)
    stream = program.facts[FACT][0][0]
    assert axes(stream) == LAYER
    kinds = [(cut.kind, cut.back) for cut, _ in stream.explicit]
    assert sorted(kinds) == [("operand", True), ("result", False)]  # before the norm, after lookup
    assert "embed/embedding" not in new and "norm/scale" not in new
    assert "2 explicit operations" in notes[0]


def test_inputs_that_nothing_rotates_get_an_online_hadamard():
    fn, params = decoder(tie_embeddings=False)
    program, *_ = rotate(fn, params, TOKENS, online=True, tolerance=3e-5)
    roles = [found.role for found, _ in program.facts[FACT]]
    assert roles == ["stream", "heads", "input"]
    found, rotation = program.facts[FACT][2]
    assert axes(found) == {("layers/mlp/down/kernel", 1)} and found.size == 24
    np.testing.assert_allclose(np.abs(rotation.matrix()), 24**-0.5)
    before = str(trace(fn, params, (TOKENS,)).jaxpr).count("dot_general")
    assert str(program.jaxpr).count("dot_general") == before + len(rotation.factors)


def test_a_gated_decoder_in_raw_einsum():
    program, _, _, new = rotate(gated_decoder, gated_params(), TOKENS)
    stream, heads = (found for found, _ in program.facts[FACT])
    assert axes(stream) == {
        ("e", 1), ("a", 1), ("b", 1), ("c", 1), ("d", 2), ("u", 1), ("w", 2), ("z", 0),
    }  # fmt: skip
    # Kernels of two axes: the features of a head are a part of an axis.
    assert {(p, s.dim, s.size, s.inner) for p, s, _ in heads.absorbed} == {
        ("c", 2, 4, 1), ("d", 1, 4, 1),
    }  # fmt: skip
    assert set(new) == set(gated_params())


def test_a_layer_norm_encoder_keeps_the_ones_vector():
    """Its stream begins at an input of the function; all else is absorbed, biases too."""
    x = jax.random.normal(jax.random.key(2), (2, 3, 16))
    model = Encoder()
    params = random_like(model.init(jax.random.key(0), x))
    with pytest.raises(FoldError, match="is an input of the function that is no parameter"):
        rotate(model.apply, params, x)
    program, _, old, new = rotate(model.apply, params, x, online=True, tolerance=1e-4)
    stream, rotation = program.facts[FACT][0]
    assert stream.fixes_ones
    np.testing.assert_allclose(rotation.matrix().sum(0), 1, atol=1e-9)
    assert [(cut.kind, cut.back) for cut, _ in stream.explicit] == [("input", False)]
    assert {p for p, _ in axes(stream)} >= {
        "n1/bias", "mix/query/kernel", "mix/out/bias", "mix/out/kernel", "narrow/bias",
        "head/kernel",
    }  # fmt: skip
    assert (new["n2/scale"] == 1).all()


def test_a_result_that_is_the_stream_is_rotated_back():
    fn, params = decoder(tie_embeddings=False)

    def hidden(p, tokens):
        x = p["params"]["embed"]["embedding"][tokens]
        w = p["params"]["lm_head"]["kernel"]
        return x + jnp.tanh(x @ w) @ w.T

    with pytest.raises(FoldError, match="result of the function"):
        rotate(hidden, params, TOKENS)
    program, *_ = rotate(hidden, params, TOKENS, online=True, heads=False)
    kinds = [cut.kind for cut, _ in program.facts[FACT][0][0].explicit]
    assert "output" in kinds


def test_gains_of_zero_and_below_fold_too():
    fn, params = decoder(tie_embeddings=False)
    gain = params["params"]["norm"]["scale"]
    params["params"]["norm"]["scale"] = gain.at[3].set(0).at[5].set(-0.7)
    _, _, _, new = rotate(fn, params, TOKENS)
    assert (new["norm/scale"] == 1).all()


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (jnp.tanh, "tanh"),
        (lambda h: h * jnp.arange(1.0, 9), "channels of a rotated value one by one"),
        (lambda h: (h * h) @ jnp.ones((8, 2)), "squares of a rotated value"),
        (lambda h: jnp.concatenate([h[:, 4:], h[:, :4]], 1), "cuts"),
        (lambda h: jnp.where(jnp.arange(8) > 2, h, 0), "selects channels"),
        (lambda h: h.reshape(-1, 2, 4).sum(1), "reshape cuts"),
    ],
)
def test_what_does_not_commute_is_refused_with_its_reason(between, why):
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}

    def fn(p, x):
        x = x @ p["a"]
        return between(x + jnp.tanh(x @ p["b"]) @ p["a"]).sum()

    with pytest.raises(FoldError, match=why):
        Rotate().run(trace(fn, params, (jnp.ones((3, 8)),)))


def test_nothing_to_rotate():
    with pytest.raises(FoldError, match="no sum joins two values"):
        Rotate().run(trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, (jnp.ones((2, 4)),)))


def test_the_proof_shows_the_ways():
    fn, params = decoder(tie_embeddings=False)
    found, _ = find_turns(trace(fn, params, (TOKENS,)), stream=True, heads=True, online=False)
    text = found[0].proof()
    assert "layers/mlp/down/kernel is rotated along axis 2" in text
    assert "add: the sum of rotated values is the rotated sum   [" in text
    assert "layers/mlp_norm/scale becomes one, folded into layers/mlp/gate/kernel" in text


# --- random programs --------------------------------------------------------------------------


def rms(x, gain):
    return x / jnp.sqrt(1e-3 + jnp.mean(x * x, -1, keepdims=True)) * gain


def layer_norm(x, gain, bias):
    y = x - x.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(1e-3 + jnp.mean(jnp.square(y), -1, keepdims=True)) * gain + bias


BLOCKS = {
    "linear": lambda p, h: h + h @ p["w"] @ p["v"],
    "mlp": lambda p, h: h + jax.nn.gelu(rms(h, p["g"]) @ p["w"] + p["b"]) @ p["v"] + p["c"],
    "gated": lambda p, h: h - (jax.nn.silu(rms(h, p["g"]) @ p["w"]) * (h @ p["v"])) @ p["v"].T,
    "layer_norm": lambda p, h: h + jnp.tanh(layer_norm(h, p["g"], p["b"]) @ p["w"]) @ p["v"],
    "mixed": lambda p, h: h + jax.nn.softmax(h @ p["w"] @ (h @ p["w"]).T) @ h @ p["w"] @ p["v"],
    "scaled": lambda p, h: 0.5 * h + jax.nn.sigmoid(jnp.sum(h * h, -1, keepdims=True)) * h,
    "normalized": lambda p, h: rms(h, 1.0),
    "transposed": lambda p, h: (h.T + p["v"].T @ (p["w"].T @ h.T)).T,
    "scanned": lambda p, h: jax.lax.scan(
        lambda c, w: (c + jax.nn.relu(c @ w) @ w.T, None), h, jnp.stack([p["w"], p["v"]])
    )[0],
}
BREAKERS = {
    "tanh": lambda p, h: jnp.tanh(h),
    "gain": lambda p, h: jnp.tanh(h) * p["g"] + h,
    "flip": lambda p, h: h + h[:, ::-1],
}


@settings(max_examples=12)
@given(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    st.sampled_from([None, None, *sorted(BREAKERS)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_streams_stay_the_same(names, breaker, online, seed):
    keys = iter(jax.random.split(jax.random.key(seed), 40))
    params = [
        {
            "w": jax.random.normal(next(keys), (8, 8)) / 4,
            "v": jax.random.normal(next(keys), (8, 8)) / 4,
            "g": 1 + 0.3 * jax.random.normal(next(keys), (8,)),
            "b": 0.3 * jax.random.normal(next(keys), (8,)),
            "c": 0.3 * jax.random.normal(next(keys), (8,)),
        }
        for _ in range(6)
    ]
    ids = jnp.array([0, 3, 1, 7, 7])

    def fn(p, ids):
        x = p[5]["w"][ids]
        x = x + jnp.tanh(x @ p[4]["w"]) @ p[4]["v"]
        for i, name in enumerate(names):
            x = BLOCKS[name](p[i], x)
        x = BREAKERS[breaker](p[3], x) if breaker else x
        return rms(x, p[5]["g"]) @ p[5]["v"]

    try:
        program, *_ = rotate(fn, params, ids, tolerance=2e-4, online=online)
    except FoldError as why:
        assert breaker, (names, str(why))
        return
    assert program.facts[FACT][0][0].role == "stream"
