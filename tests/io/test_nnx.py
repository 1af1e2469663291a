"""NNX models in checkpoints: states without a template, and values put into new models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant import io
from jaxquant.core.qtensor import QTensor
from jaxquant.core.quantize_array import quantize_array
from tests.io.trees import assert_same


class Counter(nnx.Variable):
    """A variable type of the user's own."""


class Model(nnx.Module):
    """Layers in a list, batch statistics, random state, metadata, a shared parameter."""

    def __init__(self, width: int = 8, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(16, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.first.kernel
        self.counter = Counter(jnp.zeros((), jnp.int32), note=("plain", 1.5, None))

    def __call__(self, x):
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = block(x)
        self.counter[...] += 1
        return self.dropout(x)


def quantized(model: nnx.Module) -> nnx.Module:
    """A new model with QTensors in its kernels."""
    graphdef, state = nnx.split(model)

    def convert(path, variable):
        if path[-1] != "kernel":
            return variable
        value = quantize_array(variable.get_value(), "int4", (8, 1), name=str(path))
        return variable.replace(value)

    pairs = [(path, convert(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(pairs))


def test_state_comes_back_without_a_template(tmp_path):
    model = quantized(Model(rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    io.save(tmp_path / "state", state)
    assert_same(io.restore(tmp_path / "state"), state)
    io.save(tmp_path / "model", model)
    got = io.restore(tmp_path / "model")
    assert_same(got, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert isinstance(got["first"]["kernel"].get_value(), QTensor)


@pytest.mark.parametrize("abstract", [False, True])
def test_model_comes_back_as_a_new_model(abstract, tmp_path):
    model = Model(rngs=nnx.Rngs(0))
    model(jnp.ones((2, 16)))
    model.eval()
    saved = quantized(model)
    io.save(tmp_path / "c", saved)

    def make():
        return Model(rngs=nnx.Rngs(1))

    target = nnx.eval_shape(make) if abstract else make()
    before = nnx.state(target)
    got = io.restore(tmp_path / "c", model=target)
    assert type(got) is Model and got is not target
    assert_same(nnx.state(got), nnx.state(saved))
    assert got.tied is got.first.kernel
    assert int(got.counter[...]) == 1
    if not abstract:  # the caller's model is as it was
        assert_same(nnx.state(target), before)


def test_pure_dicts_go_into_a_model(tmp_path):
    model = Model(rngs=nnx.Rngs(0))
    io.save(tmp_path / "c", nnx.to_pure_dict(nnx.state(model)))
    got = io.restore(tmp_path / "c", model=Model(rngs=nnx.Rngs(1)))
    assert_same(nnx.state(got), nnx.state(model))


def test_sharded_by_metadata(tmp_path):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        kernel = nnx.Param(jnp.arange(32.0).reshape(4, 8), out_sharding=(None, "model"))
    state = nnx.State({"kernel": kernel, "bias": nnx.Param(jnp.ones((8,)))})
    io.save(tmp_path / "c", state)
    got = io.restore(tmp_path / "c", sharding=mesh)
    assert_same(got, state)
    assert got["kernel"].get_value().sharding == NamedSharding(mesh, P(None, "model"))
    assert got["bias"].get_value().sharding.is_fully_replicated


def test_metadata_that_cannot_be_saved_is_told(tmp_path):
    state = nnx.State({"x": nnx.Param(jnp.ones(2), init=lambda: 0, kept=1)})
    with pytest.warns(UserWarning, match="'x': metadata init of the Param is not saved"):
        io.save(tmp_path / "c", state)
    got = io.restore(tmp_path / "c")["x"]
    assert got.get_metadata("kept") == 1 and "init" not in got.get_metadata()
    np.testing.assert_array_equal(got.get_value(), [1, 1])


def test_another_model_is_refused(tmp_path):
    io.save(tmp_path / "c", quantized(Model(rngs=nnx.Rngs(0))))

    def refused(model, error, message):
        with pytest.raises(error, match=message):
            io.restore(tmp_path / "c", model=model)

    refused(
        Model(4, rngs=nnx.Rngs(0)), io.CheckpointError, r"has the shape \(.*8.*\); in the model"
    )
    refused(
        nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
        io.CheckpointError,
        "of another model: it lacks 'bias', 'kernel' and has 'blocks/0/bias'",
    )
    refused({"a": 1}, TypeError, "model must be an nnx.Module .* not dict")
    other = Model(rngs=nnx.Rngs(0))
    other.counter = nnx.BatchStat(jnp.zeros((), jnp.int32))
    refused(other, io.CheckpointError, "'counter' is a Counter; in the model it is a BatchStat")
    io.save(tmp_path / "list", [jnp.ones(2)])
    with pytest.raises(io.CheckpointError, match="holds a list, not the state of an NNX model"):
        io.restore(tmp_path / "list", model=other)


def test_a_module_inside_of_a_tree_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot save 'm': an NNX module inside of a tree"):
        io.save(tmp_path / "c", {"m": nnx.Linear(2, 2, rngs=nnx.Rngs(0))})


def test_variable_types_of_the_model_need_no_types_argument(tmp_path):
    def make():
        class Local(nnx.Variable):
            pass

        class Holder(nnx.Module):
            def __init__(self):
                self.x = Local(jnp.ones(3))

        return Holder(), Local

    model, local = make()
    io.save(tmp_path / "c", model)
    assert type(io.restore(tmp_path / "c", model=model).x) is local
    assert type(io.restore(tmp_path / "c", types=[local])["x"]) is local
    with pytest.raises(io.CheckpointError, match=r"'x' was saved as .*Local'"):
        io.restore(tmp_path / "c")
    assert io.inspect(tmp_path / "c").container == "nnx.Module"
