"""What a config.json says: each setting of its kind, or an error that names it; and which of them change no logit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


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
