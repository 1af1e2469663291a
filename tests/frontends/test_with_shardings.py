"""`jq.with_shardings` on whole models, and what becomes of its records."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.core.layout import MeshLayout
from jaxquant.core.qtensor import is_qtensor
from tests.core.primitives.spmd_world import AUTO, kernels_on_cpu, mesh_of, place, place_weight

MESH = (("data", 2), ("model", 4))


@jq.quantize("w4a16_g32")
class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 32, rngs=rngs)
        self.down = nnx.Linear(32, 64, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def layouts(model):
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=is_qtensor)
    return [leaf.mesh_layout for leaf in leaves if is_qtensor(leaf)]


def test_nnx_models():
    mesh, x = mesh_of(AUTO), jnp.ones((8, 64))
    model = jq.ptq(Net(nnx.Rngs(0)), x)
    graph, state = nnx.split(model)
    specs = {32: P("model", None), 64: P(None, "model")}
    placed = nnx.merge(graph, jax.tree.map(lambda a: place(a, mesh, P()), state))
    for layer in (placed.up, placed.down):
        kernel = layer.kernel.get_value()
        layer.kernel.set_value(place_weight(kernel, mesh, specs[kernel.shape[0]]))
    after = jq.with_shardings(placed, batch_axes="data")
    assert layouts(after) == [  # down, up
        MeshLayout(MESH, (("model",), ()), ("data",)),
        MeshLayout(MESH, ((), ("model",)), ("data",)),
    ]
    assert after is not placed and layouts(model) == [None, None]
    np.testing.assert_allclose(after(x), model(x), rtol=1e-5, atol=1e-6)


def test_checkpoints_do_not_hold_them(tmp_path):
    mesh = mesh_of(AUTO)
    w = place_weight(jq.quantize_array(jnp.ones((64, 32)), "int4", (16, 1)), mesh, P("model"))
    assert w.mesh_layout == MeshLayout(MESH, (("model",), ()), ("data",))
    jq.save(tmp_path / "w", {"w": w})
    sharding = NamedSharding(mesh, P("model", None))
    back = jq.restore(tmp_path / "w", sharding=sharding)
    assert back["w"].mesh_layout is None
    again = jq.with_shardings(back, batch_axes=("data",))
    assert jax.tree.structure(again["w"]) == jax.tree.structure(w)


def test_wrong_records_change_no_value(monkeypatch):
    """Recorded as split along the other axis: operands are moved, results are the same."""
    problems = kernels_on_cpu(monkeypatch)
    mesh, x = mesh_of(AUTO), jax.random.normal(jax.random.key(0), (8, 64))
    w = jq.quantize_array(jax.random.normal(jax.random.key(1), (64, 32)), "int4", (16, 1))
    right = place_weight(w, mesh, P(None, "model"))
    wrong = right.replace(mesh_layout=place_weight(w, mesh, P("model", None)).mesh_layout)
    fn = jax.jit(jq.transform(lambda w, x: x @ w))
    x = place(x, mesh, P("data", None))
    np.testing.assert_allclose(fn(wrong, x), fn(right, x), rtol=1e-5, atol=1e-5)
    assert {(p.k, p.n) for p in problems} == {(16, 32), (64, 8)}  # plan and lowering
    jax.clear_caches()
