"""Models that were made here, as checkpoints: the settings by which a family makes the same model, or what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from attngraph.hf.decoders import DECISION, GPT2, LLAMA, QWEN2
from attngraph.hf.encoders import BERT, BERT_SEQUENCES, BERT_TOKENS, VIT
from attngraph.hf.family import Family
from attngraph.hf.sequences import T5, WHISPER
from attngraph.hf.settings import ACTIVATIONS, MAX_SIZE, Settings
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, Model, ViT
from attngraph.models.saved import NoInitialization
from attngraph.nn import AudioEmbedding, TransformerConfig
from attngraph.nn.rope import Rope

GRAPHS = {"memory_graph"}  # arguments that stand with the graphs
NAMES = {own: name for name, own in reversed(ACTIVATIONS.items())}


def as_family(model: Model, name: str | None) -> tuple[dict[str, Any], Family, Model]:
    """What config.json says of a model, the family, and the model that it makes; ValueError says what is lacking."""
    possible = [each for each in WRITTEN if isinstance(model, each.model) and name in (None, each.model_type)]
    if not possible:
        known = ", ".join(each.model_type for each in WRITTEN if isinstance(model, each.model)) or "none"
        raise ValueError(f"family must be one of those that a {type(model).__name__} can have, {known} (got {name!r})")
    lacking = []
    for each in possible:
        given = {"model_type": each.model_type, **each.settings(model)}
        family = _of_layout(each.family(model), model)
        given["architectures"] = [family.architectures[0]]
        try:
            with torch.device("meta"), NoInitialization():
                again = family.build(Settings(given, MAX_SIZE), getattr(model, "tied", False))
        except (ValueError, TypeError) as error:
            lacking.append(f"{each.model_type}: {error}")
            continue
        assert isinstance(again, Model)
        differences = _differences(model._arguments(), again._arguments())
        if not differences:
            return given, family, again
        lacking.append(f"{each.model_type} has {'; '.join(differences)}")
    raise ValueError(f"no family can carry this {type(model).__name__}: {' | '.join(lacking)}")


def _of_layout(family: Family, model: Model) -> Family:
    """Of the names of T5's matrices, those of this model: one of them depends on another's being there."""
    if family is not T5 or not isinstance(model, EncoderDecoder):
        return family
    other = ".wi" if model.encoder.config.gated else ".wi_1"
    return family._replace(names=tuple(name for name in family.names if not name.file.endswith(other)))


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What the arguments of two models mean, where it differs."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for name in sorted(ours.keys() - GRAPHS):
        one, other = ours[name], theirs[name]
        if isinstance(one, TransformerConfig):
            of, meant = "" if name == "config" else f"{name}.", _meaning(other)
            pairs |= {f"{of}{key}": (value, meant[key]) for key, value in _meaning(one).items() if key in meant}
        else:
            pairs[name] = _kind(one), _kind(other)
    return [f"{name}={other!r}, not {one!r}" for name, (one, other) in pairs.items() if one != other]


def _kind(argument: Any) -> Any:
    """A module, whose tensors are compared by themselves, as the name of its class."""
    return type(argument).__name__ if isinstance(argument, torch.nn.Module) else argument


def _meaning(config: TransformerConfig) -> dict[str, Any]:
    """The switches that count in a model, none of them left to a default."""
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    unused = {
        "init": True,
        "max_length": config.position != "learned",
        **dict.fromkeys(("rotary_base", "rotary_scaling"), config.position != "rotary"),
        **dict.fromkeys([name for name in found if name.startswith("relative_")], config.position != "relative"),
    }
    own = config.head_dim**-0.5 if config.scale is None else config.scale  # type: ignore[operator]
    found["scale"] = own if isinstance(own, tuple) else (own,) * config.num_layers
    found["hidden_dim"] = config.hidden_dim or 4 * config.embed_dim
    found["num_kv_heads"] = config.num_kv_heads or config.num_heads
    found["bias"] = sorted({*config.bias, "norm"} if config.norm == "rms" else {*config.bias})  # an RMSNorm has none
    found["rotary_scaling"] = _scaling(config)
    return {name: value for name, value in found.items() if not unused.get(name)}


def _scaling(config: TransformerConfig) -> dict[str, Any] | None:
    """Of rotary positions, what counts."""
    if config.position != "rotary":
        return None
    assert config.head_dim is not None
    return Rope(config.head_dim, config.rotary_base, config.rotary_scaling).meaning


# --------------------------------------------------------------------------------------------------------- settings


def _gpt2(model: Any, width: str = "n_embd") -> dict[str, Any]:
    config = model.config
    return {
        width: config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.hidden_dim,
        "activation_function": _activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "n_positions": config.max_length,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "scale_attn_weights": config.scale != 1.0,
        "scale_attn_by_inverse_layer_idx": isinstance(config.scale, tuple),
    }


def _decision(model: Any) -> dict[str, Any]:
    arguments = model._arguments()
    return {
        **_gpt2(model, "hidden_size"),
        "state_dim": arguments["state_dim"] or arguments["num_states"],  # of which the family has vectors
        "act_dim": arguments["action_dim"] or arguments["num_actions"],
        "max_ep_len": arguments["max_time"],
        "action_tanh": model.bounded,
    }


def _encoder(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim or 4 * config.embed_dim,
        "hidden_act": _activation(config),
        "layer_norm_eps": config.norm_eps,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.dropout),
    }


def _labels(count: int) -> dict[str, Any]:
    names = {str(number): f"LABEL_{number}" for number in range(count)}
    return {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}


def _bert(model: Any) -> dict[str, Any]:
    arguments = model._arguments()
    return {
        **_encoder(model.config),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.config.max_length,
        "type_vocab_size": arguments["num_types"] or 1,
        **(_labels(arguments["num_classes"]) if arguments["num_classes"] else {"tie_word_embeddings": model.tied}),
    }


def _bert_family(model: Any) -> Family:
    if not model._arguments()["num_classes"]:
        return BERT
    return BERT_SEQUENCES if model.classify == "sequence" else BERT_TOKENS


def _vit(model: Any) -> dict[str, Any]:
    arguments = model._arguments()
    return {
        **_encoder(model.config),
        "image_size": [*arguments["image_size"]],
        "patch_size": [*arguments["patch_size"]],
        "num_channels": arguments["channels"],
        "qkv_bias": "q" in model.config.bias,
        **_labels(arguments["num_classes"]),
    }


def _t5(model: Any) -> dict[str, Any]:
    config, decoder = model.encoder.config, model.decoder.config
    activation = "gelu" if config.gated and config.activation == "gelu_tanh" else _activation(config)
    return {
        "d_model": config.embed_dim,
        "num_layers": config.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.hidden_dim or 4 * config.embed_dim,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied,
        "scale_decoder_outputs": model.logit_scale != 1.0,
    }


def _whisper(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "d_model": model.encoder.config.embed_dim,
        "activation_function": _activation(model.encoder.config),
        "dropout": model.encoder.config.dropout,
        "num_mel_bins": model.source.first.in_channels if isinstance(model.source, AudioEmbedding) else None,
        "vocab_size": model.vocab_size,
        "pad_token_id": None,  # what tokens mean is not known here
    }
    for side, what in (("encoder", "source"), ("decoder", "target")):
        config = getattr(model, side).config
        found |= {
            f"{side}_layers": config.num_layers,
            f"{side}_attention_heads": config.num_heads,
            f"{side}_ffn_dim": config.hidden_dim or 4 * config.embed_dim,
            f"max_{what}_positions": config.max_length,
        }
    return found | {"tie_word_embeddings": model.tied}


def _llama(model: Any) -> dict[str, Any]:
    config = model.config
    scaling = _scaling(config) or {"rope_type": "default"}
    trained = (config.rotary_scaling or {}).get("original_max_position_embeddings") or 2048
    longer = 1 if scaling["rope_type"] in ("default", "dynamic") else scaling.get("factor", 1)
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim or 4 * config.embed_dim,
        "hidden_act": _activation(config),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": int(trained * longer),
        "rope_parameters": {**scaling, "rope_theta": config.rotary_base},
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied,
    }


def _llama_with_biases(model: Any) -> dict[str, Any]:
    bias = model.config.bias
    return {**_llama(model), "attention_bias": "q" in bias, "mlp_bias": "ff" in bias}


def _gpt2_of_tokens(model: Any) -> dict[str, Any]:
    return {**_gpt2(model), "vocab_size": model.vocab_size, "tie_word_embeddings": model.tied}


def _activation(config: TransformerConfig) -> str:
    return NAMES.get(config.activation, config.activation)


class Written(NamedTuple):
    """How a class of models is written as one of a family: `settings` are those of config.json."""

    model_type: str
    model: type[Model]
    family: Callable[[Any], Family]
    settings: Callable[[Any], dict[str, Any]]


WRITTEN = (
    Written("gpt2", GPT, lambda _: GPT2, _gpt2_of_tokens),
    Written("llama", GPT, lambda _: LLAMA, _llama_with_biases),
    Written("qwen2", GPT, lambda _: QWEN2, _llama),
    Written("bert", Encoder, _bert_family, _bert),
    Written("vit", ViT, lambda _: VIT, _vit),
    Written("t5", EncoderDecoder, lambda _: T5, _t5),
    Written("whisper", EncoderDecoder, lambda _: WHISPER, _whisper),
    Written("decision_transformer", DecisionTransformer, lambda _: DECISION, _decision),
)
