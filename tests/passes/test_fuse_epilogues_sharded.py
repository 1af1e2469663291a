"""fuse_epilogues on 8 host devices: in the user's shard_map, on automatic and explicit meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.passes.pipeline import evaluate
from tests.core.primitives.spmd_world import collectives, mesh_of, place
from tests.passes.quantized_programs import assert_same, run_and_gradient
from tests.passes.test_fuse_epilogues import BF16, ROWS, both, fuse, fused_equations, mlp, small

MODEL = {"gate": P(None, "model"), "up": P(None, "model"), "down": P("model")}
X = jnp.concatenate([ROWS, 2 * ROWS, -ROWS, ROWS / 3])


def rows_apart(p, x):
    return jax.shard_map(mlp, in_specs=(P(), P("data")), out_specs=P("data"))(p, x)


def columns_apart(p, x):
    def own(p, x):
        inner = jax.nn.silu(x @ p["gate"]) * (x @ p["up"])
        return x + jax.lax.psum(inner @ p["down"], "model")

    return jax.shard_map(own, in_specs=(MODEL, P("data")), out_specs=P("data"))(p, x)


# How many are found: of the second, the residual is added to a sum over devices.
@pytest.mark.parametrize(("fn", "found"), [(rows_apart, 2), (columns_apart, 1)])
def test_in_shard_map(fn, found):
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        before, after, inputs = both(fn, small(), X)
        assert len(fused_equations(after.jaxpr)) == found
        assert_same(run_and_gradient(after, inputs), run_and_gradient(before, inputs))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(kind):
    """The same collectives as without, and the result where it was."""
    mesh, x_spec = mesh_of(kind), P("data", None)
    with jax.set_mesh(mesh):
        tree = jq.ptq(jq.quantize("w4a16_g32")(mlp), small(), X)
        placed = {n: jax.device_put(w, NamedSharding(mesh, P())) for n, w in tree.items()}
        before, after, inputs = fuse(mlp, placed, place(X, mesh, x_spec))
        assert len(fused_equations(after.jaxpr)) == 2

        def outs(program):
            return lambda *flat: evaluate(program, flat)[0]

        assert_same(run_and_gradient(after, inputs), run_and_gradient(before, inputs))
        got = jax.jit(outs(after))(*inputs)
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, x_spec), 2)
        assert collectives(outs(after), *inputs) == collectives(outs(before), *inputs) == {}
    want = mlp(jax.tree.map(_whole, tree, is_leaf=_is_weight), X)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def _is_weight(leaf):
    return isinstance(leaf, jq.QTensor)


def _whole(leaf):
    return leaf.dequantize() if _is_weight(leaf) else leaf


def test_kernels_in_shard_map_have_epilogues():
    """Lowered for 8 TPUs: a device's own product and what follows it are one launch."""
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    kinds = (AxisType.Auto,) * 2
    mesh = AbstractMesh((2, 4), ("data", "model"), axis_types=kinds, abstract_device=device)
    shapes = jq.ptq(jq.quantize("w4a16_g64")(mlp), small(dtype=BF16), X.astype(BF16))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (shapes, X))
    with jax.sharding.use_abstract_mesh(mesh):
        _, after, inputs = fuse(rows_apart, shapes[0], shapes[1].update(dtype=BF16))
        traced = jax.jit(lambda *flat: evaluate(after, flat)).trace(*inputs)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2 and "gated_int4_g64" in text
