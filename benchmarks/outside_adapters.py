"""Models of other projects, small and with random weights, for `benchmarks.outside_models`.

One function a package: it yields a name and a way to build each model. Building imports the
package, so what is not installed costs nothing and is reported as missing. Here are the packages
with modules of their own kind (NNX, Keras, Haiku, Equinox, Penzai) and Google's Gemma; those of
Linen are in `benchmarks.outside_linen`, Hugging Face's in `benchmarks.outside_transformers`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
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
    """A model with an example call; ``tree`` is None for NNX, which holds its own.

    ``recipe`` is the one that is compared with its dequantized weights.
    """

    model: Any
    tree: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = "w4a16_g32"


Named = tuple[str, Callable[[], Built]]


def drawn(shapes: Any) -> Any:
    """Weights for a tree of shapes, without running the initializers.

    Matrices are normal, of one over the root of their rows. Vectors are positive: gains and
    variances are among them. What is not floating is zero.
    """
    random = np.random.default_rng(1)

    def leaf(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        if x.ndim < 2:
            return jnp.asarray(random.uniform(0.5, 1.5, x.shape), x.dtype)
        rows = np.prod(x.shape[:-1], dtype=int)
        return jnp.asarray(random.normal(size=x.shape) / np.sqrt(rows), x.dtype)

    return jax.tree.map(leaf, shapes)


def linen(model: Any, *args: Any, recipe: str = Built.recipe, **kwargs: Any) -> Built:
    """A Linen module with its variables."""
    rest = {name: value for name, value in kwargs.items() if name != "rngs"}
    variables = jax.eval_shape(lambda: model.init(KEY, *args, **rest))
    return Built(model, drawn(variables), args, kwargs, recipe)


def tunix() -> Iterator[Named]:
    """Google's NNX language models."""

    def build(module: str, cls: str, remat: bool = False, **fields: Any) -> Built:
        library: Any = importlib.import_module(f"tunix.models.{module}.model")
        sizes = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4}
        if module == "gemma":
            kinds = library.AttentionType
            fields["attention_types"] = (kinds.LOCAL_SLIDING, kinds.GLOBAL)
        if remat:
            fields["remat_config"] = library.RematConfig.BLOCK
        config = library.ModelConfig(head_dim=16, num_kv_heads=2, **sizes, **fields)
        model = nnx.eval_shape(lambda: getattr(library, cls)(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
        args = (jnp.asarray(TOKENS), positions, None, mask)
        return Built(nnx.merge(graphdef, drawn(state)), None, args)

    rope = {"vocab_size": 128, "rope_theta": 10000, "norm_eps": 1e-5}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    yield "Llama3", lambda: build("llama3", "Llama3", **rope)
    yield "Llama3, tied", lambda: build("llama3", "Llama3", **rope, weight_tying=True)
    yield "Llama3, remat", lambda: build("llama3", "Llama3", remat=True, **rope)
    yield "Qwen2", lambda: build("qwen2", "Qwen2", **rope)
    yield "Qwen3", lambda: build("qwen3", "Qwen3", **rope, use_tied_embedding=True)
    yield "Qwen3, experts", lambda: build("qwen3", "Qwen3", **rope, **experts)
    window = {"num_embed": 128, "sliding_window_size": 4}
    norms = {"final_logit_softcap": 30.0, "use_post_attn_norm": True, "use_post_ffw_norm": True}
    yield "Gemma", lambda: build("gemma", "Gemma", **window, **norms)
    yield "Gemma3", lambda: build("gemma3", "Gemma3", **window, param_dtype=jnp.float32)


def gemma() -> Iterator[Named]:
    """Google DeepMind's Gemma (Linen, under `nn.jit`), with a local and a global layer."""

    def build() -> Built:
        library: Any = importlib.import_module("gemma.gm.nn._transformer")
        configs: Any = importlib.import_module("gemma.gm.nn._config")
        kinds: Any = importlib.import_module("gemma.gm.nn._modules").AttentionType
        sizes = {"num_embed": 128, "embed_dim": 64, "hidden_dim": 128, "head_dim": 16}
        norms = {"use_post_attn_norm": True, "use_post_ffw_norm": True, "use_qk_norm": True}
        config = configs.TransformerConfig(
            num_heads=4,
            num_kv_heads=2,
            final_logit_softcap=30.0,
            attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
            sliding_window_size=4,
            **sizes,
            **norms,
        )
        return linen(library.Transformer(config=config, dtype=jnp.float32), jnp.asarray(TOKENS))

    yield "Transformer", build


def keras() -> Iterator[Named]:
    """Keras 3 on JAX (KERAS_BACKEND=jax): `stateless_call`."""

    def build(layers: Callable[[Any], tuple[Any, Any]], example: Any) -> Built:
        library: Any = importlib.import_module("keras")
        model = library.Model(*layers(library))
        tree = {
            "trainable": [v.value for v in model.trainable_variables],
            "rest": [v.value for v in model.non_trainable_variables],
        }

        def call(tree: Any, x: Any) -> Any:
            return model.stateless_call(tree["trainable"], tree["rest"], x)[0]

        return Built(call, tree, (example,))

    def text(library: Any) -> tuple[Any, Any]:
        layers = library.layers
        tokens = library.Input((12,), dtype="int32")
        x = layers.Embedding(128, 64)(tokens)
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 16)(x, x))
        return tokens, layers.Dense(10)(layers.GRU(32)(layers.Dense(64, activation="gelu")(x)))

    def convolutions(library: Any) -> tuple[Any, Any]:
        layers = library.layers
        image = library.Input((32, 32, 3))
        x = layers.Conv2D(32, 3, strides=2, activation="relu")(image)
        x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, activation="relu")(x))
        x = layers.SeparableConv2D(64, 3, activation="relu")(x)
        x = layers.Conv2DTranspose(32, 3, strides=2, activation="relu")(x)
        return image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))

    yield "attention and GRU", lambda: build(text, TOKENS)
    yield "convolutions", lambda: build(convolutions, IMAGE.transpose(0, 2, 3, 1))


