"""The trained model that ships with the package: weights, tokenizer, held-out text.

Everything is read from files beside this module; nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.models import batches, params
from jaxquant.models import linen as linen_model
from jaxquant.models import nnx as nnx_model
from jaxquant.models.config import DecoderConfig
from jaxquant.models.corpus import SLICES, split_documents
from jaxquant.models.tokenizer import Tokenizer

ASSETS = pathlib.Path(__file__).parent / "assets"


def load(
    scan_layers: bool = True, dtype: Any = jnp.float32, **changes: Any
) -> tuple[linen_model.Decoder, dict[str, Any]]:
    """The trained model in Linen.

    Args:
      scan_layers: layers under one scan (stacked parameters) or as separate subtrees.
      dtype: dtype of the computation. Parameters are float32 whatever it is; they are stored in
        bfloat16, and the widening is exact.
      **changes: other fields of `DecoderConfig`, such as `max_length` or `remat`.

    Returns:
      model and variables, for `model.apply(variables, tokens)`.
    """
    config = shipped_config(scan_layers=scan_layers, dtype=dtype, **changes)
    return linen_model.Decoder(config), {"params": params.to_linen(_weights(), config)}


def load_nnx(
    scan_layers: bool = True, dtype: Any = jnp.float32, **changes: Any
) -> nnx_model.Decoder:
    """The trained model in NNX; arguments as for `load`."""
    config = shipped_config(scan_layers=scan_layers, dtype=dtype, **changes)
    return params.to_nnx(_weights(), config)


def shipped_config(**changes: Any) -> DecoderConfig:
    """The configuration of the shipped weights, with some fields changed."""
    stored = json.loads((ASSETS / "training.json").read_text())["config"]
    for name in ("dtype", "param_dtype"):
        stored[name] = jnp.dtype(stored[name])
    return DecoderConfig(**{**stored, **changes})


def _weights() -> params.Flat:
    flat = params.load_flat(ASSETS / "weights.safetensors")
    return {name: value.astype(jnp.float32) for name, value in flat.items()}


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer that the model was trained with."""
    return Tokenizer.load(ASSETS / "tokenizer.json")


def held_out_text(name: str) -> str:
    """The held-out text of a slice; documents are separated by U+001E.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    if name not in SLICES:
        raise ValueError(f"unknown slice {name!r}; known slices: {', '.join(SLICES)}")
    return (ASSETS / "heldout" / f"{name}.txt").read_bytes().decode()


@functools.cache
def held_out_tokens(name: str) -> np.ndarray:
    """The held-out tokens of a slice, int32 [N], documents between bos and eos tokens."""
    documents = split_documents(held_out_text(name))
    stream = np.asarray(tokenizer().encode_documents(documents), np.int32)
    stream.setflags(write=False)  # one cached array for all callers
    return stream


def held_out(
    batch_size: int, length: int, slices: Sequence[str] | None = None
) -> dict[str, list[np.ndarray]]:
    """Named slices of held-out batches, each slice in text order and without overlap.

    Args:
      batch_size: rows of a batch.
      length: tokens of a row.
      slices: names out of `SLICES`; all by default.

    Returns:
      Slice name to int32 arrays [batch_size, length].

    Raises:
      ValueError: an unknown slice (the message lists the known ones), or a batch larger than the
        slice's text.
    """
    if isinstance(slices, str):
        raise ValueError(f"slices must be a sequence of names; got the string {slices!r}")
    names = SLICES if slices is None else slices
    return {name: batches.windows(held_out_tokens(name), batch_size, length) for name in names}
