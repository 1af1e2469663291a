"""The proofs of the trained model, as users print them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import jaxquant as jq
from jaxquant.models import nnx as nnx_model
from jaxquant.models import shipped
from tests.passes.fold_zoo import DECODER

TOKENS = jnp.zeros((1, 8), jnp.int32)


def test_the_trained_model():
    model, variables = shipped.load()
    shapes = jax.eval_shape(lambda: variables)  # nothing is computed
    folds = jq.explain_folds(model, shapes, TOKENS)
    text = str(folds)
    assert [g.count for g in folds.groups] == [4 * 384, 4 * 2 * 64, 4 * 384, 4 * 1024, 0]
    assert [t.role for t in folds.turns] == ["heads"]
    assert "layers/attention/out/kernel: 1536 channels, 512 independent factors" in text
    assert "channels that it repeats share one factor   [layers/attention at functional.py:" in text
    assert "no residual stream can be rotated: the gain norm/scale cannot be folded" in text


def test_online_and_nnx():
    config = DECODER.replace(scan_layers=False)
    folds = jq.explain_folds(nnx_model.Decoder(config, rngs=nnx.Rngs(0)), TOKENS, online=True)
    assert [t.role for t in folds.turns] == ["stream", "heads", "heads", "input", "input"]
    assert "operand 0 of mul (norm at normalization.py" in str(folds)
    assert "is rotated back" in str(folds)


def test_the_proof_in_the_documents_is_what_is_printed():
    """Apart from line numbers, which are those of one version of Flax."""

    def lines(text):
        return [re.sub(r" +\[(?:layers|at ).*", "", line) for line in text.splitlines()]

    page = Path(__file__).parents[3] / "docs" / "transforms.md"
    (proof,) = re.findall(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    model, variables = shipped.load()
    folds = jq.explain_folds(model, variables, TOKENS)
    assert lines(proof) == lines(folds.groups[1].proof())