def haiku() -> Iterator[Named]:
    """DeepMind's Haiku: `apply` of a transformed function."""

    def build(net: Callable[[Any, Any], Any], example: Any) -> Built:
        hk: Any = importlib.import_module("haiku")
        both = hk.without_apply_rng(hk.transform(lambda x: net(hk, x)))
        return Built(both.apply, both.init(KEY, example), (example,))

    def transformer(hk: Any, tokens: Any) -> Any:
        table = hk.Embed(128, 64)
        x = table(tokens)
        for _ in range(2):
            y = hk.LayerNorm(-1, True, True)(x)
            init = hk.initializers.VarianceScaling()
            x += hk.MultiHeadAttention(4, 16, w_init=init, model_size=64)(y, y, y)
            x += hk.nets.MLP([128, 64])(x)
        return x @ table.embeddings.T

    def recurrent(hk: Any, tokens: Any) -> Any:
        x = hk.Embed(128, 64)(tokens)
        for core in (hk.LSTM(64), hk.GRU(64)):
            start = core.initial_state(len(tokens))
            x, _ = hk.dynamic_unroll(core, x, start, time_major=False)
        return hk.Linear(10)(x)

    def stacked(hk: Any, tokens: Any) -> Any:
        def block(x: Any) -> Any:
            return x + hk.nets.MLP([128, 64])(hk.LayerNorm(-1, True, True)(x))

        return hk.experimental.layer_stack(3)(block)(hk.Embed(128, 64)(tokens))

    yield "transformer, tied", lambda: build(transformer, TOKENS)
    yield "LSTM and GRU", lambda: build(recurrent, TOKENS)
    yield "layer_stack", lambda: build(stacked, TOKENS)


def _held(model: Any, call: Callable[[Any, Any], Any], x: Any) -> Built:
    """An Equinox model: a function whose first argument is its arrays."""
    eqx: Any = importlib.import_module("equinox")
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    return Built(lambda arrays, x: call(eqx.combine(arrays, static), x), arrays, (x,))


def equinox() -> Iterator[Named]:
    """Equinox's own layers, one example at a time under `vmap`."""

    def build(cls: str, *sizes: int) -> Built:
        nn = importlib.import_module("equinox").nn
        call = {
            "MLP": lambda model, x: jax.vmap(jax.vmap(model))(x),
            "MultiheadAttention": lambda model, x: jax.vmap(lambda y: model(y, y, y))(x),
        }[cls]
        return _held(getattr(nn, cls)(*sizes, key=KEY), call, jax.random.normal(KEY, (2, 12, 64)))

    yield "MLP", lambda: build("MLP", 64, 32, 128, 2)
    yield "MultiheadAttention", lambda: build("MultiheadAttention", 4, 64)


def equimo() -> Iterator[Named]:
    """Vision models in Equinox."""

    def build() -> Built:
        eqx: Any = importlib.import_module("equinox")
        models: Any = importlib.import_module("equimo.vision.models")
        sizes = {"img_size": 32, "in_channels": 3, "dim": 64, "patch_size": 8, "num_classes": 10}
        model = models.VisionTransformer(num_heads=[4], depths=[2], **sizes, key=KEY)
        model = eqx.nn.inference_mode(model)
        return _held(model, lambda model, x: jax.vmap(lambda y: model(y, key=KEY))(x), IMAGE)

    yield "VisionTransformer", build


def penzai() -> Iterator[Named]:
    """Google DeepMind's Penzai: a function of the model's frozen parameters, as a list."""

    def build() -> Built:
        variants = "penzai.models.transformer.variants"
        library: Any = importlib.import_module(f"{variants}.llamalike_common")
        pz: Any = importlib.import_module("penzai.pz")
        sizes = {"embedding_dim": 64, "projection_dim": 16, "mlp_hidden_dim": 128}
        config = library.LlamalikeTransformerConfig(
            num_kv_heads=2,
            query_head_multiplier=2,
            num_decoder_blocks=2,
            vocab_size=128,
            mlp_variant="swiglu",
            tie_embedder_and_logits=True,
            **sizes,
        )
        model = library.build_llamalike_transformer(config, init_base_rng=KEY)
        model, params = pz.unbind_params(model, freeze=True)
        leaves, treedef = jax.tree.flatten(params)

        def call(leaves: Any, tokens: Any) -> Any:
            bound = pz.bind_variables(model, jax.tree.unflatten(treedef, leaves))
            out = bound(pz.nx.wrap(tokens).tag("batch", "seq"))
            return out.unwrap("batch", "seq", "vocabulary")

        return Built(call, leaves, (TOKENS,))

    yield "llama-like, tied", build
