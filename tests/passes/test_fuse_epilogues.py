"""fuse_epilogues: what is found, the same bits where no kernel takes it, and what kernels give."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, check_jaxpr
from jax.sharding import AbstractDevice, AbstractMesh

import jaxquant as jq
from jaxquant.core.primitives import fused_epilogue_p
from jaxquant.core.primitives.fused import Fused
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.dispatch import Place
from jaxquant.passes.count import count
from jaxquant.passes.edit_jaxpr import all_bodies
from jaxquant.passes.fuse_epilogues import FuseEpilogues
from jaxquant.passes.fuse_siblings import FuseSiblings
from jaxquant.passes.lower_to_kernels import LowerToKernels
from jaxquant.passes.pass_manager import PassManager
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import (
    DYNAMIC,
    apply,
    assert_same,
    quantized,
    run,
    run_and_gradient,
    weight,
)

SHARE, SIBLINGS, EPILOGUES = ShareActivationQuant(), FuseSiblings(), FuseEpilogues()
X = jax.random.normal(jax.random.key(9), (2, 6, 16))
BF16 = jnp.bfloat16


def tree(act=None, **kwargs):
    make = functools.partial(weight, act=act, **kwargs)
    return {
        "gate": make(0, 16, 24),
        "up": make(1, 16, 24),
        "down": make(2, 24, 16),
        "square": make(3, 16, 16),
        "heads": make(4, 16, 3, 8),
        "wide": jax.random.normal(jax.random.key(5), (24,)),
        "narrow": jax.random.normal(jax.random.key(6), (16,)),
        "a_head": jax.random.normal(jax.random.key(7), (8,)),
    }


def by_exponential(x):
    return x / (1 + jnp.exp(-x))


def swish_by_quotient(x):
    return x * (1 / (1 + jnp.exp(-x)))


def gate(p, x, silu=jax.nn.silu):
    return silu(x @ p["gate"]) * (x @ p["up"])


def times(x, w, dtype=BF16):
    """The product in another dtype."""
    return jnp.matmul(x, w, preferred_element_type=dtype).astype(dtype)


def in_bfloat16(p, x):
    x = x.astype(BF16)
    opened = jax.nn.silu(times(x, p["gate"]).astype(jnp.float32))
    return opened.astype(BF16) * times(x, p["up"])


FOUND = {
    "gated": (gate, "silu(gate) times up"),
    "up first": (lambda p, x: (x @ p["up"]) * nn.silu(x @ p["gate"]), "silu(gate) times up"),
    "sigmoid": (lambda p, x: gate(p, x, lambda y: y * nn.sigmoid(y)), "silu(gate) times up"),
    "exponential": (lambda p, x: gate(p, x, by_exponential), "silu(gate) times up"),
    "quotient": (lambda p, x: gate(p, x, swish_by_quotient), "silu(gate) times up"),
    "jitted": (lambda p, x: gate(p, x, jax.jit(nn.swish)), "silu(gate) times up"),
    "float32 inside": (in_bfloat16, "silu(gate) times up"),
    "both biases": (
        lambda p, x: nn.silu(x @ p["gate"] + p["wide"]) * (x @ p["up"] + 2 * p["wide"]),
        "silu(gate) times up, with biases",
    ),
    "one bias": (
        lambda p, x: nn.silu(x @ p["gate"]) * (x @ p["up"] + p["wide"]),
        "silu(gate) times up, with biases",
    ),
    "bias": (lambda p, x: x @ p["gate"] + p["wide"], "bias"),
    "bias of heads": (
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["heads"]) + p["a_head"],
        "bias",
    ),
    "bias of a transposed product": (
        lambda p, x: jnp.einsum("dn,btd->nbt", p["gate"], x) + p["wide"][:, None, None],
        "bias",
    ),
    "residual": (lambda p, x: x + x @ p["square"], "residual"),
    "bias and residual": (
        lambda p, x: jnp.tanh(x) + (x @ p["square"] + p["narrow"]),
        "bias and residual",
    ),
    "converted": (
        lambda p, x: x + times(x, p["square"]).astype(jnp.float32),
        "residual",
    ),
    "two products": (lambda p, x: jnp.sin(x) @ p["square"] + x @ p["square"], "residual"),
    "residual of one row": (lambda p, x: (x + x @ p["square"])[:1], "residual"),
}


def fused_equations(jaxpr):
    return [e for body in all_bodies(jaxpr) for e in body.eqns if e.primitive is fused_epilogue_p]


def fuse(fn, tree, *args):
    program, inputs = quantized(fn, tree, *args)
    before = apply(program, SHARE, SIBLINGS)
    return before, apply(before, EPILOGUES), inputs


QUANTIZED_INPUTS = [(name, DYNAMIC) for name in ("float32 inside", "bias and residual")]


@pytest.mark.parametrize(("name", "act"), [*((n, None) for n in FOUND), *QUANTIZED_INPUTS], ids=str)
def test_found_with_the_same_bits_and_gradients(name, act):
    fn, words = FOUND[name]
    before, after, inputs = fuse(fn, tree(act), X)
    (eqn,) = fused_equations(after.jaxpr)
    assert str(Fused.make(eqn.params["jaxpr"]).epilogue) == words
    check_jaxpr(eqn.params["jaxpr"].jaxpr)
    assert count(before.jaxpr).launches == count(after.jaxpr).launches
    assert_same(run_and_gradient(after, inputs), run_and_gradient(before, inputs))
    assert_same(evaluate(after, inputs), evaluate(before, inputs))  # eagerly


def halves(p, x):
    q, k, v = (x @ p[name] for name in ("gate", "up", "square"))
    return [q + p["wide"], k + p["wide"], v + p["narrow"]]


def marked(p, x):
    return nn.silu(checkpoint_name(x @ p["gate"], "gate")) * (x @ p["up"])


LEFT = {
    "gelu": lambda p, x: nn.gelu(x @ p["gate"]) * (x @ p["up"]),
    "two readers of the gate": lambda p, x: [g := x @ p["gate"], nn.silu(g) * (x @ p["up"])],
    "two readers of silu": lambda p, x: [s := nn.silu(x @ p["gate"]), s * (x @ p["up"])],
    "other inputs": lambda p, x: nn.silu(x @ p["gate"]) * (jnp.sin(x) @ p["up"]),
    "the gate alone": lambda p, x: nn.silu(x @ p["gate"]),
    "three siblings": halves,
    "a checkpoint name": marked,
    "float16": lambda p, x: times(x, p["gate"], jnp.float16) + p["wide"].astype(jnp.float16),
    "float16 between": lambda p, x: (
        times(x, p["square"]).astype(jnp.float16).astype(jnp.float32) + x
    ),
    "spread product": lambda p, x: x[:1] @ p["square"] + x,
    "a number": lambda p, x: x @ p["square"] + 0.5,
    "a bias of rows": lambda p, x: x @ p["square"] + x[..., :1],
    "a squared sigmoid": lambda p, x: (x @ p["gate"]) * nn.sigmoid(x @ p["up"]),
    "nothing": lambda p, x: x @ p["square"],
}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_it_is(name):
    program, _ = quantized(LEFT[name], tree(), X)
    before = apply(program, SHARE, SIBLINGS)
    assert EPILOGUES.run(before).program is before


def launch_of(eqn, place):
    """What runs at a place, interpreted: a function of the equation's operands; or why none."""
    closed = eqn.params["jaxpr"]
    fused = Fused.make(closed)
    launch = fused.choose(place, None)
    if isinstance(launch, str):
        return launch
    multiply = launch.multiply
    interpreted = dataclasses.replace(
        launch, multiply=lambda *a, interpret, **k: multiply(*a, interpret=True, **k)
    )

    def fn(*args):
        known = dict(zip(closed.jaxpr.invars, args, strict=True))
        return fused.run(interpreted, known.__getitem__)

    return jax.jit(fn)


