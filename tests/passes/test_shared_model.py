"""The trained model after the passes over quantized programs: what is left, and the same logits."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as jp

import jaxquant as jq
from jaxquant.models import shipped
from jaxquant.passes.count import count
from jaxquant.passes.fuse_siblings import FuseSiblings
from jaxquant.passes.share_activation_quant import ShareActivationQuant
from tests.passes.quantized_programs import apply, assert_same, quantized, run

TOKENS = np.arange(2 * 8, dtype=np.int32).reshape(2, 8) * 7


@functools.cache
def programs(recipe, scan_layers):
    """The quantized program of the model's forward pass, after each pass, and its inputs."""
    model, variables = shipped.load(scan_layers=scan_layers)
    qvars = jq.ptq(jq.quantize(recipe)(model), variables, TOKENS)
    program, inputs = quantized(lambda p, t: model.apply(p, t), qvars, jnp.asarray(TOKENS))
    shared = apply(program, ShareActivationQuant())
    return program, shared, apply(shared, FuseSiblings()), inputs


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scan", "unrolled"])
def test_w8a8(scan_layers):
    program, shared, fused, inputs = programs("w8a8", scan_layers)
    layers = shipped.shipped_config().num_layers
    counts = [count(p.jaxpr) for p in (program, shared, fused)]
    # A layer has query, key, value, out, gate, up, down, and two attention products in float.
    assert [c.launches for c in counts] == [9 * layers + 1, 9 * layers + 1, 6 * layers + 1]
    assert [c.quantizations for c in counts] == [7 * layers + 1, 4 * layers + 1, 4 * layers + 1]
    assert counts[1].primitives["quantize_activation"] == 4 * layers + 1
    assert counts[2].primitives["quantized_dots"] == 2 * layers
    assert counts[2].primitives["quantized_dot_general"] == 2 * layers + 1
    width, inner = 384 * TOKENS.size * 4, 1024 * TOKENS.size * 4
    assert counts[0].quantized_bytes == layers * (6 * width + inner) + width
    assert counts[2].quantized_bytes == layers * (3 * width + inner) + width
    want = run(program, inputs)
    assert_same(run(shared, inputs), want)
    assert_same(run(fused, inputs), want)


def test_weights_only():
    program, shared, fused, inputs = programs("w4a16_g64", True)
    assert shared is program  # nothing is quantized
    layers = shipped.shipped_config().num_layers
    assert count(program.jaxpr).launches - count(fused.jaxpr).launches == 3 * layers
    assert_same(run(fused, inputs), run(program, inputs))


def test_notes_name_the_layers_that_share():
    program, shared, _, _ = programs("w8a8", True)
    notes = [*ShareActivationQuant().run(program).notes, *FuseSiblings().run(shared).notes]
    assert len(notes) == 4
    for note, words in zip(notes, ["query key value", "gate up"] * 2, strict=True):
        assert all(word in note for word in words.split())
        assert note.count(",") >= words.count(" ")


def test_constant_in_the_number_of_scanned_layers():
    """Counted once in the text, whatever the length of the scan."""
    _, _, fused, _ = programs("w8a8", True)
    (scan,) = (e for e in fused.jaxpr.jaxpr.eqns if e.primitive is jp.scan_p)
    assert scan.params["length"] == shipped.shipped_config().num_layers
    body = count(scan.params["jaxpr"]).primitives
    assert (body["quantized_dots"], body["quantize_activation"]) == (2, 4)
