"""The families of pretrained models: what their settings mean here, and what their tensors are called. No files.

A family differs from the others in its switches and in its graph; the rest is names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any, NamedTuple

from torch import Tensor, nn

from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal, Window
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import AudioEmbedding, TransformerConfig


class WrongSetting(ValueError):
    """It names the setting and what it is."""


class Settings:
    """What a config.json says, and which of it was asked for: what nobody asks for is unknown, and an error.

    `layers` is how many there are in the file, at most.
    """

    def __init__(self, given: Mapping[str, Any], layers: int):
        self.given, self.layers = given, layers
        self.asked: set[str] = set(IRRELEVANT)
        self.used: dict[str, str] = {}  # sizes and switches, as errors tell them

    def __call__(self, name: str, default: Any = None, kind: type | None = None, *, least: float = 0) -> Any:
        """A setting, or what it is by default where it is absent or null; of its default's kind, if of no other."""
        self.asked.add(name)
        value, kind = self.given.get(name), type(default) if kind is None else kind
        if value is not None and (wanted := unlike(value, kind, least)):
            raise WrongSetting(f"the setting {name!r} must be {wanted} (got {value!r})")
        found = default if value is None else float(value) if kind is float else value
        if kind in (int, bool) and found is not None:
            self.used[name] = f"{name}={found}" + " by default" * (value is None)
        return found

    def size(self, name: str, default: int | None) -> Any:
        """A number of things of which there is at least one."""
        return self(name, default, int, least=1)

    def num_layers(self, name: str, default: int) -> int:
        """A number of layers; no more than have tensors are ever made."""
        found = self.size(name, default)
        if found > self.layers:
            raise WrongSetting(
                f"the setting {name!r} must be at most {self.layers}, as the file has no more layers (got {found})"
            )
        return found

    def probability(self, name: str, default: float) -> float:
        """Of dropout."""
        if (found := self(name, default)) >= 1:
            raise WrongSetting(f"the setting {name!r} must be a probability below 1 (got {found!r})")
        return found

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """Height and width, which may be one number."""
        value = self.given.get(name)
        if not isinstance(value, list):
            return (self.size(name, default),) * 2
        if len(value) != 2 or any(unlike(each, int, 1) for each in value):
            raise WrongSetting(f"the setting {name!r} must be a whole number of 1 or more, or two (got {value!r})")
        self.asked.add(name)
        self.used[name] = f"{name}={value}"
        return (value[0], value[1])

    def must(self, name: str, *allowed: Any) -> None:
        """A setting of which only some values, the first of them the default, can be computed here."""
        if (found := self(name, allowed[0])) not in allowed:
            raise WrongSetting(f"the setting {name!r} must be {' or '.join(map(repr, allowed))} (got {found!r})")

    def activation(self, name: str, default: str) -> str:
        """One of those that are here, by our own name for it."""
        found = self(name, default)
        if found not in ACTIVATIONS:
            raise WrongSetting(f"the setting {name!r} must be one of {', '.join(ACTIVATIONS)} (got {found!r})")
        return ACTIVATIONS[found]

    def unknown(self) -> list[str]:
        """The settings that nobody asked for."""
        return sorted(name for name in self.given if name not in self.asked)


