"""The shipped decoder on a mesh (data, model), quantized where it lies and multiplied there."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from benchmarks.spmd_cases import decoder_spec
from jaxquant.models import next_token_loss, shipped
from tests.core.primitives.spmd_world import AUTO, close, kernels_on_cpu, mesh_of


@pytest.fixture
def problems(monkeypatch):
    yield kernels_on_cpu(monkeypatch)
    jax.clear_caches()


def test_forward_and_backward(problems):
    model, variables = shipped.load()
    model = jq.quantize("w4a16_g64")(model)
    tokens = np.asarray(shipped.held_out_tokens("english")[: 8 * 17]).reshape(8, 17)
    mesh = mesh_of(AUTO, (4, 2))
    placed = jax.tree_util.tree_map_with_path(
        lambda path, a: jax.device_put(a, NamedSharding(mesh, decoder_spec(path))), variables
    )
    alone = jq.dequantize(jq.ptq(model, variables, tokens, progress=False))
    qvars = jq.ptq(model, placed, tokens, progress=False)
    qvars = jq.with_shardings(qvars, batch_axes="data")
    batch = jax.device_put(tokens, NamedSharding(mesh, P("data", None)))

    def loss(scale, variables, tokens):
        """Of the first norms' scales, through every product behind them."""
        params = variables["params"]
        norm = {**params["layers"], "attention_norm": {"scale": scale}}
        logits = model.apply({"params": {**params, "layers": norm}}, tokens)
        return next_token_loss(logits, tokens).mean(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    scale = variables["params"]["layers"]["attention_norm"]["scale"]
    problems.clear()
    (got, logits), grad = step(scale, qvars, batch)
    chosen = {(p.k, p.n) for p in problems}
    # Heads 6 and 2, width 384, 1024 in between, all over two devices; the head is the table's.
    assert {(384, 192), (384, 64), (192, 384), (384, 512), (512, 384), (384, 1536)} <= chosen
    assert {p.m for p in problems} == {8 // 4 * 17}
    text = step.lower(scale, qvars, batch).compile().as_text()
    assert re.findall(r"(?:s4|s8|u8)\[[\d,]*\]\S* all-gather", text) == []

    (want, want_logits), want_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        scale, alone, tokens
    )
    close(logits, want_logits, rtol=1e-4)
    close(got, want, rtol=1e-5)
    close(grad, want_grad, rtol=1e-4)
