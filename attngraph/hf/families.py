"""The families of pretrained models: what their settings mean here, and what their tensors are called. No files.

A family differs from the others in its switches and in its graph; the rest is names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple

from torch import Tensor, nn

from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal, Window
from attngraph.hf.settings import ACTIVATIONS, Settings, WrongSetting, unlike
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import AudioEmbedding, TransformerConfig


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


def _bert(given: Settings, tied: bool, **head: Any) -> nn.Module:
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
    types = given("type_vocab_size", 2)
    return Encoder(config, given.size("vocab_size", 30522), num_types=types, tied=tied, **head)


def _bert_classes(given: Settings, tied: bool, classify: str) -> nn.Module:
    return _bert(given, tied, num_classes=_num_labels(given), classify=classify)


def _num_labels(given: Settings) -> int:
    return given.size("num_labels", len(given("id2label", kind=dict) or "ab"))  # two by default


_BERT_NAMES = (
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
)
BERT = Family(
    ("BertForMaskedLM", "BertForPreTraining"),
    _bert,
    (
        *_BERT_NAMES,
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
BERT_SEQUENCES = Family(
    ("BertForSequenceClassification",),
    partial(_bert_classes, classify="sequence"),
    (*_BERT_NAMES, Name("pooler.dense", "head.pool"), Name("classifier", "head.scores")),
    prefix="bert.",
    outside=("classifier.",),
    unread=(r"embeddings\.position_ids",),
)
BERT_TOKENS = BERT_SEQUENCES._replace(
    architectures=("BertForTokenClassification",),
    build=partial(_bert_classes, classify="tokens"),
    names=(*_BERT_NAMES, Name("classifier", "head.scores")),
    unread=(r"embeddings\.position_ids", r"pooler\.dense\..*"),
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
    return ViT(config, _num_labels(given), image_size=image, patch_size=patch, channels=given.size("num_channels", 3))


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

FAMILIES: dict[str, tuple[Family, ...]] = {
    "gpt2": (GPT2,),
    "bert": (BERT, BERT_SEQUENCES, BERT_TOKENS),
    "vit": (VIT,),
    "t5": (T5,),
    "whisper": (WHISPER,),
    "llama": (LLAMA,),
    "qwen2": (QWEN2,),
    "decision_transformer": (DECISION,),
}
