"""Linen models of other projects, small and with random weights, for `benchmarks.outside_models`.

Images (diffusers, jax-resnet, flaxmodels) and the examples in Flax's own repository, which no
package holds: they are read from a folder. See `benchmarks.outside_adapters` for the form.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.outside_adapters import IMAGE, KEY, TOKENS, Built, Named, linen

PICTURE = IMAGE.transpose(0, 2, 3, 1)


def diffusers() -> Iterator[Named]:
    """Stable diffusion's network and its autoencoder."""

    def build(cls: str, *args: Any, **fields: Any) -> Built:
        module = getattr(importlib.import_module("diffusers"), cls)
        return linen(module(block_out_channels=(32, 64), layers_per_block=1, **fields), *args)

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    options = {"sample_size": 8, "attention_head_dim": 4, "cross_attention_dim": 32}
    latents, text = jax.random.normal(KEY, (2, 4, 8, 8)), jax.random.normal(KEY, (2, 6, 32))
    steps = jnp.array([1, 5])
    yield (
        "UNet",
        lambda: build("FlaxUNet2DConditionModel", latents, steps, text, **blocks, **options),
    )
    ways = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    yield "VAE", lambda: build("FlaxAutoencoderKL", jnp.asarray(IMAGE), **ways)


def jax_resnet() -> Iterator[Named]:
    """ResNet of two stages."""

    def build() -> Built:
        library: Any = importlib.import_module("jax_resnet")
        options = {"stage_sizes": (1, 1), "hidden_sizes": (32, 64), "n_classes": 10}
        return linen(library.ResNet(library.ResNetBlock, **options), PICTURE)

    yield "ResNet", build


def flaxmodels() -> Iterator[Named]:
    """ResNet-18 at its full width: it has no other."""

    def build() -> Built:
        library: Any = importlib.import_module("flaxmodels")
        options = {"output": "logits", "pretrained": None, "normalize": False, "num_classes": 10}
        return linen(library.ResNet18(**options), PICTURE, train=False)

    yield "ResNet18", build


def flax_examples(folder: Path) -> Iterator[Named]:
    """What each example of Flax's repository calls its model."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"{name}_models", folder / name / "models.py")
        assert spec is not None and spec.loader is not None, folder
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    def text(name: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Built:
        module = load(name)
        sizes = {"emb_dim": 64, "num_heads": 4, "num_layers": 1, "qkv_dim": 64, "mlp_dim": 128}
        fields = {"max_len": 32, **sizes, **(options or {})}
        if name != "nlp_seq":
            fields["deterministic"] = True
        model = getattr(module, "TransformerLM", None) or module.Transformer
        return linen(model(module.TransformerConfig(128, 128, **fields)), *args, **kwargs)

    def letters() -> Built:
        model = load("seq2seq").Seq2seq(teacher_force=True, hidden_size=64, vocab_size=32)
        both = jax.nn.one_hot(TOKENS % 32, 32), jax.nn.one_hot(TOKENS[:, :6] % 32, 32)
        return linen(model, *both, rngs={"lstm": KEY})

    def graph(cls: str) -> Built:
        jraph: Any = importlib.import_module("jraph")
        draw = np.random.default_rng(0)
        nodes, edges, whole = (draw.normal(size=(n, 32)).astype(np.float32) for n in (6, 8, 1))
        ends = (draw.integers(6, size=8) for _ in range(2))
        example = jraph.GraphsTuple(nodes, edges, *ends, whole, np.array([6]), np.array([8]))
        model = getattr(load("ogbg_molpcba"), cls)
        return linen(model(32, 2, message_passing_steps=2, output_globals_size=8), example)

    def words() -> Built:
        sizes = {"embedding_size": 64, "hidden_size": 64, "vocab_size": 128, "output_size": 2}
        rates = {"dropout_rate": 0.0, "word_dropout_rate": 0.0}
        model = load("sst2").TextClassifier(**sizes, **rates, deterministic=True)
        return linen(model, TOKENS, np.array([12, 7]))

    tied = {"logits_via_embedding": True, "dtype": jnp.bfloat16}
    shared = {"share_embeddings": True, "logits_via_embedding": True}
    yield "lm1b", lambda: text("lm1b", TOKENS)
    yield "lm1b, bfloat16, tied", lambda: text("lm1b", TOKENS, options=tied)
    yield "wmt", lambda: text("wmt", TOKENS, TOKENS, options=shared)
    yield "nlp_seq", lambda: text("nlp_seq", inputs=TOKENS, train=False)
    yield "seq2seq", letters
    yield "sst2", words
    yield "ppo", lambda: linen(load("ppo").ActorCritic(6), jax.random.uniform(KEY, (2, 84, 84, 4)))
    # Its widths (784, 500, 20) have no groups of 32.
    pixels = jax.random.uniform(KEY, (2, 784))
    yield "vae", lambda: linen(load("vae").VAE(), pixels, KEY, recipe="w8a16")
    yield "ogbg_molpcba, GraphNet", lambda: graph("GraphNet")
    yield "ogbg_molpcba, GraphConvNet", lambda: graph("GraphConvNet")
    options = {"num_classes": 10, "num_filters": 32, "dtype": jnp.float32}
    yield (
        "imagenet",
        lambda: linen(load("imagenet").ResNet18(**options), PICTURE, train=False),
    )
