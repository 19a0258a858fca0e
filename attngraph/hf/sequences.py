"""Models that hear one sequence and make another: T5, BART and Whisper."""

from __future__ import annotations

from torch import nn

from attngraph.hf.family import AFTER_TWO, SAME, TRANSPOSED, Family, Name, of_layers, projections
from attngraph.hf.settings import ACTIVATIONS, Settings, WrongSetting
from attngraph.models import EncoderDecoder
from attngraph.nn import AudioEmbedding, TransformerConfig

# ---------------------------------------------------------------------------------------------------------------- T5


def _t5(given: Settings, tied: bool) -> nn.Module:
    given.must("is_decoder", False)
    gate, _, activation = given("feed_forward_proj", "relu").rpartition("-")
    if gate not in ("", "gated"):
        raise WrongSetting(f"the setting 'feed_forward_proj' must be like relu or gated-gelu (got {gate}-{activation})")
    given.asked |= {"n_positions", "dense_act_fn", "is_gated_act"}
    activation = "gelu_new" if gate and activation == "gelu" else activation
    if activation not in ACTIVATIONS:
        raise WrongSetting(f"the setting 'feed_forward_proj' must be of {', '.join(ACTIVATIONS)} (got {activation!r})")
    common = {
        "embed_dim": given.size("d_model", 512),
        "num_heads": given.size("num_heads", 8),
        "head_dim": given.size("d_kv", 64),
        "hidden_dim": given.size("d_ff", 2048),
        "activation": ACTIVATIONS[activation],
        "gated": bool(gate),
        "norm": "rms",
        "norm_eps": given("layer_norm_epsilon", 1e-6),
        "bias": (),
        "scale": 1.0,
        "position": "relative",
        "relative_buckets": given.size("relative_attention_num_buckets", 32),
        "relative_max_distance": given.size("relative_attention_max_distance", 128),
        "dropout": given.probability("dropout_rate", 0.1),
    }
    layers = given.num_layers("num_layers", 6)
    scaled = given("scale_decoder_outputs", given("tie_word_embeddings", True))
    return EncoderDecoder(
        TransformerConfig(num_layers=layers, **common),
        TransformerConfig(
            num_layers=given.num_layers("num_decoder_layers", layers),
            cross=True,
            relative_bidirectional=False,
            **common,
        ),
        given.size("vocab_size", 32128),
        tied=tied,
        logit_scale=common["embed_dim"] ** -0.5 if scaled else 1.0,
    )


def _t5_attention(file: str, here: str, norm: str) -> tuple[Name, ...]:
    return (*projections(file, here, ("q", "k", "v", "o")), Name(norm, f"{here}_norm"))


def _t5_compute(layer: str) -> tuple[Name, ...]:
    return (
        Name(f"{layer}.DenseReluDense.wi", "feedforward.up"),
        Name(f"{layer}.DenseReluDense.wi_0", "feedforward.gate"),
        Name(f"{layer}.DenseReluDense.wi_1", "feedforward.up"),
        Name(f"{layer}.DenseReluDense.wo", "feedforward.down"),
        Name(f"{layer}.layer_norm", "feedforward_norm"),
    )


