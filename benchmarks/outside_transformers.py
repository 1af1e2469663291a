"""Hugging Face's Flax models, tiny and with random weights, for `benchmarks.outside_models`.

One loop over a table: the class, its configuration's class and fields, and an example input. One
layer each, or two where two differ (local and global attention), so that all of them compile in
minutes on a CPU. The last releases of ``transformers`` that hold Flax models are 4.x.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.outside_adapters import IMAGE, TOKENS, Built, Named, drawn

_LM = {"vocab_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 64}
_LM |= {"max_position_embeddings": 64, "intermediate_size": 128}
_KV = _LM | {"num_key_value_heads": 2}
_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
_NEO = {"vocab_size": 128, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 4}
_NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
_OPT = _LM | {"ffn_dim": 128, "word_embed_proj_dim": 64}
_BLOOM = {"vocab_size": 128, "hidden_size": 64, "n_layer": 1, "n_head": 4}
_XGLM = {"vocab_size": 128, "d_model": 64, "ffn_dim": 128, "num_layers": 1, "attention_heads": 4}
_BIRD = _LM | {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
_DISTIL = {"vocab_size": 128, "dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 128}
_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_GATED = _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_BART = {"vocab_size": 128, "d_model": 64, "max_position_embeddings": 64, "pad_token_id": 0}
_BART |= {"decoder_start_token_id": 2}
for _side in ("encoder", "decoder"):
    _BART |= {f"{_side}_layers": 1, f"{_side}_attention_heads": 4, f"{_side}_ffn_dim": 128}
_WHISPER = _BART | {"num_mel_bins": 32, "max_source_positions": 16, "max_target_positions": 32}
_WAV = _LM | {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
_WAV |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
_WAV |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
_VIT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32}
_VIT |= {"patch_size": 8, "intermediate_size": 128}
_RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]}
_CLIP = {"text_config": _LM | {"eos_token_id": 2}, "vision_config": _VIT, "projection_dim": 64}

_TEXT, _PIXELS = {"input_ids": TOKENS}, {"pixel_values": IMAGE}
_LONG = {"input_ids": np.tile(TOKENS, (1, 4))}
_BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :6]}
_SOUND = {"input_values": IMAGE.reshape(2, -1)[:, :400]}
_MEL = {"input_features": IMAGE[:, 0], "decoder_input_ids": TOKENS[:, :6]}

# family (the configuration's class without "Config"), what follows it in the model's class, the
# configuration's fields, inputs
_MODELS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("Llama", "ForCausalLM", _KV, _TEXT),
    ("Mistral", "ForCausalLM", _KV, _TEXT),
    ("Gemma", "ForCausalLM", _KV | {"head_dim": 16}, _TEXT),
    ("GPT2", "LMHeadModel", _GPT, _TEXT),
    ("GPTNeo", "ForCausalLM", _NEO, _TEXT),
    ("GPTJ", "ForCausalLM", _GPT | {"rotary_dim": 8}, _TEXT),
    ("OPT", "ForCausalLM", _OPT, _TEXT),
    ("Bloom", "ForCausalLM", _BLOOM, _TEXT),
    ("XGLM", "ForCausalLM", _XGLM, _TEXT),
    ("Bert", "ForMaskedLM", _LM, _TEXT),
    ("Roberta", "ForMaskedLM", _LM, _TEXT),
    ("BigBird", "ForMaskedLM", _BIRD, _LONG),
    ("DistilBert", "ForMaskedLM", _DISTIL, _TEXT),
    ("Albert", "ForMaskedLM", _LM | {"embedding_size": 32}, _TEXT),
    ("Electra", "ForMaskedLM", _LM | {"embedding_size": 64}, _TEXT),
    ("RoFormer", "ForMaskedLM", _LM, _TEXT),
    ("T5", "ForConditionalGeneration", _T5, _BOTH),
    ("T5", "ForConditionalGeneration", _GATED, _BOTH),
    ("LongT5", "ForConditionalGeneration", _T5 | {"local_radius": 4}, _BOTH),
    ("Bart", "ForConditionalGeneration", _BART, _BOTH),
    ("MBart", "ForConditionalGeneration", _BART, _BOTH),
    ("Marian", "MTModel", _BART, _BOTH),
    ("Pegasus", "ForConditionalGeneration", _BART, _BOTH),
    ("Blenderbot", "ForConditionalGeneration", _BART, _BOTH),
    ("Whisper", "ForConditionalGeneration", _WHISPER, _MEL),
    ("Wav2Vec2", "ForCTC", _WAV, _SOUND),
    ("ViT", "ForImageClassification", _VIT, _PIXELS),
    ("Beit", "ForImageClassification", _VIT, _PIXELS),
    ("Dinov2", "ForImageClassification", _VIT, _PIXELS),
    ("ResNet", "ForImageClassification", _RESNET, _PIXELS),
    ("RegNet", "ForImageClassification", _RESNET | {"groups_width": 32}, _PIXELS),
    ("CLIP", "Model", _CLIP, _TEXT | _PIXELS),
)


def transformers() -> Iterator[Named]:
    """A function of the parameters each, as `quantize` says of models that hold them."""

    def build(name: str, config: str, fields: dict[str, Any], inputs: dict[str, Any]) -> Built:
        library: Any = importlib.import_module("transformers")
        settings = getattr(library, f"{config}Config")(**fields)
        held = getattr(library, f"Flax{name}")(settings, _do_init=False)

        def call(params: Any, **inputs: Any) -> Any:
            return held(**inputs, params=params).to_tuple()

        return Built(call, drawn(held.params_shape_tree), (), inputs)

    _old_clip()
    for family, suffix, fields, inputs in _MODELS:
        name = family + suffix
        label = f"{name}, gated" if fields is _GATED else name
        yield label, lambda row=(name, family, fields, inputs): build(*row)


def _old_clip() -> None:
    """T5 still calls `jnp.clip(x, a_min=)`, which JAX has dropped."""
    clip = jnp.clip

    def both(x: Any, *args: Any, a_min: Any = None, a_max: Any = None, **kwargs: Any) -> Any:
        return clip(x, *(args or (a_min, a_max)), **kwargs)

    jnp.clip = both  # type: ignore[assignment]
