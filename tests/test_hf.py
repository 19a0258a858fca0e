"""attngraph.hf: other people's models, the same logits; what is unknown, missing or left over is told by name."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attngraph import Causal, Full, Neighborhood, Prefix, Window, from_function, hf
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import AudioEmbedding, TransformerConfig

transformers = pytest.importorskip("transformers")

SMALL = {"initializer_range": 0.4}  # large weights: what is small would hide mistakes
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 37, "n_positions": 19, **SMALL}
BERT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50, "vocab_size": 37,
    "max_position_embeddings": 19, **SMALL,
}  # fmt: skip
VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50, "image_size": 12,
    "patch_size": 4, "num_labels": 5, **SMALL,
}  # fmt: skip
T5 = {
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 3,
    "d_kv": 7,
    "d_ff": 50,
    "vocab_size": 37,
    "initializer_factor": 3.0,
}
WHISPER = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 50, "decoder_ffn_dim": 44, "vocab_size": 37, "num_mel_bins": 8, "max_source_positions": 11,
    "max_target_positions": 13, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "init_std": 0.3,
}  # fmt: skip
LLAMA = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10,
    "intermediate_size": 50, "vocab_size": 37, "max_position_embeddings": 8, **SMALL,
}  # fmt: skip
QWEN2 = {**LLAMA, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
del QWEN2["head_dim"]
PHI3 = {
    **LLAMA,
    "hidden_size": 30,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
}
del PHI3["head_dim"]
DISTILBERT = {
    "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 50, "vocab_size": 37, "max_position_embeddings": 19, **SMALL,
}  # fmt: skip
BART = {
    **{key: size for key, size in WHISPER.items() if "max" not in key and key != "num_mel_bins"},
    "max_position_embeddings": 19, "decoder_start_token_id": 2,
}  # fmt: skip
DT = {"hidden_size": 24, "n_layer": 2, "n_head": 3, "state_dim": 5, "act_dim": 2, "max_ep_len": 30, **SMALL}
ROPE = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 8, "short_factor": [1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0],
    },
}  # fmt: skip
FAMILIES = {
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config", GPT2,
        [
            {},
            {"tie_word_embeddings": False, "n_inner": 31, "activation_function": "relu"},
            {"scale_attn_by_inverse_layer_idx": True, "n_head": 4, "layer_norm_epsilon": 1e-3},
            {"scale_attn_weights": False, "n_layer": 3, "activation_function": "gelu"},
        ],
    ),
    "bert": (
        "BertForMaskedLM", "BertConfig", BERT,
        [{}, {"tie_word_embeddings": False, "hidden_act": "relu"}, {"type_vocab_size": 1, "num_attention_heads": 2}],
    ),
    "bert_sequences": (
        "BertForSequenceClassification", "BertConfig", BERT,
        [{"num_labels": 3}, {"num_labels": 1, "type_vocab_size": 1, "hidden_act": "relu"}],
    ),
    "bert_tokens": (
        "BertForTokenClassification", "BertConfig", BERT, [{}, {"num_labels": 5, "num_attention_heads": 2}],
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", VIT,
        [{}, {"qkv_bias": False, "num_channels": 1}, {"image_size": [8, 20], "patch_size": 2, "hidden_act": "relu"}],
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config", T5,
        [
            {},
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
            {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 8, "d_kv": 8},
        ],
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        [{}, {"tie_word_embeddings": False}, {"encoder_layers": 1, "decoder_attention_heads": 4, "num_mel_bins": 5}],
    ),
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", LLAMA,
        [
            {}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 3},
            *({"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}} for kind, more in ROPE.items()),
        ],
    ),
    "qwen2": (
        "Qwen2ForCausalLM", "Qwen2Config", QWEN2,
        [
            {}, {"tie_word_embeddings": True},
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3},
        ],
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, [{"sliding_window": 4}, {"sliding_window": None}]),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA, [{}, {"tie_word_embeddings": True}]),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", PHI3, [{}, {"sliding_window": 4, "num_key_value_heads": 3}]),
    "roberta": (
        "RobertaForMaskedLM", "RobertaConfig", {**BERT, "max_position_embeddings": 21, "pad_token_id": 1},
        [{}, {"tie_word_embeddings": False, "type_vocab_size": 1}],
    ),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT,
        [{}, {"tie_word_embeddings": False, "activation": "relu", "sinusoidal_pos_embds": True}],
    ),
    "bart": (
        "BartForConditionalGeneration", "BartConfig", BART,
        [{}, {"decoder_layers": 1, "activation_function": "relu", "encoder_attention_heads": 4}],
    ),
    "decision_transformer": (
        "DecisionTransformerModel", "DecisionTransformerConfig", DT,
        [{}, {"action_tanh": False, "n_head": 4}, {"activation_function": "gelu_new", "n_inner": 31, "act_dim": 1}],
    ),
}  # fmt: skip
CASES = [(family, number) for family, (*_, several) in FAMILIES.items() for number in range(len(several))]


class InFloat64(TorchFunctionMode):
    """What transformers computes in float32 whatever the model's dtype (norms, softmax, rotary angles), in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [torch.float64 if each is torch.float32 else each for each in args]
        kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in (kwargs or {}).items()}
        return args[0].double() if function is Tensor.float else function(*args, **kwargs)


