"""Models of other projects, small and with random weights, for `benchmarks.outside_models`.

One function a package: it yields a name and a recipe to build each model. Building imports the
package, so what is not installed costs nothing and is reported as missing.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

KEY = jax.random.key(0)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) % 100 + 1
IMAGE = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Built:
    """A model with an example call; ``tree`` is None for NNX, which holds its own."""

    model: Any
    tree: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


Named = tuple[str, Callable[[], Built]]

_LM = {"vocab_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
_LM |= {"max_position_embeddings": 64, "intermediate_size": 128}
_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_BART = {"vocab_size": 128, "d_model": 64, "max_position_embeddings": 64}
for _side in ("encoder", "decoder"):
    _BART |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 4, f"{_side}_ffn_dim": 128}
_VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
_VIT |= {"patch_size": 8}
_BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :6]}
_TEXT, _PIXELS = {"input_ids": TOKENS}, {"pixel_values": IMAGE}

# model class (after "Flax"), config class, its fields, inputs
_HUGGING_FACE = (
    ("LlamaForCausalLM", "LlamaConfig", _LM | {"num_key_value_heads": 2}, _TEXT),
    ("MistralForCausalLM", "MistralConfig", _LM | {"num_key_value_heads": 2}, _TEXT),
    ("GPT2LMHeadModel", "GPT2Config", _GPT, _TEXT),
    ("GPTJForCausalLM", "GPTJConfig", _GPT | {"rotary_dim": 8}, _TEXT),
    ("BertForMaskedLM", "BertConfig", _LM, _TEXT),
    ("RobertaForMaskedLM", "RobertaConfig", _LM, _TEXT),
    ("T5ForConditionalGeneration", "T5Config", _T5, _BOTH),
    ("LongT5ForConditionalGeneration", "LongT5Config", _T5 | {"local_radius": 4}, _BOTH),
    ("BartForConditionalGeneration", "BartConfig", _BART, _BOTH),
    ("ViTForImageClassification", "ViTConfig", _VIT | {"intermediate_size": 128}, _PIXELS),
    ("Dinov2ForImageClassification", "Dinov2Config", _VIT, _PIXELS),
    (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]},
        _PIXELS,
    ),
)


def transformers() -> Iterator[Named]:
    """Hugging Face: a function of the parameters, as `quantize` says of models that hold them."""

    def build(model: str, config: str, fields: dict[str, Any], inputs: dict[str, Any]) -> Built:
        library: Any = importlib.import_module("transformers")
        _old_clip()
        held = getattr(library, f"Flax{model}")(getattr(library, config)(**fields))

        def call(params: Any, **inputs: Any) -> Any:
            return held(**inputs, params=params).to_tuple()

        return Built(call, held.params, (), inputs)

    for row in _HUGGING_FACE:
        yield row[0], lambda row=row: build(*row)


def _old_clip() -> None:
    """T5 still calls `jnp.clip(x, a_min=)`, which JAX has dropped."""
    clip = jnp.clip

    def both(x: Any, *args: Any, a_min: Any = None, a_max: Any = None, **kwargs: Any) -> Any:
        return clip(x, *(args or (a_min, a_max)), **kwargs)

    jnp.clip = both  # type: ignore[assignment]


def tunix() -> Iterator[Named]:
    """Google's NNX language models; what they initialize to zero is drawn."""

    def build(module: str, cls: str, **fields: Any) -> Built:
        library: Any = importlib.import_module(f"tunix.models.{module}.model")
        sizes = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4}
        config = library.ModelConfig(head_dim=16, num_kv_heads=2, **sizes, **fields)
        graphdef, state = nnx.split(getattr(library, cls)(config, rngs=nnx.Rngs(0)))
        positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
        args = (jnp.asarray(TOKENS), positions, None, mask)
        return Built(nnx.merge(graphdef, _drawn(state)), None, args)

    rope = {"vocab_size": 128, "rope_theta": 10000, "norm_eps": 1e-5}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    yield "Llama3", lambda: build("llama3", "Llama3", **rope)
    yield "Llama3, tied", lambda: build("llama3", "Llama3", **rope, weight_tying=True)
    yield "Qwen2", lambda: build("qwen2", "Qwen2", **rope)
    yield "Qwen3", lambda: build("qwen3", "Qwen3", **rope, use_tied_embedding=True)
    yield "Qwen3, experts", lambda: build("qwen3", "Qwen3", **rope, **experts)
    gemma = {"num_embed": 128, "sliding_window_size": 4, "param_dtype": jnp.float32}
    yield "Gemma3", lambda: build("gemma3", "Gemma3", **gemma)


def _drawn(tree: Any) -> Any:
    random = np.random.default_rng(1)

    def leaf(x: Any) -> Any:
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating) or jnp.any(x != 0):
            return x
        return jnp.asarray(random.normal(size=x.shape) * 0.05, x.dtype)

    return jax.tree.map(leaf, tree)


