"""Small models of transformers, with parameters by chance: one of each kind that `hf.connect` is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

N, VOCABULARY = 24, 64


def text(**options: Any) -> dict[str, Any]:
    """The sizes of a model of text."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 128}
    return {**sizes, **heads, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}


GQA = {"num_key_value_heads": 2, "head_dim": 8}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**text(num_key_value_heads=2))),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**text(num_key_value_heads=2, sliding_window=6))),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**text(**GQA, sliding_window=6, query_pre_attn_scalar=8))),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **text(
                **GQA, sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
            )
        )
    ),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**text(num_key_value_heads=2))),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**text(**GQA))),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **text(**GQA, num_local_experts=2, num_experts_per_tok=1, sliding_window=6),
            layer_types=["sliding_attention", "full_attention"],
            experts_implementation="eager",
        )
    ),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**text()), add_pooling_layer=False),
    "modernbert": lambda: tf.ModernBertModel(
        tf.ModernBertConfig(**text(local_attention=8, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2))
    ),
}
WIDTHS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCABULARY, **WIDTHS, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=VOCABULARY, **WIDTHS, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            num_mel_bins=8, max_source_positions=N, max_target_positions=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    ),
}  # fmt: skip
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: tf.ViTModel(
        tf.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        add_pooling_layer=False,
    ),
    "clip": lambda: tf.CLIPVisionModel(
        tf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        )
    ),
}
FAMILIES = {**DECODERS, **ENCODERS, **SEQUENCES, **IMAGES}


def made(name: str, dtype: torch.dtype = torch.float64, attention: str = "eager") -> nn.Module:
    """A model in eval mode; attention sharpened, so that graphs matter."""
    torch.manual_seed(0)
    model = FAMILIES[name]().to(dtype).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if any(word in part for word in ("q_proj", "k_proj", "query", "key", "c_attn", ".q.", ".k.", "Wqkv")):
                parameter.mul_(8)
    model.set_attn_implementation(attention)
    return model


def inputs(name: str, batch: int = 2, n: int = N) -> dict[str, torch.Tensor]:
    """What a model is called with."""
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (batch, n), generator=chance)
    if name in DECODERS:
        return {"input_ids": tokens, "use_cache": False}
    if name in ENCODERS:
        return {"input_ids": tokens}
    if name in IMAGES:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=chance, dtype=torch.float64)}
    after = {"decoder_input_ids": tokens[:, : n // 2], "use_cache": False}
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 2 * N, generator=chance, dtype=torch.float64), **after}
    return {"input_ids": tokens, **after}