def unlike(value: Any, kind: type, least: float = 0) -> str | None:
    """What a value from JSON would have to be, to be of a kind; None if it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float:
        fits = is_number and least <= value <= sys.float_info.max
        return None if fits else f"a number of {least} or more"
    if kind is int:
        fits = is_number and isinstance(value, int) and least <= value <= MAX_SIZE
        return None if fits else f"a whole number from {least} to {MAX_SIZE}"
    if kind is type(None) or isinstance(value, kind):
        return None
    return {bool: "true or false", str: "a string", list: "a list", dict: "a mapping"}[kind]


MAX_SIZE = 2**31 - 1
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
# What changes no logit: names, training, text generation, other heads, how something is computed.
_IRRELEVANT = """
    _attn_implementation_autoset auto_map cache_implementation cross_attention_hidden_size diversity_penalty
    encoder_no_repeat_ngram_size exponential_decay_length_penalty no_repeat_ngram_size num_beam_groups output_scores
    remove_invalid_values return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript typical_p
    unsloth_version use_bfloat16 use_mrope
    _name_or_path activation_dropout apply_spec_augment architectures attention_dropout attention_probs_dropout_prob
    attn_implementation attn_pdrop attngraph bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout classifier_proj_size cls_token_id decoder_layerdrop
    decoder_start_token_id directionality do_sample dtype early_stopping embd_pdrop encoder_layerdrop encoder_stride
    eos_token_id finetuning_task forced_bos_token_id forced_decoder_ids forced_eos_token_id gradient_checkpointing
    id2label init_std initializer_factor initializer_range is_encoder_decoder keys_to_ignore_at_inference label2id
    length_penalty mask_feature_length mask_feature_min_masks mask_feature_prob mask_time_length mask_time_min_masks
    mask_time_prob mask_token_id max_length median_filter_width min_length model_type n_ctx num_beams
    num_return_sequences output_attentions output_hidden_states output_past pad_token_id pooler_act pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_output_size pooler_size_per_head pooler_type prefix
    pretraining_tp problem_type reorder_and_upcast_attn repetition_penalty return_dict scale_embedding sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tokenizer_class top_k top_p torch_dtype transformers_version unk_token_id
    use_cache use_return_dict use_weighted_layer_sum
"""
IRRELEVANT = frozenset(_IRRELEVANT.split())


class Form(NamedTuple):
    """How a tensor in a file becomes one here, and the other way."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.mT if x.ndim == 2 else x


SAME, TRANSPOSED = Form(_same, _same), Form(_transposed, _transposed)
IN_A_BATCH = Form(methodcaller("squeeze", 0), methodcaller("unsqueeze", 0))
ALONE_IN_A_BATCH = Form(methodcaller("squeeze", (0, 1)), methodcaller("expand", 1, 1, -1))


class Name(NamedTuple):
    """What a module is called in a file, and here; {} is the number of the layer. Of several, the file has all in one,
    one after the other.
    """

    file: str
    here: str | tuple[str, ...]
    form: Form = SAME


class Family(NamedTuple):
    """One kind of pretrained model."""

    architectures: tuple[str, ...]
    build: Callable[[Settings, bool], nn.Module]  # settings, and whether the head is tied
    names: tuple[Name, ...]
    prefix: str = ""  # of the names of most tensors
    head: tuple[str, str] = ("", "")  # the names, in the file, of head and embedding, which may be the same
    unread: tuple[str, ...] = ()  # tensors that have no part in the logits: regular expressions
    ties: Callable[[Settings], bool] = lambda given: given("tie_word_embeddings", True)
    outside: tuple[str, ...] = ()  # names without the prefix begin so

    def full(self, name: str) -> str:
        """A name with the prefix that it has in files."""
        return name if name.startswith(self.outside) else self.prefix + name