def theirs(family, number, path):
    """Their model, saved to disk."""
    model, config, base, several = FAMILIES[family]
    torch.manual_seed(number)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**base, **several[number]}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:  # biases and gains that are not all 0 or 1
                parameter += 0.3 * torch.randn_like(parameter) * ("embed_positions" not in name)
    made.save_pretrained(path)
    return getattr(transformers, model).from_pretrained(path, attn_implementation="eager").eval()


def both(family, model, reference, dtype, padded):
    """Our logits and theirs, and where both count."""
    model, reference = copy.deepcopy(model).to(dtype), copy.deepcopy(reference).to(dtype)

    def peer(**inputs):
        with InFloat64() if dtype == torch.float64 else nullcontext():
            return reference(**inputs)

    chance = torch.Generator().manual_seed(7)
    tokens, others = (torch.randint(37, (3, length), generator=chance) for length in (11, 6))
    real = torch.ones(3, 11, dtype=torch.bool)
    if padded:
        real[1, 7:], real[2, :4] = False, False  # on either side
    mask = real.long() if padded else None
    ours = {"attention_mask": mask}
    if family == "vit":
        height, width = model.patches.image_size
        images = torch.randn(3, model.patches.channels, height, width, generator=chance).to(dtype)
        return model(images), peer(pixel_values=images).logits, slice(None)
    if family == "whisper":
        sounds = torch.randn(3, reference.config.num_mel_bins, 22, generator=chance).to(dtype)
        ours = {"decoder_attention_mask": real[:, :6] if padded else None}
        found = peer(
            input_features=sounds, decoder_input_ids=others,
            decoder_attention_mask=None if mask is None else mask[:, :6],
            decoder_position_ids=(real[:, :6].cumsum(-1) - 1).clamp(min=0) if padded else None,
        )  # fmt: skip
        return model(sounds, others, **ours), found.logits, real[:, :6]
    if family == "t5":
        found = peer(input_ids=tokens, attention_mask=mask, decoder_input_ids=others)
        return model(tokens, others, **ours), found.logits, slice(None)
    if family == "bart":
        right = peer(input_ids=tokens, decoder_input_ids=others).logits
        if padded:
            rows = [(tokens[row, some][None], others[row][None]) for row, some in enumerate(real)]
            right = torch.cat([peer(input_ids=some, decoder_input_ids=other).logits for some, other in rows])
        return model(tokens, others, **ours), right, slice(None)
    if family == "roberta":
        tokens[tokens == 1] = 2  # its padding
    if family == "decision_transformer":
        states, actions, returns = (
            torch.randn(3, 11, width, generator=chance).to(dtype) for width in (5, reference.config.act_dim, 1)
        )
        times = torch.randint(30, (3, 11), generator=chance)
        found = peer(
            states=states, actions=actions, returns_to_go=returns, timesteps=times, attention_mask=mask
        ).action_preds
        return model(states, actions, returns, times, **ours), found, real
    right = peer(input_ids=tokens).logits
    if padded:  # each row as if it were alone
        for row, some in enumerate(real):
            found = peer(input_ids=tokens[row, some][None]).logits[0]
            right[row, some if right.ndim == 3 else slice(None)] = found
    return model(tokens, **ours), right, real if right.ndim == 3 else slice(None)