def diffusers() -> Iterator[Named]:
    """Stable diffusion's Linen modules."""

    def build(cls: str, args: tuple[Any, ...], **fields: Any) -> Built:
        module = getattr(importlib.import_module("diffusers"), cls)(
            block_out_channels=(32, 64), layers_per_block=1, **fields
        )
        return Built(module, _drawn(module.init(KEY, *args)), args)

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    latents = jax.random.normal(KEY, (2, 4, 8, 8))
    args = (latents, jnp.array([1, 5]), jax.random.normal(KEY, (2, 6, 32)))
    options = {"sample_size": 8, "attention_head_dim": 4, "cross_attention_dim": 32}
    yield "UNet", lambda: build("FlaxUNet2DConditionModel", args, **blocks, **options)


def keras() -> Iterator[Named]:
    """Keras 3 on JAX (KERAS_BACKEND=jax): `stateless_call`."""

    def build() -> Built:
        library: Any = importlib.import_module("keras")
        layers = library.layers
        tokens = library.Input((12,), dtype="int32")
        x = layers.Embedding(128, 64)(tokens)
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 16)(x, x))
        out = layers.Dense(10)(layers.GRU(32)(layers.Dense(64, activation="gelu")(x)))
        model = library.Model(tokens, out)
        tree = {
            "trainable": [v.value for v in model.trainable_variables],
            "rest": [v.value for v in model.non_trainable_variables],
        }

        def call(tree: Any, tokens: Any) -> Any:
            return model.stateless_call(tree["trainable"], tree["rest"], tokens)[0]

        return Built(call, tree, (TOKENS,))

    yield "attention and GRU", build


def haiku() -> Iterator[Named]:
    """DeepMind's Haiku: `apply` of a transformed function."""

    def build() -> Built:
        hk: Any = importlib.import_module("haiku")

        def net(tokens: Any) -> Any:
            table = hk.Embed(128, 64)
            x = table(tokens)
            for _ in range(2):
                y = hk.LayerNorm(-1, True, True)(x)
                init = hk.initializers.VarianceScaling()
                x += hk.MultiHeadAttention(4, 16, w_init=init, model_size=64)(y, y, y)
                x += hk.nets.MLP([128, 64])(x)
            return x @ table.embeddings.T

        both = hk.without_apply_rng(hk.transform(net))
        return Built(both.apply, both.init(KEY, TOKENS), (TOKENS,))

    yield "transformer, tied", build


def equimo() -> Iterator[Named]:
    """Equinox: a function whose first argument is the model."""

    def build() -> Built:
        eqx: Any = importlib.import_module("equinox")
        models: Any = importlib.import_module("equimo.vision.models")
        sizes = {"img_size": 32, "in_channels": 3, "dim": 64, "patch_size": 8, "num_classes": 10}
        model = models.VisionTransformer(num_heads=[4], depths=[2], **sizes, key=KEY)
        model = eqx.nn.inference_mode(model)
        arrays, static = eqx.partition(model, eqx.is_inexact_array)

        def call(arrays: Any, x: Any) -> Any:
            return jax.vmap(lambda y: eqx.combine(arrays, static)(y, key=KEY))(x)

        return Built(call, arrays, (IMAGE,))

    yield "VisionTransformer", build


def flax_examples(folder: Path) -> Iterator[Named]:
    """The examples in Flax's repository, which no package holds."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"{name}_models", folder / name / "models.py")
        assert spec is not None and spec.loader is not None, folder
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    def text(name: str, *args: Any, **options: Any) -> Built:
        module = load(name)
        sizes = {"emb_dim": 64, "num_heads": 4, "num_layers": 2, "qkv_dim": 64, "mlp_dim": 128}
        config = module.TransformerConfig(
            128, 128, max_len=32, deterministic=True, **sizes, **options
        )
        model = getattr(module, "TransformerLM", None) or module.Transformer
        return linen(model(config), *args)

    def linen(model: Any, *args: Any, **kwargs: Any) -> Built:
        return Built(model, _drawn(model.init(KEY, *args, **kwargs)), args, kwargs)

    shared = {"share_embeddings": True, "logits_via_embedding": True}
    pixels = jax.random.uniform(KEY, (2, 84, 84, 4))
    yield "lm1b", lambda: text("lm1b", TOKENS)
    yield "wmt", lambda: text("wmt", TOKENS, TOKENS, **shared)
    yield "ppo", lambda: linen(load("ppo").ActorCritic(6), pixels)
    yield (
        "imagenet",
        lambda: linen(
            load("imagenet").ResNet18(num_classes=10, num_filters=32, dtype=jnp.float32),
            IMAGE.transpose(0, 2, 3, 1),
            train=False,
        ),
    )


PACKAGES = {
    "transformers": transformers,
    "google-tunix": tunix,
    "diffusers": diffusers,
    "keras": keras,
    "dm-haiku": haiku,
    "equimo": equimo,
}
"""Distribution name -> its adapter."""