_T5_SELF = _t5_attention("layer.0.SelfAttention", "attention", "layer.0.layer_norm")
_T5_TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5 = Family(
    ("T5ForConditionalGeneration",),
    _t5,
    (
        Name("shared", "embedding"),
        *of_layers("encoder.block.{} = encoder.layers.{}", *_T5_SELF, *_t5_compute("layer.1")),
        *of_layers(
            "decoder.block.{} = decoder.layers.{}",
            *_T5_SELF,
            *_t5_attention("layer.1.EncDecAttention", "cross", "layer.1.layer_norm"),
            *_t5_compute("layer.2"),
        ),
        Name(f"encoder.{_T5_TABLE}", "encoder.position.table", TRANSPOSED),
        Name(f"decoder.{_T5_TABLE}", "decoder.position.table", TRANSPOSED),
        Name("encoder.final_layer_norm", "encoder.final_norm"),
        Name("decoder.final_layer_norm", "decoder.final_norm"),
        Name("lm_head", "head"),
    ),
    head=("lm_head.weight", "shared.weight"),
    unread=(
        r"(en|de)coder\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    ties=lambda given: True,  # unless the file has a head of its own
)

# ----------------------------------------------------------------------------------------------------------- Whisper


def _whisper(given: Settings, tied: bool) -> nn.Module:
    given("num_hidden_layers")
    common = {
        "embed_dim": given.size("d_model", 384),
        "activation": given.activation("activation_function", "gelu"),
        "bias": ("q", "v", "o", "ff", "norm"),
        "position": "learned",
        "dropout": given.probability("dropout", 0.0),
    }
    encoder, decoder = (
        TransformerConfig(
            num_layers=given.num_layers(f"{side}_layers", 4),
            num_heads=given.size(f"{side}_attention_heads", 6),
            hidden_dim=given.size(f"{side}_ffn_dim", 1536),
            max_length=given.size(f"max_{what}_positions", positions),
            cross=side == "decoder",
            **common,
        )
        for side, what, positions in (("encoder", "source", 1500), ("decoder", "target", 448))
    )
    source = AudioEmbedding(given.size("num_mel_bins", 80), common["embed_dim"])
    return EncoderDecoder(encoder, decoder, given.size("vocab_size", 51865), source=source, tied=tied)


_WHISPER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_WHISPER_SELF = (
    *projections("self_attn", "attention", _WHISPER_PROJECTIONS),
    Name("self_attn_layer_norm", "attention_norm"),
    Name("fc1", "feedforward.up"),
    Name("fc2", "feedforward.down"),
    Name("final_layer_norm", "feedforward_norm"),
)
WHISPER = Family(
    ("WhisperForConditionalGeneration",),
    _whisper,
    (
        Name("encoder.conv1", "source.first"),
        Name("encoder.conv2", "source.second"),
        Name("encoder.embed_positions", "encoder.position"),
        *of_layers("encoder.layers.{} = encoder.layers.{}", *_WHISPER_SELF),
        Name("encoder.layer_norm", "encoder.final_norm"),
        Name("decoder.embed_tokens", "embedding"),
        Name("decoder.embed_positions", "decoder.position"),
        *of_layers(
            "decoder.layers.{} = decoder.layers.{}",
            *_WHISPER_SELF,
            *projections("encoder_attn", "cross", _WHISPER_PROJECTIONS),
            Name("encoder_attn_layer_norm", "cross_norm"),
        ),
        Name("decoder.layer_norm", "decoder.final_norm"),
        Name("proj_out", "head"),
    ),
    prefix="model.",
    outside=("proj_out.",),
    head=("proj_out.weight", "decoder.embed_tokens.weight"),
)

# -------------------------------------------------------------------------------------------------------------- BART


def _bart(given: Settings, tied: bool) -> nn.Module:
    given("num_hidden_layers")
    given("classif_dropout")
    given("force_bos_token_to_be_generated")
    given.must("scale_embedding", False)
    given.must("normalize_before", False)
    given.must("normalize_embedding", True)
    given.must("add_final_layer_norm", False)
    given.must("add_bias_logits", False)
    given.must("is_decoder", False)
    given.must("static_position_embeddings", False)
    common = {
        "embed_dim": given.size("d_model", 1024),
        "activation": given.activation("activation_function", "gelu"),
        "norm_order": "post",
        "embed_norm": True,
        "final_norm": False,
        "position": "learned",
        "max_length": given.size("max_position_embeddings", 1024),
        "dropout": given.probability("dropout", 0.1),
    }
    encoder, decoder = (
        TransformerConfig(
            num_layers=given.num_layers(f"{side}_layers", 12),
            num_heads=given.size(f"{side}_attention_heads", 16),
            hidden_dim=given.size(f"{side}_ffn_dim", 4096),
            cross=side == "decoder",
            **common,
        )
        for side in ("encoder", "decoder")
    )
    return EncoderDecoder(encoder, decoder, given.size("vocab_size", 50265), tied=tied)


BART = Family(
    ("BartForConditionalGeneration",),
    _bart,
    (
        Name("shared", "embedding"),
        *(
            Name(f"{side}.{file}", f"{side}.{here}", form)
            for side in ("encoder", "decoder")
            for file, here, form in (
                ("embed_positions", "position", AFTER_TWO),
                ("layernorm_embedding", "embed_norm", SAME),
            )
        ),
        *of_layers("encoder.layers.{} = encoder.layers.{}", *_WHISPER_SELF),
        *of_layers(
            "decoder.layers.{} = decoder.layers.{}",
            *_WHISPER_SELF,
            *projections("encoder_attn", "cross", _WHISPER_PROJECTIONS),
            Name("encoder_attn_layer_norm", "cross_norm"),
        ),
        Name("lm_head", "head"),
    ),
    prefix="model.",
    outside=("lm_head.", "final_logits_bias"),
    head=("lm_head.weight", "shared.weight"),
    unread=(r"(en|de)coder\.embed_tokens\.weight",),
    zeros=("final_logits_bias",),
)