def assert_same_logits(family, model, reference, padded=False):
    """In float64 up to its rounding; in float32 up to what float32 does to the reference itself."""
    ours, right, count = both(family, model, reference, torch.float64, padded)
    assert ours.shape == right.shape
    scale = right[count].abs().max()
    rope = getattr(reference.config, "rope_parameters", None) or {}
    by_length = rope.get("rope_type") in ("dynamic", "longrope")  # frequencies are computed in the call, in float32
    assert (ours - right)[count].abs().max() <= (1e-6 if by_length else 1e-12) * scale
    ours32, right32, _ = both(family, model, reference, torch.float32, padded)
    rounding = (right32 - right)[count].abs().max()
    assert (ours32 - right32)[count].abs().max() <= 4 * rounding + 1e-6 * scale


@pytest.mark.share(3)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("family", "number"), CASES)
@torch.no_grad()
def test_the_logits_are_theirs(family, number, padded, tmp_path):
    reference = theirs(family, number, tmp_path)
    assert_same_logits(family, hf.load(tmp_path), reference, padded)


@pytest.mark.parametrize(("family", "number"), [(family, number) for family, number in CASES if number < 2])
@torch.no_grad()
def test_what_is_saved_is_loaded_by_both(family, number, tmp_path):
    reference = theirs(family, number, tmp_path / "theirs")
    model = hf.load(tmp_path / "theirs")
    for parameter in model.parameters():
        parameter.mul_(1.01)
    wanted = both(family, model, reference, torch.float32, False)[0]
    hf.save(model, tmp_path / "ours")
    assert torch.equal(both(family, hf.load(tmp_path / "ours"), reference, torch.float32, False)[0], wanted)
    again = type(reference).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert_same_logits(family, model, again)
    hf.save(model, tmp_path / "theirs")  # over the file that its weights are read from
    assert torch.equal(both(family, hf.load(tmp_path / "theirs"), reference, torch.float32, False)[0], wanted)