def of_layers(layers: str, *names: Name) -> tuple[Name, ...]:
    """Names within a layer, such as `h.{}` in the file for GPT-2 and `transformer.layers.{}` here."""
    file, here = layers.split(" = ")

    def inside(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{here}.{name}" if isinstance(name, str) else tuple(f"{here}.{each}" for each in name)

    return tuple(Name(f"{file}.{name.file}", inside(name.here), name.form) for name in names)


ATTENTION = ("attention.query", "attention.key", "attention.value")


def projections(file: str, here: str, names: Sequence[str]) -> tuple[Name, ...]:
    """The four projections of attention: what those of the queries, keys, values and output are called in the file."""
    pairs = zip(names, ("query", "key", "value", "out"), strict=True)
    return tuple(Name(f"{file}.{name}", f"{here}.{own}") for name, own in pairs)


# ------------------------------------------------------------------------------------------------------------- GPT-2


def _gpt2_config(given: Settings, activation: str, *, width: str, layers: int, heads: int) -> TransformerConfig:
    """`width` is the name of the setting; `layers` and `heads` are what there is by default."""
    given.must("add_cross_attention", False)
    embed_dim, num_layers = given.size(width, 768), given.num_layers("n_layer", layers)
    num_heads = given.size("n_head", heads)
    scale = (embed_dim // num_heads) ** -0.5 if given("scale_attn_weights", True) else 1.0
    by_layer = given("scale_attn_by_inverse_layer_idx", False)
    return TransformerConfig(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=given.size("n_inner", None),
        activation=given.activation("activation_function", activation),
        norm_eps=given("layer_norm_epsilon", 1e-5),
        scale=tuple(scale / (layer + 1) for layer in range(num_layers)) if by_layer else scale,
        position="learned",
        max_length=given.size("n_positions", 1024),
        dropout=given.probability("resid_pdrop", 0.1),
    )


def _gpt2(given: Settings, tied: bool) -> nn.Module:
    config = _gpt2_config(given, "gelu_new", width="n_embd", layers=12, heads=12)
    return GPT(config, given.size("vocab_size", 50257), tied=tied)


def _gpt2_layers(layers: str) -> tuple[Name, ...]:
    return of_layers(
        layers,
        Name("ln_1", "attention_norm"),
        Name("attn.c_attn", ATTENTION, TRANSPOSED),
        Name("attn.c_proj", "attention.out", TRANSPOSED),
        Name("ln_2", "feedforward_norm"),
        Name("mlp.c_fc", "feedforward.up", TRANSPOSED),
        Name("mlp.c_proj", "feedforward.down", TRANSPOSED),
    )


GPT2 = Family(
    ("GPT2LMHeadModel",),
    _gpt2,
    (
        Name("wte", "embedding"),
        Name("wpe", "transformer.position"),
        *_gpt2_layers("h.{} = transformer.layers.{}"),
        Name("ln_f", "transformer.final_norm"),
        Name("lm_head", "head"),
    ),
    prefix="transformer.",
    outside=("lm_head.",),
    head=("lm_head.weight", "wte.weight"),
    unread=(r"h\.\d+\.attn\.(masked_)?bias",),
)

# ---------------------------------------------------------------------------------------------- Decision Transformer


def _decision(given: Settings, tied: bool) -> nn.Module:
    given("vocab_size")
    return DecisionTransformer(
        _gpt2_config(given, "relu", width="hidden_size", layers=3, heads=1),
        state_dim=given.size("state_dim", 17),
        action_dim=given.size("act_dim", 4),
        max_time=given.size("max_ep_len", 4096),
        bounded=given("action_tanh", True),
    )


DECISION = Family(
    ("DecisionTransformerModel",),
    _decision,
    (
        Name("embed_timestep", "time"),
        Name("embed_return", "embed_return"),
        Name("embed_state", "embed_state"),
        Name("embed_action", "embed_action"),
        Name("embed_ln", "norm"),
        Name("encoder.wpe", "transformer.position"),
        *_gpt2_layers("encoder.h.{} = transformer.layers.{}"),
        Name("encoder.ln_f", "transformer.final_norm"),
        Name("predict_action.0", "head"),
    ),
    unread=(r"encoder\.wte\..*", r"predict_(state|return)\..*", r"encoder\.h\.\d+\.attn\.(masked_)?bias"),
    ties=lambda given: given("tie_word_embeddings", False),
)

# -------------------------------------------------------------------------------------------------------------- BERT


def _bert_sizes(given: Settings) -> dict[str, Any]:
    """The switches whose settings BERT and ViT call the same."""
    return {
        "embed_dim": given.size("hidden_size", 768),
        "num_layers": given.num_layers("num_hidden_layers", 12),
        "num_heads": given.size("num_attention_heads", 12),
        "hidden_dim": given.size("intermediate_size", 3072),
        "activation": given.activation("hidden_act", "gelu"),
        "norm_eps": given("layer_norm_eps", 1e-12),
    }


def _bert(given: Settings, tied: bool) -> nn.Module:
    given.must("is_decoder", False)
    given.must("add_cross_attention", False)
    given.must("position_embedding_type", "absolute")
    config = TransformerConfig(
        **_bert_sizes(given),
        norm_order="post",
        embed_norm=True,
        final_norm=False,
        max_length=given.size("max_position_embeddings", 512),
        dropout=given.probability("hidden_dropout_prob", 0.1),
    )
    return Encoder(config, given.size("vocab_size", 30522), num_types=given("type_vocab_size", 2), tied=tied)


BERT = Family(
    ("BertForMaskedLM", "BertForPreTraining"),
    _bert,
    (
        Name("embeddings.word_embeddings", "embedding"),
        Name("embeddings.token_type_embeddings", "types"),
        Name("embeddings.position_embeddings", "transformer.position"),
        Name("embeddings.LayerNorm", "transformer.embed_norm"),
        *of_layers(
            "encoder.layer.{} = transformer.layers.{}",
            *projections("attention", "attention", ("self.query", "self.key", "self.value", "output.dense")),
            Name("attention.output.LayerNorm", "attention_norm"),
            Name("intermediate.dense", "feedforward.up"),
            Name("output.dense", "feedforward.down"),
            Name("output.LayerNorm", "feedforward_norm"),
        ),
        Name("cls.predictions.transform.dense", "head.dense"),
        Name("cls.predictions.transform.LayerNorm", "head.norm"),
        Name("cls.predictions.decoder", "head.scores"),
        Name("cls.predictions.bias", "head.scores.bias"),  # where the other is tied to it
    ),
    prefix="bert.",
    outside=("cls.",),
    head=("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
    unread=(
        r"embeddings\.position_ids",
        r"pooler\.dense\..*",
        r"cls\.seq_relationship\..*",
        r"cls\.predictions\.bias",
    ),
)

# --------------------------------------------------------------------------------------------------------------- ViT


def _vit(given: Settings, tied: bool) -> nn.Module:
    image, patch = given.pair("image_size", 224), given.pair("patch_size", 16)
    config = TransformerConfig(
        **_bert_sizes(given),
        bias=(*("q", "k", "v") * bool(given("qkv_bias", True)), "o", "ff", "norm"),
        max_length=1 + (image[0] // patch[0]) * (image[1] // patch[1]),
        dropout=given.probability("hidden_dropout_prob", 0.0),
    )
    classes = given.size("num_labels", len(given("id2label", kind=dict) or "ab"))  # two by default
    return ViT(config, classes, image_size=image, patch_size=patch, channels=given.size("num_channels", 3))


VIT = Family(
    ("ViTForImageClassification",),
    _vit,
    (
        Name("embeddings.cls_token", "cls", ALONE_IN_A_BATCH),
        Name("embeddings.position_embeddings", "transformer.position.weight", IN_A_BATCH),
        Name("embeddings.patch_embeddings.projection", "patches.project"),
        *of_layers(
            "encoder.layer.{} = transformer.layers.{}",
            Name("layernorm_before", "attention_norm"),
            *projections(
                "attention", "attention", ("attention.query", "attention.key", "attention.value", "output.dense")
            ),
            Name("layernorm_after", "feedforward_norm"),
            Name("intermediate.dense", "feedforward.up"),
            Name("output.dense", "feedforward.down"),
        ),
        Name("layernorm", "transformer.final_norm"),
        Name("classifier", "head"),
    ),
    prefix="vit.",
    outside=("classifier.",),
    unread=(r"pooler\.dense\..*", r"embeddings\.mask_token"),
)

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

# --------------------------------------------------------------------------------------------------- Llama and Qwen2


SCALINGS = {
    "factor": float, "original_max_position_embeddings": int, "attention_factor": float, "mscale": float,
    "mscale_all_dim": float, "beta_fast": float, "beta_slow": float, "truncate": bool, "low_freq_factor": float,
    "high_freq_factor": float, "short_factor": list, "long_factor": list,
}  # fmt: skip
LEAST = 1e-9  # of what is divided by


def _rotary(given: Settings) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, as configs of either age say them."""
    old = given("rope_scaling", kind=dict)
    found = dict(given("rope_parameters", kind=dict) or old or {})
    kind = found.pop("rope_type", found.pop("type", "default"))
    base = found.pop("rope_theta", None)
    found.pop("type", None)
    if (part := found.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise WrongSetting(f"the setting 'partial_rotary_factor' must be 1.0: all of a head is turned (got {part!r})")
    if unknown := sorted(set(found) - set(SCALINGS)):
        raise WrongSetting(f"unknown settings in 'rope_parameters' or 'rope_scaling': {', '.join(unknown)}")
    for name, value in (("rope_type", kind), ("rope_theta", base), *found.items()):
        wanted = None if value is None else unlike(value, SCALINGS.get(name, str if value is kind else float), LEAST)
        if isinstance(value, list) and any(unlike(each, float, LEAST) for each in value):
            wanted = "numbers above 0"
        if wanted:
            raise WrongSetting(f"the setting {name!r} of the rotary positions must be {wanted} (got {value!r})")
    found = {
        name: float(value) if SCALINGS[name] is float and value is not None else value for name, value in found.items()
    }
    base = float(given("rope_theta", 10000.0) if base is None else base)
    given.asked.add("rope_theta")
    if base <= 1:
        raise WrongSetting(f"the setting 'rope_theta' must be above 1 (got {base})")
    longest = given.size("max_position_embeddings", 2048)
    trained = found.get("original_max_position_embeddings") or given.size("original_max_position_embeddings", longest)
    if kind == "default":
        return base, None
    if found.get("factor") is None:
        found["factor"] = longest / trained
    found["original_max_position_embeddings"] = longest if kind == "dynamic" else trained
    return base, {"rope_type": kind, **found}


def _llama_config(given: Settings, bias: tuple[str, ...], eps: float) -> TransformerConfig:
    base, scaling = _rotary(given)
    heads, width = given.size("num_attention_heads", 32), given.size("hidden_size", 4096)
    return TransformerConfig(
        embed_dim=width,
        num_layers=given.num_layers("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=given.size("num_key_value_heads", heads),
        head_dim=given.size("head_dim", width // heads),
        hidden_dim=given.size("intermediate_size", 11008),
        activation=given.activation("hidden_act", "silu"),
        gated=True,
        norm="rms",
        norm_eps=given("rms_norm_eps", eps),
        bias=bias,
        position="rotary",
        rotary_base=base,
        rotary_scaling=scaling,
    )


def _llama(given: Settings, tied: bool) -> nn.Module:
    bias = ("q", "k", "v", "o") * bool(given("attention_bias", False)) + ("ff",) * bool(given("mlp_bias", False))
    return GPT(_llama_config(given, bias, 1e-6), given.size("vocab_size", 32000), tied=tied)


def _qwen2(given: Settings, tied: bool) -> nn.Module:
    config = _llama_config(given, ("q", "k", "v"), 1e-6)
    width = given.size("sliding_window", 4096) if given("use_sliding_window", False) else None
    given.asked |= {"sliding_window", "max_window_layers"}  # used or not
    kinds = given("layer_types", kind=list) or [
        "sliding_attention" if width and layer >= given("max_window_layers", 28) else "full_attention"
        for layer in range(config.num_layers)
    ]
    if len(kinds) != config.num_layers:
        layers = f"{config.num_layers} layers, as many as 'num_hidden_layers'"
        raise WrongSetting(f"the setting 'layer_types' must name {layers} (got {kinds})")
    return GPT(config, given.size("vocab_size", 151936), [_layer_graph(kind, width) for kind in kinds], tied=tied)


def _layer_graph(kind: str, width: int | None) -> Graph:
    if kind == "full_attention":
        return Causal()
    if kind != "sliding_attention" or not width:
        raise WrongSetting(f"the setting 'layer_types' must name full_attention or sliding_attention (got {kind!r})")
    return Window(width - 1, 0)


_LLAMA_NAMES = (
    Name("embed_tokens", "embedding"),
    *of_layers(
        "layers.{} = transformer.layers.{}",
        Name("input_layernorm", "attention_norm"),
        *projections("self_attn", "attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        Name("post_attention_layernorm", "feedforward_norm"),
        Name("mlp.gate_proj", "feedforward.gate"),
        Name("mlp.up_proj", "feedforward.up"),
        Name("mlp.down_proj", "feedforward.down"),
    ),
    Name("norm", "transformer.final_norm"),
    Name("lm_head", "head"),
)
LLAMA = Family(
    ("LlamaForCausalLM",),
    _llama,
    _LLAMA_NAMES,
    prefix="model.",
    outside=("lm_head.",),
    head=("lm_head.weight", "embed_tokens.weight"),
    unread=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    ties=lambda given: given("tie_word_embeddings", False),
)
QWEN2 = LLAMA._replace(architectures=("Qwen2ForCausalLM",), build=_qwen2)

FAMILIES = {
    "gpt2": GPT2,
    "bert": BERT,
    "vit": VIT,
    "t5": T5,
    "whisper": WHISPER,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "decision_transformer": DECISION,
}