K = 256
WIDE = jax.random.normal(jax.random.key(10), (2, 5, K))


STATIC = jq.Recipe(
    "static",
    (
        jq.Rule(
            "**",
            weight=jq.WeightScheme("int4", group_size=64),
            act=jq.ActScheme("int8", mode="static"),
        ),
    ),
)


def deep(fn, recipe="w4a16_g64"):
    """The quantized program of weights that kernels take, and its inputs."""
    shapes = {"gate": (K, 384), "up": (K, 384), "square": (K, K), "heads": (K, 4, 64)}
    shapes |= {"wide": (384,), "narrow": (K,), "a_head": (64,)}
    p = {n: jax.random.normal(jax.random.key(i), s) / 16 for i, (n, s) in enumerate(shapes.items())}
    p = jq.ptq(jq.quantize(recipe)(fn), p, WIDE, calibration=[WIDE] if recipe is STATIC else None)
    _, after, inputs = fuse(fn, p, WIDE)
    return p, after.jaxpr.jaxpr, inputs


def operands(jaxpr, eqn, inputs):
    """What an equation of a jaxpr is given."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for ahead in jaxpr.eqns[: jaxpr.eqns.index(eqn)]:
        given = [a.val if isinstance(a, Literal) else known[a] for a in ahead.invars]
        outs = ahead.primitive.bind(*given, **ahead.params)
        known.update(zip(ahead.outvars, outs if ahead.primitive.multiple_results else [outs]))
    return [known[a] for a in eqn.invars]


KERNELS = [
    *("gated", "up first", "float32 inside", "both biases", "one bias", "bias of heads"),
    *("bias of a transposed product", "bias and residual", "converted", "two products"),
]


def exact(fn, p):
    """In float64, of the weights that the codes stand for."""

    def wide(a):
        a = a.dequantize() if isinstance(a, QTensor) else a
        return jnp.asarray(np.asarray(a, np.float64))

    with jax.enable_x64():
        p = jax.tree.map(wide, p, is_leaf=lambda a: isinstance(a, QTensor))
        return np.asarray(jax.jit(fn)(p, wide(WIDE)), np.float64)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_against_float64(name):
    """One launch, interpreted: as near to the exact result as rounding x and the result allows."""
    fn, _ = FOUND[name]
    p, jaxpr, inputs = deep(fn)
    (eqn,) = fused_equations(jaxpr)
    given, want = operands(jaxpr, eqn, inputs), exact(fn, p)
    several = name in ("gated", "bias and residual")
    for chip in ("TPU v5e", "TPU v6 lite", "TPU v4")[: 3 if several else 1]:
        got = launch_of(eqn, Place("tpu", chip))(*given)
        assert got.dtype == eqn.outvars[0].aval.dtype
        got = np.asarray(got.astype(jnp.float32), np.float64)
        np.testing.assert_allclose(got, want, atol=2**-6 * np.abs(want).max())


@pytest.mark.parametrize("recipe", ["w4a8_g64", STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["both biases", "bias and residual"])
def test_kernels_with_quantized_inputs(name, recipe):
    """The codes of x are the same in both, which leaves the float32 of scales and sums."""
    _, jaxpr, inputs = deep(FOUND[name][0], recipe)
    (eqn,) = fused_equations(jaxpr)
    given = operands(jaxpr, eqn, inputs)
    (want,) = jax.core.eval_jaxpr(eqn.params["jaxpr"].jaxpr, (), *given)
    got = launch_of(eqn, Place("tpu", "TPU v5e"))(*given)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_what_is_read_stays_outside():
    """Only the product and what follows it are in the body; two products are two launches."""
    fn = FOUND["two products"][0]
    _, after, _ = fuse(fn, tree(), X)
    (eqn,) = fused_equations(after.jaxpr)
    assert [e.primitive.name for e in eqn.params["jaxpr"].jaxpr.eqns] == [
        "quantized_dot_general",
        "add",
    ]
    names = [e.primitive.name for e in after.jaxpr.jaxpr.eqns]
    assert names == ["sin", "quantized_dot_general", "fused_epilogue"]


def mlp(p, x):
    y = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + (nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def small(key=0, dtype=jnp.float32):
    shapes = {"gate": (128, 256), "up": (128, 256), "down": (256, 128)}
    keys = jax.random.split(jax.random.key(key), 3)
    return {
        n: (jax.random.normal(k, s) / 12).astype(dtype)
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


def stacked(layers):
    return jax.tree.map(lambda *a: jnp.stack(a), *[small(i) for i in range(layers)])


ROWS = jax.random.normal(jax.random.key(30), (4, 128))
V6E = Place("tpu", "TPU v6 lite")


def both(fn, tree, *args):
    """The program with and without epilogues, and its inputs."""
    tree = jq.ptq(jq.quantize("w4a16_g64")(fn), tree, *args)
    return fuse(fn, tree, *args)


def scanned(p, x):
    layer = jax.checkpoint(lambda x, p: (mlp(p, x), None), policy=POLICY)
    return jax.lax.scan(layer, x, p)[0]


POLICY = jax.checkpoint_policies.dots_saveable


def test_scan_of_remat():
    before, after, inputs = both(scanned, stacked(3), ROWS)
    assert len(fused_equations(after.jaxpr)) == 2
    assert count(after.jaxpr).launches == count(before.jaxpr).launches == 6
    assert_same(run(after, inputs), run(before, inputs))
    got, want = (run_and_gradient(program, inputs)[1] for program in (after, before))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def branches(p, x):
    return jax.lax.cond(x.sum() > 0, lambda x: mlp(p, x), lambda x: x - mlp(p, -x), x)


def test_branches_and_jit():
    for fn in (branches, jax.jit(mlp), jax.jit(jax.checkpoint(mlp))):
        before, after, inputs = both(fn, small(), ROWS)
        assert fused_equations(after.jaxpr)
        assert_same(run_and_gradient(after, inputs), run_and_gradient(before, inputs))


def test_vmap_stays_one_equation():
    before, after, inputs = both(mlp, small(), ROWS)
    batch = jnp.stack([ROWS, 2 * ROWS, -ROWS])

    def outs(program, x):
        return evaluate(program, [*inputs[:-1], x])[0]

    mapped = jax.vmap(lambda x: outs(after, x), in_axes=1, out_axes=1)
    across = jnp.moveaxis(batch, 0, 1)
    eqns = fused_equations(jax.make_jaxpr(mapped)(across))
    assert [Fused.make(e.params["jaxpr"]) is None for e in eqns] == [False, False]
    want = jnp.stack([outs(before, x) for x in batch], 1)
    np.testing.assert_allclose(mapped(across), want, rtol=1e-5, atol=1e-5)

    def norm_of_gradient(program, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(outs(program, x))))(x) ** 2)

    second = [
        jax.jit(jax.vmap(jax.grad(lambda x, p=p: norm_of_gradient(p, x)))) for p in (after, before)
    ]
    np.testing.assert_allclose(*(fn(batch) for fn in second), rtol=1e-4, atol=1e-4)


def test_weights_that_are_mapped():
    """vmap over layers of weights: batched products, whatever becomes of them, give the same."""
    trees = stacked(2)
    before, after, inputs = both(lambda p, x: jax.vmap(mlp)(p, x), trees, jnp.stack([ROWS, ROWS]))
    assert_same(run(after, inputs), run(before, inputs))
    _, inner, flat = both(mlp, small(), ROWS)
    doubled = [jnp.stack([a, a]) for a in flat]
    outs = jax.vmap(lambda *flat: evaluate(inner, flat)[0])(*doubled)
    np.testing.assert_allclose(outs[1], evaluate(inner, flat)[0], rtol=1e-5, atol=1e-5)


def test_transposes_of_linear_ones():
    _, after, inputs = both(lambda p, x: x + x @ p["up"][:, :128], small(), ROWS)
    fn = lambda x: evaluate(after, [*inputs[:-1], x])[0]  # noqa: E731
    assert len(fused_equations(jax.make_jaxpr(fn)(ROWS))) == 1
    (got,) = jax.linear_transpose(fn, ROWS)(ROWS)
    np.testing.assert_allclose(got, jax.vjp(fn, ROWS)[1](ROWS)[0], rtol=1e-6)


def test_equal_layers_share_a_body():
    """So that JAX lowers it once."""

    def fn(p, x):
        for layer in p:
            x = mlp(layer, x)
        return x

    _, after, _ = both(fn, [small(i) for i in range(3)], ROWS)
    eqns = fused_equations(after.jaxpr)
    assert len(eqns) == 6 and len({id(e.params["jaxpr"]) for e in eqns}) == 2


def test_what_is_refused():
    _, after, _ = both(mlp, small(), ROWS)
    eqn = fused_equations(after.jaxpr)[0]
    wrong = [jax.ShapeDtypeStruct((1, 2), jnp.float32) for _ in eqn.invars]
    with pytest.raises(TypeError, match="fused_epilogue of .* was given"):
        jax.eval_shape(lambda *args: fused_epilogue_p.bind(*args, **eqn.params), *wrong)


MODEL_PLACES = {
    V6E: ["silu(gate) times up in its launch"] * 2 + ["residual in its launch"],
    Place("tpu", "TPU v6 lite", devices=2): [""] * 3,
    Place("cpu"): [""] * 3,
    Place("cuda", "NVIDIA H100"): [""] * 3,
}


@pytest.mark.parametrize("place", MODEL_PLACES, ids=str)
def test_the_plan_says_what_is_in_a_launch(place):
    _, after, _ = both(mlp, small(), ROWS)
    found = LowerToKernels(place).run(after).program.facts["lowerings"]
    assert [one.shapes[1] for one in found] == [(128, 256)] * 2 + [(256, 128)]
    for one, words in zip(found, MODEL_PLACES[place], strict=True):
        assert words in one.reason and ("launch" in one.reason) == bool(words)
        assert "test_fuse_epilogues.py" in one.where


def test_the_plan_says_why_it_is_apart():
    shapes = {"gate": (65536, 128), "up": (65536, 128)}
    p = {n: jnp.zeros(s) for n, s in shapes.items()}
    _, after, _ = both(gate, p, jnp.zeros((256, 65536)))
    v5e = Place("tpu", "TPU v5e")
    first, second = LowerToKernels(v5e).run(after).program.facts["lowerings"]
    assert first.reason == second.reason
    assert "silu(gate) times up apart: blocks of two weights with k = 65536" in first.reason


def test_a_forced_implementation_goes_into_the_body():
    _, after, inputs = both(mlp, small(), ROWS)
    pinned = PassManager([LowerToKernels(V6E, "xla")], verify="all").run(after)
    assert "implementation=None" not in str(pinned.jaxpr)
    assert all("asked for" in one.reason for one in pinned.facts["lowerings"])
    assert_same(run(pinned, inputs), run(after, inputs))
    with pytest.raises(ValueError, match="implementation='pallas', but no kernel fits"):
        LowerToKernels(Place("cpu"), "pallas").run(after)


def test_a_model_is_lowered_to_two_launches():
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        before, after, inputs = both(mlp, small(dtype=BF16), ROWS.astype(BF16))
        pinned = LowerToKernels(V6E, "xla").run(after).program
        one_each, fused, by_xla = (
            jax.jit(lambda *flat, p=program: evaluate(p, flat))
            .trace(*inputs)
            .lower(lowering_platforms=("tpu",))
            .as_text()
            for program in (before, after, pinned)
        )
    assert one_each.count("@tpu_custom_call") == fused.count("@tpu_custom_call") == 2
    assert "gated_int4_g64" in fused and "gated_int4_g64" not in one_each
    assert "exponential" in one_each and "exponential" not in fused
    assert "@tpu_custom_call" not in by_xla and "exponential" in by_xla
