"""What the verifier says is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.passes.program import trace
from jaxquant.passes.verify import VerificationError, Verifier, survivors

X = jnp.ones((8, 4))


def floats(p, x):
    return x @ p


def with_name(p, x):
    return checkpoint_name(x @ p, "product")


def with_effect(p, x):
    out = x @ p
    jax.debug.callback(lambda _: None, out)
    return out


def with_constraint(p, x):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.lax.with_sharding_constraint(x @ p, NamedSharding(mesh, PartitionSpec("d")))


def with_donation(p, x):
    return jax.jit(lambda x: x @ p, donate_argnums=0)(x)


def with_all_in_a_loop(p, x):
    def step(c, _):
        return with_name(p, with_effect(p, c)), None

    return jax.lax.scan(step, x, None, length=2)[0]


W = jnp.eye(4)


@pytest.mark.parametrize(
    ("fn", "lost"),
    [
        (with_name, "checkpoint_name 'product'"),
        (with_effect, "effect of debug_callback"),
        (with_constraint, "sharding constraint"),
        (with_donation, "donated buffer"),
        (with_all_in_a_loop, "checkpoint_name 'product'"),
    ],
)
def test_each_loss_is_named(fn, lost):
    before, after = trace(fn, W, (X,)), trace(floats, W, (X,))
    verifier = Verifier(full=True)
    with pytest.raises(VerificationError, match=lost):
        verifier.check_change(before, after, outputs=True, retraced=False)
    verifier.check_change(after, before, outputs=True, retraced=False)  # more is no loss


def test_a_retraced_weight_may_carry_its_constraint_and_donation_otherwise():
    """What real models do to weights, through the whole pipeline, verified."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(p, x):
        constrain = jax.lax.with_sharding_constraint
        w = constrain(checkpoint_name(p["w"], "weight"), NamedSharding(mesh, PartitionSpec("d")))
        x = constrain(x, NamedSharding(mesh, PartitionSpec("d")))
        return jax.jit(lambda w, x: x @ w, donate_argnums=0)(w, x)

    params, x = {"w": jax.random.normal(jax.random.key(0), (16, 8))}, jnp.ones((8, 16))
    quantized = jq.ptq(jq.quantize("w8a16")(fn), params, x)
    expected = x @ quantized["w"].dequantize()
    np.testing.assert_allclose(jq.transform(fn)(quantized, x), expected, rtol=1e-5, atol=1e-5)
    jaxpr = str(jq.compile(fn, quantized, x).jaxpr)
    assert jaxpr.count("sharding_constraint[") == 3  # codes, scale, x
    assert jaxpr.count("name=weight") == 2
    jq.calibrate(fn, params, x, statistics="absmax")
    jq.qat(fn, "w8a16")(params, x)


def test_survivors_are_counted_in_every_body():
    found = survivors(trace(with_all_in_a_loop, W, (X,)).jaxpr)
    assert found == {"checkpoint_name 'product'": 1, "effect of debug_callback": 1}


def test_inputs_and_their_description_must_agree():
    program = trace(floats, W, (X,))
    with pytest.raises(VerificationError, match="describes 1 inputs, its jaxpr has 2"):
        Verifier(full=False).check(program.with_jaxpr(program.jaxpr, inputs=program.inputs[:1]))


def test_references_are_no_outputs_of_what_is_checked():
    def fn(p, x):
        ref = jax.new_ref(x)
        ref[...] = jnp.tanh(ref[...] @ p)
        return ref[...]

    program = trace(fn, jnp.eye(4), (X,))
    Verifier(full=True).check(program)
