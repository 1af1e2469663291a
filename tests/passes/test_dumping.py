"""Dumps: the files, what is in them, and the environment variable."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxquant as jq
from jaxquant.passes import dump
from jaxquant.passes.dumping import difference


def net(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


P, X = {"w": jnp.ones((4, 8))}, jnp.ones((2, 4))


@pytest.fixture
def quantized():
    return jq.ptq(jq.quantize("w8a8")(net), P, X)


def test_each_pass_gets_a_numbered_file_and_a_diff(quantized, tmp_path):
    with dump(tmp_path / "d") as folder:
        jq.compile(net, quantized, X)
        jq.compile(net, quantized, X)
    jq.compile(net, quantized, X)  # outside: nothing is written
    assert sorted(p.name for p in folder.iterdir()) == ["000-net", "001-net"]
    names = sorted(p.name for p in (folder / "000-net").iterdir())
    assert names[:3] == ["00-input.txt", "01-insert_scales.diff", "01-insert_scales.txt"]
    before = (folder / "000-net" / "00-input.txt").read_text()
    after = (folder / "000-net" / "01-insert_scales.txt").read_text()
    assert "# stage float" in before and "quantized_dot_general" not in before
    assert "# input 0: w codes" in after and after.count("quantized_dot_general[") == 2
    assert after.count("# w: dot_general -> xla: ") == 2  # the decisions
    diff = (folder / "000-net" / "01-insert_scales.diff").read_text()
    assert any(x.startswith("- ") and "dot_general" in x for x in diff.splitlines())
    assert any(x.startswith("+ ") and "quantized_dot_general" in x for x in diff.splitlines())
    assert not any(x[0] in "+-" and "tanh" in x for x in diff.splitlines())


def test_the_same_program_twice_gives_the_same_text(quantized, tmp_path):
    with dump(tmp_path) as folder:
        jq.compile(net, quantized, X)
        jq.compile(net, quantized, X)
    texts = [
        "".join(
            line
            for path in sorted((folder / name).glob("*.txt"))
            for line in path.read_text().splitlines(keepends=True)
            if " ms, verified in " not in line
        )
        for name in ("000-net", "001-net")
    ]
    assert texts[0] == texts[1] and "quantized_dot_general" in texts[0]


def test_the_environment_names_a_directory(quantized, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXQUANT_DUMP", str(tmp_path / "env"))
    jq.transform(net)(quantized, X)
    assert [p.name for p in (tmp_path / "env").iterdir()] == ["000-net"]


def test_a_model_names_its_dumps(tmp_path):
    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(x)

    model = jq.quantize("w8a8")(Small())
    variables = jq.ptq(model, model.init(jax.random.key(0), X), X)
    module = jq.ptq(jq.quantize("w8a8")(nnx.Linear(4, 8, rngs=nnx.Rngs(0))), X)
    with dump(tmp_path) as folder:
        model.apply(variables, X)
        module(X)
    assert sorted(p.name for p in folder.iterdir()) == ["000-Small", "001-Linear.__call__"]


def test_names_of_variables_are_no_difference():
    before = ["a:f32[2] = mul b c", "d:f32[2] = tanh a"]
    after = ["e:f32[2] = mul b c", "f:f32[2] = neg e", "d:f32[2] = tanh f"]
    lines = difference("\n".join(before), "\n".join(after))
    assert [x for x in lines if x[0] in "+-"] == ["+ f:f32[2] = neg e"]
