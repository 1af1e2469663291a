"""Which parameters can take a factor per channel, found in programs of different shape."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxquant.models import linen as linen_model
from jaxquant.models import nnx as nnx_model
from jaxquant.passes.channel_flow import find_channel_groups
from jaxquant.passes.program import trace
from tests.passes.fold_zoo import DECODER, Encoder, gated_decoder, gated_params

TOKENS = jnp.zeros((2, 6), jnp.int32)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def groups(fn, params, *args):
    return find_channel_groups(trace(fn, params, args))


def table(found):
    """{consumers: (producers, independent factors)}; None for producers if not foldable."""
    return {
        g.consumers: (tuple(a.path for a in g.producers) if g.foldable else None, g.count)
        for g in found
    }


def linen_groups(model, *args):
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    return groups(model.apply, variables, *args)


# --- whole models -----------------------------------------------------------------------------


def decoder_table(prefix, layers):
    """What must be found in the demo decoder; ``layers`` factors for each channel."""
    p = prefix
    qkv = tuple(f"{p}attention/{x}/kernel" for x in ("query", "key", "value"))
    return {
        qkv: ((f"{p}attention_norm/scale",), layers * 16),
        (f"{p}attention/out/kernel",): ((f"{p}attention/value/kernel",), layers * 8),
        tuple(f"{p}mlp/{x}/kernel" for x in ("gate", "up")): ((f"{p}mlp_norm/scale",), layers * 16),
        (f"{p}mlp/down/kernel",): ((f"{p}mlp/up/kernel",), layers * 24),
    }


def unordered(found):
    return {frozenset(k): v for k, v in found.items()}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [True, False])
def test_the_linen_decoder(scan, remat):
    model = linen_model.Decoder(DECODER.replace(scan_layers=scan, remat=remat))
    want = {}
    for i in [None] if scan else range(2):
        want |= decoder_table("layers/" if scan else f"layers_{i}/", 2 if scan else 1)
    want[("embed/embedding",)] = (None, 0)  # tied: the residual stream would change
    assert unordered(table(linen_groups(model, TOKENS))) == unordered(want)


@pytest.mark.parametrize("scan", [True, False])
def test_the_nnx_decoder_with_a_head_of_its_own(scan):
    config = DECODER.replace(scan_layers=scan, tie_embeddings=False)
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx_model.Decoder(config, rngs=nnx.Rngs(0))))
    found = table(groups(lambda s, x: nnx.merge(graph, s)(x), state, TOKENS))
    want = {}
    for i in [None] if scan else range(2):
        want |= decoder_table("layers/" if scan else f"layers/{i}/", 2 if scan else 1)
    want[("lm_head/kernel",)] = (("norm/scale",), 16)
    assert unordered(found) == unordered(want)


def test_query_heads_of_one_value_head_share_their_factors():
    found = linen_groups(linen_model.Decoder(DECODER), TOKENS)
    (group,) = (g for g in found if g.consumers == ("layers/attention/out/kernel",))
    channels = group.channels.reshape(2, 4, 4)  # layer, query head, feature
    assert np.array_equal(channels[:, 0], channels[:, 1])  # heads 0 and 1 read value head 0
    assert np.array_equal(channels[:, 2], channels[:, 3])
    assert len(np.unique(channels[:, ::2])) == 16
    (value,) = group.producers
    assert np.array_equal(-value.factors[:, 0], channels[:, ::2])
    assert np.array_equal(group.weights[0].factors[..., 0], channels)


def test_the_factor_of_a_gated_product_goes_into_the_linear_branch():
    params = {"gate": f32(8, 12), "up": f32(8, 12), "down": f32(12, 8)}
    for flip in (False, True):

        def mlp(p, x, flip=flip):
            gate, up = jax.nn.silu(x @ p["gate"]), x @ p["up"]
            return (up * gate if flip else gate * up) @ p["down"]

        down = table(groups(mlp, params, f32(3, 8)))[("down",)]
        assert down == (("up",), 12)


def test_a_layer_norm_encoder():
    mix, kernels = "mix/", ("query", "key", "value")
    assert unordered(table(linen_groups(Encoder(), f32(2, 3, 16)))) == unordered({
        tuple(f"{mix}{k}/kernel" for k in kernels): (("n1/bias", "n1/scale"), 16),
        ("mix/out/kernel",): (("mix/value/bias", "mix/value/kernel"), 16),
        ("wide/kernel",): (("n2/bias", "n2/scale"), 16),
        ("narrow/kernel",): (None, 0),  # GELU lies between
        ("wide_relu/kernel",): (("n3/bias", "n3/scale"), 16),
        ("narrow_relu/kernel",): (("wide_relu/bias", "wide_relu/kernel"), 24),
        ("head/kernel",): (("n4/bias", "n4/scale"), 16),
    })  # fmt: skip


def test_flax_attention_modules():
    x = f32(2, 3, 8)
    want = (("value/bias", "value/kernel"), 8)
    linen = nn.MultiHeadDotProductAttention(num_heads=2)
    assert table(linen_groups(linen, x))[("out/kernel",)] == want
    module = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    graph, state = nnx.split(module)
    assert table(groups(lambda s, x: nnx.merge(graph, s)(x), state, x))[("out/kernel",)] == want


def test_a_gated_decoder_in_raw_einsum():
    assert table(groups(gated_decoder, gated_params(), TOKENS)) == {
        ("a", "b", "c"): (("g",), 32),
        ("d",): (("c",), 16),
        ("u",): (("h",), 32),
        ("w",): (("u",), 48),  # up is a slice of the fused kernel
        ("z",): (("f",), 16),
    }
    (w,) = (g for g in groups(gated_decoder, gated_params(), TOKENS) if g.consumers == ("w",))
    fused = w.producers[0].factors  # [layer, 1, gate or up, feature]
    assert (fused[:, :, 0] == 0).all() and (fused[:, :, 1] < 0).all()


def test_convolutions():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(5, (3,) * 2), _pool, nn.Dense(3)])
    assert table(linen_groups(model, f32(1, 5, 5, 2))) == {
        ("layers_0/kernel",): (None, 0),
        ("layers_2/kernel",): (("layers_0/bias", "layers_0/kernel"), 4),
        ("layers_4/kernel",): (("layers_2/bias", "layers_2/kernel"), 5),
    }


def _pool(x):
    return x.mean((1, 2))


# --- single steps -----------------------------------------------------------------------------

W = {"a": f32(6, 8), "b": f32(8, 4)}
X = f32(3, 6)


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (jnp.tanh, "tanh does not commute"),
        (lambda h: h + 1, "constant of the program"),
        (lambda h: h * h + h, "would carry the powers"),
        (lambda h: jax.nn.gelu(h) ** 2, "would carry the powers|does not commute"),
        (lambda h: jax.lax.integer_pow(h, 0), "exponent 0"),
        (lambda h: h / h.sum(-1, keepdims=True), "both operands of a product"),
        (lambda h: jnp.where(h > 1, h, 0), "gt compares it"),
        (lambda h: jnp.sort(h, -1), "sort does not commute"),
    ],
)
def test_what_does_not_commute_is_refused_with_its_reason(between, why):
    found = groups(lambda p, x: between(x @ p["a"]) @ p["b"], W, X)
    (group,) = (g for g in found if g.consumers == ("b",))
    assert not group.foldable and group.producers == () and not group.channels.any()
    assert any(re.search(why, o) for o in group.obstacles), group.obstacles


@pytest.mark.parametrize(
    "between",
    [
        jax.nn.relu,
        jax.nn.leaky_relu,
        lambda h: jnp.maximum(h, 0),
        lambda h: -jnp.abs(h) * 3 / 7,
        lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
        lambda h: jnp.where(jnp.arange(3)[:, None] > 1, h, 0),
        lambda h: jax.jit(lambda y: y[::-1])(h),
        lambda h: jnp.concatenate([h[:, 4:], h[:, :4]], 1),
        lambda h: jnp.stack(jnp.split(h, 2, 1), 1).reshape(3, 8),
        lambda h: jax.lax.cond(h.shape[0] > 1, lambda y: y, lambda y: 2 * y, h),
        lambda h: jax.lax.optimization_barrier(h),
        lambda h: h * jax.nn.sigmoid(h.shape[0] * jnp.ones((3, 1))),
        lambda h: jax.lax.fori_loop(0, 3, lambda _, y: y * 2, h),
    ],
)
def test_what_commutes_is_passed(between):
    found = groups(lambda p, x: between(x @ p["a"]) @ p["b"], W, X)
    assert table(found)[("b",)] == (("a",), 8)


def test_a_gain_that_feeds_more_than_products_is_refused():
    """Post-norm: the normalized stream is also added to what the block gives."""

    def block(p, x):
        y = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * p["g"]
        return y + jnp.tanh(y @ p["w"]) @ p["v"]

    params = {"g": f32(8), "w": f32(8, 8), "v": f32(8, 8)}
    assert table(groups(block, params, f32(3, 8)))[("w",)] == (None, 0)


def test_a_gain_shared_by_two_groups_scales_both():
    def fn(p, x):
        return jnp.tanh((x * p["g"]) @ p["w"]) + jnp.tanh((2 * x * p["g"]) @ p["v"])

    params = {"g": f32(8), "w": f32(8, 4), "v": f32(8, 4)}
    assert table(groups(fn, params, f32(3, 8))) == {("w", "v"): (("g",), 8)}


def test_a_kernel_used_by_all_iterations_has_one_factor_for_all():
    def fn(p, x):
        def body(x, g):
            return jnp.tanh((x * g) @ p["w"]), None

        return jax.lax.scan(body, x, p["g"])[0]

    params = {"g": f32(3, 8), "w": f32(8, 8)}
    (group,) = groups(fn, params, f32(2, 8))
    assert group.count == 8 and group.channels.shape == (3, 1, 8)
    assert (group.channels == group.channels[:1]).all()
    assert group.producers[0].factors.shape in [(1, 8), (3, 8)]


def test_only_some_channels_may_be_free():
    def fn(p, x):
        return jnp.concatenate([x @ p["a"], x], 1) @ p["b"]

    found = groups(fn, {"a": f32(6, 4), "b": f32(10, 3)}, X)
    (group,) = (g for g in found if g.consumers == ("b",))
    assert group.count == 4
    assert (group.channels[0] > 0).tolist() == [True] * 4 + [False] * 6
    assert any("input of the function" in o for o in group.obstacles)


def test_a_result_of_the_function_keeps_its_values():
    def fn(p, x):
        h = x @ p["a"]
        return h, h @ p["b"]

    assert table(groups(fn, W, X))[("b",)] == (None, 0)


def test_experts_have_factors_of_their_own():
    def fn(p, x):
        return jnp.einsum("ebf,efd->ebd", jnp.einsum("bd,edf->ebf", x, p["a"]), p["b"])

    found = groups(fn, {"a": f32(3, 6, 8), "b": f32(3, 8, 4)}, X)
    assert table(found)[("b",)] == (("a",), 24)


def test_the_proof_names_every_step():
    (group,) = (
        g for g in linen_groups(linen_model.Decoder(DECODER), TOKENS)
        if g.consumers == ("layers/attention/out/kernel",)
    )  # fmt: skip
    (value,) = group.producers
    assert [s.op for s in value.steps if not s.op.startswith("scan")] == [
        "dot_general", "dot_general", "reshape", "transpose",
    ]  # fmt: skip
    text = group.proof()
    assert "32 channels, 16 independent factors" in text
    assert "/value/kernel [channels(2), :, channels(2), channels(4)] is divided" in text
    assert "functional.py:" in text and "grouped_attention" in text


def test_the_analysis_is_deterministic():
    def text():
        return [g.proof() for g in linen_groups(linen_model.Decoder(DECODER), TOKENS)]

    assert text() == text()
