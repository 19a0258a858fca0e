"""Models that go on with a text: GPT-2, Llama and its relatives, and the Decision Transformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal, Window
from attngraph.hf.family import ATTENTION, TRANSPOSED, Family, Name, of_layers, projections
from attngraph.hf.settings import Settings, WrongSetting, unlike
from attngraph.models import GPT, DecisionTransformer
from attngraph.nn import TransformerConfig

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

# -------------------------------------------------------------------------------------------- Llama and its relatives


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


def _sliding(given: Settings, config: TransformerConfig, vocabulary: int, tied: bool, width: int | None) -> nn.Module:
    """A GPT whose layers all have the same window, if they have one."""
    graph = _layer_graph("sliding_attention" if width else "full_attention", width)
    return GPT(config, given.size("vocab_size", vocabulary), graph, tied=tied)


def _mistral(given: Settings, tied: bool) -> nn.Module:
    config = _llama_config(given, (), 1e-6)
    return _sliding(given, config, 32000, tied, given.size("sliding_window", None))


def _qwen3(given: Settings, tied: bool) -> nn.Module:
    given.must("rms_norm_eps", 1e-6)  # which queries and keys have too
    given.must("attention_bias", False)
    given.asked |= {"sliding_window", "max_window_layers"}
    given.must("use_sliding_window", False)
    if kinds := [kind for kind in given("layer_types", kind=list) or () if kind != "full_attention"]:
        raise WrongSetting(f"the setting 'layer_types' must name full_attention alone (got {kinds})")
    config = replace(_llama_config(given, (), 1e-6), qk_norm=True)
    return GPT(config, given.size("vocab_size", 151936), tied=tied)


def _phi3(given: Settings, tied: bool) -> nn.Module:
    given.must("resid_pdrop", 0.0)
    config = _llama_config(given, (), 1e-5)
    return _sliding(given, config, 32064, tied, given.size("sliding_window", None))


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
MISTRAL = LLAMA._replace(architectures=("MistralForCausalLM",), build=_mistral)
QWEN3 = LLAMA._replace(
    architectures=("Qwen3ForCausalLM",),
    build=_qwen3,
    names=(
        *_LLAMA_NAMES,
        *of_layers(
            "layers.{} = transformer.layers.{}",
            Name("self_attn.q_norm", "attention.query_norm"),
            Name("self_attn.k_norm", "attention.key_norm"),
        ),
    ),
)
PHI3 = LLAMA._replace(
    architectures=("Phi3ForCausalLM",),
    build=_phi3,
    names=(
        *of_layers(
            "layers.{} = transformer.layers.{}",
            Name("self_attn.qkv_proj", ATTENTION),
            Name("mlp.gate_up_proj", ("feedforward.gate", "feedforward.up")),
        ),
        *_LLAMA_NAMES,
    ),
)
