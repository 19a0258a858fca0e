"""Models that hear both sides: BERT, RoBERTa, DistilBERT and ViT."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from attngraph.hf.family import AFTER_TWO, ALONE_IN_A_BATCH, IN_A_BATCH, Family, Name, of_layers, projections
from attngraph.hf.settings import Settings
from attngraph.models import Encoder, ViT
from attngraph.nn import TransformerConfig

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


def _bert(given: Settings, tied: bool, *, vocabulary: int = 30522, unused: int = 0, **head: Any) -> nn.Module:
    """`unused` rows of the table of positions belong to no place."""
    given.must("is_decoder", False)
    given.must("add_cross_attention", False)
    given.must("position_embedding_type", "absolute")
    config = TransformerConfig(
        **_bert_sizes(given),
        norm_order="post",
        embed_norm=True,
        final_norm=False,
        max_length=given.size("max_position_embeddings", 512) - unused,
        dropout=given.probability("hidden_dropout_prob", 0.1),
    )
    types = given("type_vocab_size", 2)
    return Encoder(config, given.size("vocab_size", vocabulary), num_types=types, tied=tied, **head)


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


def _roberta(given: Settings, tied: bool) -> nn.Module:
    given.must("pad_token_id", 1)  # where places begin
    given.must("hidden_act", "gelu")
    return _bert(given, tied, vocabulary=50265, unused=2)


ROBERTA = Family(
    ("RobertaForMaskedLM",),
    _roberta,
    (
        *(name._replace(form=AFTER_TWO) if name.here == "transformer.position" else name for name in _BERT_NAMES),
        Name("lm_head.dense", "head.dense"),
        Name("lm_head.layer_norm", "head.norm"),
        Name("lm_head.decoder", "head.scores"),
        Name("lm_head.bias", "head.scores.bias"),  # where the other is tied to it
    ),
    prefix="roberta.",
    outside=("lm_head.",),
    head=("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
    unread=(r"embeddings\.position_ids", r"pooler\.dense\..*", r"lm_head\.bias"),
)


def _distilbert(given: Settings, tied: bool) -> nn.Module:
    given("sinusoidal_pos_embds")  # how they began; they are in the file
    given("qa_dropout")
    given("seq_classif_dropout")
    config = TransformerConfig(
        embed_dim=given.size("dim", 768),
        num_layers=given.num_layers("n_layers", 6),
        num_heads=given.size("n_heads", 12),
        hidden_dim=given.size("hidden_dim", 3072),
        activation=given.activation("activation", "gelu"),
        norm_eps=1e-12,
        norm_order="post",
        embed_norm=True,
        final_norm=False,
        max_length=given.size("max_position_embeddings", 512),
        dropout=given.probability("dropout", 0.1),
    )
    return Encoder(config, given.size("vocab_size", 30522), tied=tied)


DISTILBERT = Family(
    ("DistilBertForMaskedLM",),
    _distilbert,
    (
        Name("embeddings.word_embeddings", "embedding"),
        Name("embeddings.position_embeddings", "transformer.position"),
        Name("embeddings.LayerNorm", "transformer.embed_norm"),
        *of_layers(
            "transformer.layer.{} = transformer.layers.{}",
            *projections("attention", "attention", ("q_lin", "k_lin", "v_lin", "out_lin")),
            Name("sa_layer_norm", "attention_norm"),
            Name("ffn.lin1", "feedforward.up"),
            Name("ffn.lin2", "feedforward.down"),
            Name("output_layer_norm", "feedforward_norm"),
        ),
        Name("vocab_transform", "head.dense"),
        Name("vocab_layer_norm", "head.norm"),
        Name("vocab_projector", "head.scores"),
    ),
    prefix="distilbert.",
    outside=("vocab_",),
    head=("vocab_projector.weight", "embeddings.word_embeddings.weight"),
    unread=(r"embeddings\.position_ids",),
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
