"""What users write around and inside of quantized weights: nothing raises, and values are right.

Every program of `user_programs` is compared with the same program on the dequantized weights, in
float64; mapped and differentiated where it can be. With int8 inputs the passes that share, elide
and fuse are compared with the program before them. Programs are verified in full and as by default.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.schemes import ActScheme
from jaxquant.passes.elide_roundtrips import ElideRoundtrips
from jaxquant.passes.fuse_siblings import FuseSiblings
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import apply, assert_same, quantized
from tests.passes.random_programs import primitives_of
from tests.passes.user_programs import PROGRAMS, dependent_on_the_platform
from tests.passes.zoo import quantize_axes

# Cheap to compile: each program runs once.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def weights(act=None):
    keys = {"w": 0, "v": 1}
    return {
        name: quantize_axes(jax.random.normal(jax.random.key(k), (8, 8), jnp.float64) / 3, (0,))
        .replace(act=act)
        for name, k in keys.items()
    }  # fmt: skip


def outcomes(fn, may, x):
    """Values, and of what may be done to the program gradients and values of several examples."""

    def loss(x):
        return jnp.sin(fn(x)).sum()

    found = {"values": fn(x)}
    if "g" in may:
        found["gradient"] = jax.grad(loss)(x)
    if "m" in may:
        found["mapped"] = jax.vmap(fn)(jnp.stack([x, -2 * x]))
    if may == "gm":
        found["mapped gradient"] = jax.vmap(jax.grad(loss))(jnp.stack([x, -2 * x]))
    return found


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile(compiler_options=_OPTIONS)(*args)


def x_of_rows():
    return jax.random.normal(jax.random.key(2), (8, 8), jnp.float64)


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_as_the_dequantized_program(fn, monkeypatch):
    tree, x = weights(), x_of_rows()
    floats = {name: w.dequantize() for name, w in tree.items()}
    after = jax.make_jaxpr(jq.transform(fn))(tree, x)
    assert any(name.startswith("quantized_") for name in primitives_of(after))
    monkeypatch.delenv("JAXQUANT_VERIFY")
    assert primitives_of(jax.make_jaxpr(jq.transform(fn))(tree, x)) == primitives_of(after)

    def both(tree, floats, x):
        run = (lambda x: jq.transform(fn)(tree, x)), (lambda x: fn(floats, x))
        return [outcomes(one, PROGRAMS[fn], x) for one in run]

    got, want = compiled(both, tree, floats, x)
    tolerance = 1e-5 if "3" in PROGRAMS[fn] else 1e-9
    for what in want:
        scale = np.abs(want[what]).max()
        np.testing.assert_allclose(got[what], want[what], atol=tolerance * scale, err_msg=what)


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_passes_change_no_bit(fn):
    program, inputs = quantized(fn, weights(ActScheme()), x_of_rows())
    after = apply(program, ShareActivationQuant(), ElideRoundtrips(), FuseSiblings())

    def both(*inputs):
        runs = [lambda x, p=p: evaluate(p, [*inputs[:-1], x])[0] for p in (after, program)]
        may = PROGRAMS[fn].replace("m", "")
        return [outcomes(run, may, inputs[-1]) for run in runs]

    assert_same(*compiled(both, *inputs))


def test_calibration_and_training_keep_a_branch_to_its_platform():
    tree, x = weights(), x_of_rows()
    floats = {name: w.dequantize() for name, w in tree.items()}
    stats = jq.calibrate(dependent_on_the_platform, floats, x, statistics="absmax")
    np.testing.assert_allclose(stats["v"]["absmax"], np.abs(x).max(), rtol=1e-6)
    trained = jq.qat(dependent_on_the_platform, "w8a16")(floats, x)
    quantized = jq.ptq(jq.quantize("w8a16")(dependent_on_the_platform), floats, x)
    expected = jq.transform(dependent_on_the_platform)(quantized, x)
    np.testing.assert_allclose(trained, expected, atol=1e-6)