@torch.no_grad()
def test_shards_are_one_model(tmp_path):
    reference = theirs("llama", 0, tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    whole, shards = (
        both("llama", hf.load(tmp_path / name), reference, torch.float32, True)[0] for name in ("whole", "shards")
    )
    assert torch.equal(whole, shards)


def test_a_changed_graph_is_saved_or_an_error(tmp_path):
    theirs("gpt2", 0, tmp_path / "gpt2"), theirs("vit", 0, tmp_path / "vit")
    gpt2, vit = hf.load(tmp_path / "gpt2"), hf.load(tmp_path / "vit")
    assert gpt2.transformer.graphs == (Causal(), Causal())
    assert vit.transformer.graphs == (Full(), Full())
    tokens, images = torch.randint(37, (1, 15)), torch.randn(1, 3, 12, 12)
    before = gpt2(tokens), vit(images)
    gpt2.transformer.graphs = [Causal() & (Window(3, 0) | Prefix(2)), Causal()]
    vit.transformer.graphs = Neighborhood((3, 3), 1).with_global_nodes(1)
    after = gpt2(tokens), vit(images)
    assert torch.allclose(before[0][:, :4], after[0][:, :4], atol=1e-5)
    assert not torch.allclose(before[0][:, -1], after[0][:, -1], atol=1e-3)
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    for model, given, name in ((gpt2, tokens, "gpt2"), (vit, images, "vit")):
        hf.save(model, tmp_path / name)
        again = hf.load(tmp_path / name)
        assert again.transformer.graphs == model.transformer.graphs
        assert torch.equal(again(given), model(given))
    gpt2.transformer.graphs = from_function(lambda i, j: j <= i)
    with pytest.raises(ValueError, match="from_function"):
        hf.save(gpt2, tmp_path / "never")
    assert not (tmp_path / "never").exists()


SIZES = {"embed_dim": 24, "num_layers": 2, "num_heads": 3}
LLAMA_SWITCHES = {
    "activation": "silu", "gated": True, "norm": "rms", "norm_eps": 1e-6, "bias": (), "position": "rotary",
    "num_kv_heads": 1,
}  # fmt: skip
GPT2_SWITCHES = {"activation": "gelu_tanh", "position": "learned", "max_length": 19, "dropout": 0.1}
BERT_SWITCHES = {"norm_order": "post", "embed_norm": True, "final_norm": False, "position": "learned", "max_length": 19}
T5_SWITCHES = {
    "norm": "rms",
    "bias": (),
    "scale": 1.0,
    "position": "relative",
    "activation": "gelu_tanh",
    "gated": True,
}
WHISPER_SWITCHES = {"bias": ("q", "v", "o", "ff", "norm"), "position": "learned", "max_length": 13}


def switches(**others):
    return TransformerConfig(**{**SIZES, **others})


def made_here():
    """Models of the library, by the family that carries them: what `family=` is, and the case of `both`."""
    yaml = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    yield "gpt2", "gpt2", GPT(switches(**GPT2_SWITCHES), 37)
    yield "gpt2", "gpt2", GPT(switches(**GPT2_SWITCHES, scale=1.0, hidden_dim=31), 37, tied=False)
    yield "llama", "llama", GPT(switches(**LLAMA_SWITCHES), 37, tied=False)
    yield "llama", "llama", GPT(switches(**LLAMA_SWITCHES, head_dim=10, rotary_base=500.0, rotary_scaling=yaml), 37)
    linear = {"type": "linear", "factor": 2, "original_max_position_embeddings": None}
    yield "llama", "llama", GPT(switches(**LLAMA_SWITCHES, rotary_scaling=linear), 37)
    plain = {"rope_type": "default", "factor": 3.0}
    yield "llama", "llama", GPT(switches(**LLAMA_SWITCHES, rotary_scaling=plain), 37)
    yarn = {**yaml, "beta_fast": 32.0, "mscale": None, "truncate": False}
    yield "llama", "llama", GPT(switches(**LLAMA_SWITCHES, rotary_scaling=yarn), 37)
    yield "qwen2", "qwen2", GPT(switches(**{**LLAMA_SWITCHES, "bias": ("q", "k", "v")}), 37)
    yield "bert", "bert", Encoder(switches(**BERT_SWITCHES), 37, num_types=2)
    yield "bert", "bert_sequences", Encoder(switches(**BERT_SWITCHES), 37, num_types=2, num_classes=3)
    yield "bert", "bert_tokens", Encoder(switches(**BERT_SWITCHES), 37, num_types=1, num_classes=3, classify="tokens")
    yield "vit", "vit", ViT(switches(position="learned", max_length=7), 5, image_size=(4, 6), patch_size=2)
    encoder = switches(**T5_SWITCHES)
    decoder = switches(**T5_SWITCHES, cross=True, relative_bidirectional=False)
    yield "t5", "t5", EncoderDecoder(encoder, decoder, 37, logit_scale=24**-0.5)
    yield "t5", "t5", EncoderDecoder(
        switches(**{**T5_SWITCHES, "gated": False, "activation": "relu"}),
        switches(**{**T5_SWITCHES, "gated": False, "activation": "relu"}, cross=True, relative_bidirectional=False),
        37, tied=False,
    )  # fmt: skip
    whisper = switches(**{**WHISPER_SWITCHES, "max_length": 11}), switches(**WHISPER_SWITCHES, cross=True)
    yield "whisper", "whisper", EncoderDecoder(*whisper, 37, source=AudioEmbedding(8, 24))
    decision = switches(position="learned", max_length=40, activation="relu")
    yield (
        "decision_transformer",
        "decision_transformer",
        DecisionTransformer(decision, state_dim=5, action_dim=2, max_time=30),
    )


MADE_HERE = [pytest.param(*each, id=f"{each[1]}-{number}") for number, each in enumerate(made_here())]


@pytest.mark.parametrize(("family", "case", "model"), MADE_HERE)
@torch.no_grad()
def test_a_model_made_here_is_one_of_a_family(family, case, model, tmp_path):
    """The same numbers here and in transformers, and the family is found by itself."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    hf.save(model.eval(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    again = hf.load(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    theirs = getattr(transformers, FAMILIES[case][0])
    assert_same_logits(case, model, theirs.from_pretrained(tmp_path, attn_implementation="eager").eval())
    hf.save(model, tmp_path, family=family)


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        (GPT(switches(**LLAMA_SWITCHES, qk_norm=True), 37), "llama", "llama has qk_norm=False, not True"),
        (GPT(switches(**GPT2_SWITCHES, norm="rms"), 37), "gpt2", "gpt2 has norm='layer', not 'rms'"),
        (GPT(switches(**GPT2_SWITCHES, score="additive"), 37), None, "score='dot', not 'additive'"),
        (GPT(switches(**GPT2_SWITCHES, normalize="relu"), 37), None, "normalize='softmax', not 'relu'"),
        (GPT(switches(**{**GPT2_SWITCHES, "activation": "squared_relu"}), 37), "gpt2", "(got 'squared_relu')"),
        (GPT(switches(**LLAMA_SWITCHES, dropout=0.1), 37), "llama", "llama has dropout=0.0, not 0.1"),
        (GPT(switches(position="alibi"), 37), None, "gpt2 has position='learned', not 'alibi'"),
        (Encoder(switches(**BERT_SWITCHES), 37), None, "bert has num_types=1, not 0"),
        (GPT(switches(**GPT2_SWITCHES), 37), "bert", "family must be one of those that a GPT can have, gpt2, llama"),
        (
            ViT(switches(position="none"), 5, image_size=4, patch_size=2, pool="mean"),
            None,
            "pool='cls', not 'mean'",
        ),
        (
            DecisionTransformer(
                switches(position="learned", max_length=40, activation="relu"),
                num_states=5,
                action_dim=2,
                max_time=30,
            ),
            None,
            "state_dim=5, not None",
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_what_no_family_has_is_named(model, family, message, tmp_path):
    with pytest.raises(ValueError) as error:
        hf.save(model, tmp_path / "new", family=family)
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_changed_model_made_here_is_an_error(tmp_path):
    model = GPT(switches(**GPT2_SWITCHES), 37, tied=False)
    model.head = torch.nn.Linear(24, 3, bias=False)
    with pytest.raises(ValueError, match=r"not those that its config makes, .*head.weight of shape \(3, 24\)"):
        hf.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_graph_of_the_memory_is_kept(tmp_path):
    theirs("t5", 0, tmp_path)
    model = hf.load(tmp_path)
    model.memory_graph = Window(2, 2)
    hf.save(model.double(), tmp_path)
    assert hf.load(tmp_path).memory_graph == Window(2, 2)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"
    model.head = torch.nn.Linear(24, 3)
    with pytest.raises(ValueError, match=r"not those that load made: head.bias"):
        hf.save(model, tmp_path)


@pytest.mark.parametrize("rope", [{"bogus": 1}, {"full_attention": {"rope_type": "default"}}])
def test_unknown_rotary_settings_are_named(tmp_path, rope):
    theirs("llama", 0, tmp_path)
    changed(tmp_path, rope_parameters={"rope_type": "default", **rope})
    with pytest.raises(ValueError, match=f"unknown settings in .*: {next(iter(rope))}"):
        hf.load(tmp_path)


def test_a_loaded_model_can_be_pickled(tmp_path):
    theirs("llama", 3, tmp_path)
    model, tokens = hf.load(tmp_path), torch.randint(37, (1, 5))
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens), model(tokens))


@torch.no_grad()
def test_names_of_older_files_are_known(tmp_path):
    """Buffers, gains called gamma, tensors of other heads, and no prefix."""
    reference = theirs("gpt2", 0, tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 19, 19), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "gpt2" / "model.safetensors")
    model = hf.load(tmp_path / "gpt2")
    assert model.head.weight is model.embedding.weight
    assert_same_logits("gpt2", model, reference)

    reference = theirs("bert", 0, tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    tensors |= {"bert.pooler.dense.weight": torch.ones(24, 24), "cls.seq_relationship.bias": torch.ones(2)}
    tensors |= {"bert.embeddings.position_ids": torch.arange(19)[None]}
    save_file(tensors, tmp_path / "bert" / "model.safetensors")
    assert_same_logits("bert", hf.load(tmp_path / "bert"), reference)


@torch.no_grad()
def test_a_head_that_differs_is_not_tied(tmp_path):
    theirs("t5", 1, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(37, 24)
    save_file(tensors, tmp_path / "model.safetensors")
    model = hf.load(tmp_path)
    assert torch.equal(model.head.weight, tensors["lm_head.weight"])
    assert model.logit_scale == 1.0
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert_same_logits("t5", model, reference)


@pytest.fixture
def gpt2(tmp_path):
    theirs("gpt2", 0, tmp_path)
    return tmp_path


def changed(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: changed(at, flux_capacitor=3), "unknown settings: flux_capacitor"),
        (lambda at: changed(at, model_type="gpt5"), "model_type must be one of gpt2, bert"),
        (lambda at: changed(at, architectures=["GPT2ForSequenceClassification"]), "must be a list of GPT2LMHeadModel"),
        (lambda at: changed(at, activation_function="mish"), "'activation_function' must be one of gelu"),
        (lambda at: changed(at, add_cross_attention=True), "'add_cross_attention' must be False"),
        (lambda at: changed(at, n_embd=25), "must be a multiple of num_heads"),
        (lambda at: changed(at, n_positions=20), "transformer.wpe.weight must have the shape (20, 24)"),
        (lambda at: rewritten(at, lambda t: t.pop("transformer.ln_f.bias")), "missing tensors: transformer.ln_f.bias"),
        (lambda at: rewritten(at, lambda t: t.update(extra=torch.ones(1))), "left-over tensors: extra"),
        (lambda at: (at / "model.safetensors").write_bytes(b"no tensors"), "model.safetensors can't be read"),
        (lambda at: (at / "config.json").write_text("{"), "must be JSON"),
        (lambda at: changed(at, n_embd="24"), "'n_embd' must be a whole number from 1 to 2147483647 (got '24')"),
        (lambda at: changed(at, n_head=0), "'n_head' must be a whole number from 1"),
        (lambda at: changed(at, attngraph={"transformr": "Causal()"}), "must give graphs to transformer (got"),
        (lambda at: rewritten(at, lambda t: t.update({"wte.weight": torch.ones(1)})), "two tensors of one name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(gpt2, spoil, message):
    spoil(gpt2)
    with pytest.raises(ValueError) as error:
        hf.load(gpt2)
    assert message in str(error.value)


def test_files_that_are_not_there_are_named(gpt2, tmp_path):
    with pytest.raises(FileNotFoundError, match="local directory"):
        hf.load("openai/gpt2")
    os.rename(gpt2 / "model.safetensors", gpt2 / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors.*pytorch_model.bin is of another format"):
        hf.load(gpt2)
    os.remove(gpt2 / "config.json")
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        hf.load(gpt2)
    os.rename(gpt2 / "pytorch_model.bin", gpt2 / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"attngraph saved is read by its class, as attngraph.models.GPT.load"):
        hf.load(gpt2)
    with pytest.raises(TypeError, match=r"model must be one of attngraph.models \(got a Identity\)"):
        hf.save(torch.nn.Identity(), tmp_path / "new")


def test_a_loaded_model_is_trained_as_any_other(gpt2):
    model = hf.load(gpt2)
    before = (gpt2 / "model.safetensors").read_bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.randint(37, (4, 12))
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert (gpt2 / "model.safetensors").read_bytes() == before


def test_precision_is_kept_or_chosen(gpt2):
    rewritten(gpt2, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    assert hf.load(gpt2).embedding.weight.dtype == torch.float16
    assert hf.load(gpt2, dtype=torch.float64).embedding.weight.dtype == torch.float64


WEIGHT = """
import sys, time
import attngraph.models, safetensors
from attngraph import hf
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
open("/proc/self/clear_refs", "w").write("5")
before, start = resident("VmHWM"), time.perf_counter()
model = hf.load(sys.argv[1])
sums = [float(parameter.detach().sum()) for parameter in model.parameters()]  # all of it is read
seconds = time.perf_counter() - start
size = sum(parameter.nbytes for parameter in model.parameters())
assert "transformers" not in sys.modules
print(seconds, (resident("VmHWM") - before) / size, size)
"""


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_gpt2_small_loads_fast_and_in_its_own_size(tmp_path):
    """124M parameters: at most 3 s, and 1.2 times its size."""
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", WEIGHT, str(tmp_path)], capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path)
    seconds, share, size = map(float, done.stdout.split())
    assert size == 124_439_808 * 4
    assert seconds <= 3
    assert share <= 1.2


# ----------------------------------------------------------------------------------------------------------- damages

REMOVED = object()
WRONG = [
    REMOVED, None, True, False, 0, -1, 1, 3, 2.5, 1e30, float("nan"), float("inf"), "x", "", [], [1], [[2]], ["x"], {},
    {"a": 1}, 10**6, 2**31 - 1, 10**30,
]  # fmt: skip


def damaged(settings):
    """Every setting removed, or something else in its place; also those in mappings: (its name, the settings)."""
    for name, value in settings.items():
        for wrong in WRONG:
            changed = {**settings, name: wrong}
            if wrong is REMOVED:
                del changed[name]
            yield name, changed
        if isinstance(value, dict) and name not in ("id2label", "label2id"):
            yield from ((inner, {**settings, name: changed}) for inner, changed in damaged(value))


def names_it(name, message):
    """An error names the setting; of the number of labels, the one that counts them."""
    return name in message or (name == "id2label" and "num_labels" in message)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [19, pytest.param(1, marks=pytest.mark.nightly)], ids=["some", "all"])
@torch.no_grad()
def test_a_damaged_config_works_or_is_told_by_name(family, share, tmp_path):
    """At once, too: a million layers are not made before the file is found to have two."""
    rope = next((number for number, more in enumerate(FAMILIES[family][3]) if "rope_parameters" in more), 0)
    for number in {0, rope}:
        theirs(family, number, tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        graphs = ("encoder", "decoder") if family in ("t5", "bart", "whisper") else ("transformer",)
        settings["attngraph"] = dict.fromkeys(graphs, "Full(), Full()")
        for count, (name, changed) in enumerate(damaged(settings)):
            if count % share != number % share:
                continue
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                model = hf.load(tmp_path)
            except ValueError as error:
                model, told = None, str(error)
            if model is None:
                assert names_it(name, told), (name, told)
            elif family in ("gpt2", "bert", "llama", "qwen2"):
                model(torch.randint(37, (1, 7)))
