from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.models import params
from tests.models import tiny


def _assert_same(flat, expected):
    assert flat.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(flat[name], value)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_form_gives_the_checkpoint_back(scan_layers, tie_embeddings):
    config = tiny.CONFIG.replace(scan_layers=scan_layers, tie_embeddings=tie_embeddings)
    flat = tiny.checkpoint(tie_embeddings)
    _assert_same(params.from_linen(params.to_linen(flat, config), config), flat)
    _assert_same(params.from_nnx(params.to_nnx(flat, config)), flat)


def test_scanned_parameters_are_the_layers_in_order():
    _, variables = tiny.linen_model(scan_layers=True)
    stacked = variables["params"]["layers"]["mlp"]["up"]["kernel"]
    assert stacked.shape == (2, 16, 24)
    np.testing.assert_array_equal(stacked[1], tiny.checkpoint()["layers.1.mlp.up.kernel"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_file_gives_the_checkpoint_back(tmp_path, dtype):
    flat = {name: value.astype(dtype) for name, value in tiny.checkpoint().items()}
    params.save_flat(tmp_path / "weights.safetensors", flat, dtype)
    loaded = params.load_flat(tmp_path / "weights.safetensors")
    assert {value.dtype for value in loaded.values()} == {jnp.dtype(dtype)}
    _assert_same(loaded, flat)


def test_bfloat16_values_survive_widening():
    value = np.asarray([1.0, 1 / 3, 1e-30]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(value.astype(np.float32).astype(ml_dtypes.bfloat16), value)


def test_a_missing_an_unknown_and_a_misshapen_parameter_are_named():
    flat = dict(tiny.checkpoint())
    flat["head.bias"] = flat.pop("norm.scale")
    with pytest.raises(ValueError, match=r"missing \['norm.scale'\], unknown \['head.bias'\]"):
        params.to_linen(flat, tiny.CONFIG)
    flat = {**tiny.checkpoint(), "norm.scale": np.ones(5)}
    with pytest.raises(ValueError, match=r"'norm.scale' has shape \(5,\).*\(16,\)"):
        params.to_nnx(flat, tiny.CONFIG)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.safetensors"):
        params.load_flat(tmp_path / "nothing.safetensors")
