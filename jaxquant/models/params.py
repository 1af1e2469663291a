"""One flat checkpoint, and its way into the Linen and the NNX trees and back.

The checkpoint maps dotted names to arrays, one entry a layer, as most checkpoints of decoders do:

    embed.embedding   layers.3.attention.query.kernel   norm.scale   lm_head.kernel

A Linen tree has `layers_3/...` or, under a scan, `layers/...` with a leading axis of layers; both
are read by `from_linen` and written by `to_linen`. Leaves are only stacked, indexed and handed
through, so numpy and JAX arrays both do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jaxquant.models import nnx as nnx_model
from jaxquant.models._optional import require
from jaxquant.models.config import DecoderConfig

Flat = dict[str, Any]


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of `config`, in the model's order."""
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    head_dim, inner = config.head_dim, config.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm.scale": (hidden,),
        "attention.query.kernel": (hidden, heads, head_dim),
        "attention.key.kernel": (hidden, kv_heads, head_dim),
        "attention.value.kernel": (hidden, kv_heads, head_dim),
        "attention.out.kernel": (heads, head_dim, hidden),
        "mlp_norm.scale": (hidden,),
        "mlp.gate.kernel": (hidden, inner),
        "mlp.up.kernel": (hidden, inner),
        "mlp.down.kernel": (inner, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed.embedding": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm.scale"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.kernel"] = (hidden, config.vocab_size)
    return shapes


def check_flat(flat: Mapping[str, Any], config: DecoderConfig) -> None:
    """Raises ValueError unless the names and shapes of `flat` are those of `config`."""
    expected = parameter_shapes(config)
    missing, unknown = sorted(expected.keys() - flat.keys()), sorted(flat.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the checkpoint does not fit the config: missing {missing}, unknown {unknown}"
        )
    for name, shape in expected.items():
        if tuple(flat[name].shape) != shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(flat[name].shape)}; the config needs {shape}"
            )


def to_linen(flat: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The `params` tree of `linen.Decoder(config)`, scanned or unrolled as the config says.

    Raises:
      ValueError: names or shapes do not fit the config.
    """
    check_flat(flat, config)
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if match is None:
            tree[name] = value
        elif not config.scan_layers:
            tree[f"layers_{match[1]}.{match[2]}"] = value
        elif match[1] == "0":
            tree[f"layers.{match[2]}"] = stack_layers(flat, match[2], config.num_layers)
    return traverse_util.unflatten_dict(tree, sep=".")


def from_linen(params: Mapping[str, Any], config: DecoderConfig) -> Flat:
    """The flat checkpoint of a Linen `params` tree, scanned or unrolled (seen from its names).

    Raises:
      ValueError: names or shapes do not fit the config.
    """
    flat: Flat = {}
    for name, value in traverse_util.flatten_dict(dict(params), sep=".").items():
        if name.startswith("layers."):
            for i in range(config.num_layers):
                flat[f"layers.{i}.{name.removeprefix('layers.')}"] = value[i]
        else:
            flat[re.sub(r"^layers_(\d+)\.", r"layers.\1.", name)] = value
    check_flat(flat, config)
    return flat


def to_nnx(flat: Mapping[str, Any], config: DecoderConfig) -> nnx_model.Decoder:
    """An `nnx.Decoder` with these parameters; no random ones are made on the way.

    Raises:
      ValueError: names or shapes do not fit the config.
    """
    check_flat(flat, config)
    model = nnx.eval_shape(lambda: nnx_model.Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name not in flat:
            name = name.removeprefix("layers.")
            value = stack_layers(flat, name, config.num_layers)
        else:
            value = flat[name]
        leaves.append((path, variable.replace(jnp.asarray(value))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def from_nnx(model: nnx_model.Decoder) -> Flat:
    """The flat checkpoint of an NNX model, scanned or not.

    Raises:
      ValueError: names or shapes do not fit the model's config.
    """
    flat: Flat = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, value = ".".join(map(str, path)), variable[...]
        if model.config.scan_layers and path[0] == "layers":
            for i in range(model.config.num_layers):
                flat[f"layers.{i}.{name.removeprefix('layers.')}"] = value[i]
        else:
            flat[name] = value
    check_flat(flat, model.config)
    return flat


def stack_layers(flat: Mapping[str, Any], name: str, num_layers: int) -> Any:
    """Stacks `layers.0.<name>` ... along a new leading axis, in the library of the arrays."""
    layers = [flat[f"layers.{i}.{name}"] for i in range(num_layers)]
    return np.stack(layers) if all(isinstance(x, np.ndarray) for x in layers) else jnp.stack(layers)


def save_flat(path: str | os.PathLike[str], flat: Mapping[str, Any], dtype: Any) -> None:
    """Writes a safetensors file, every array cast to `dtype`."""
    flax_io = require("safetensors.flax")
    arrays = {name: jnp.asarray(value, dtype) for name, value in flat.items()}
    flax_io.save_file(arrays, os.fspath(path))


def load_flat(path: str | os.PathLike[str]) -> Flat:
    """Reads a safetensors file into JAX arrays of the stored dtypes.

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no weights at {os.fspath(path)}")
    return require("safetensors.flax").load_file(os.fspath(path))
