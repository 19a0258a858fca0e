"""Bad input is told in a sentence that names it, by every public function (see wrong_arguments.py)."""

import pytest
import torch
from wrong_arguments import WRONG, Door, faults

import attngraph
from attngraph import Causal, attend, generate, plan
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import Attention, FeedForward, Transformer, TransformerConfig

q, k, v = torch.randn(3, 1, 2, 6, 4).unbind(0)
x = torch.randn(2, 6, 8)
tokens = torch.randint(11, (2, 6))
CONFIG = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "position": "rotary"}
config = TransformerConfig(**CONFIG)
gpt, encoder = GPT(config, 11), Encoder(config, 11)
translator = EncoderDecoder(config, TransformerConfig(**CONFIG, cross=True), 11)
vit = ViT(config, 3, image_size=4, patch_size=2, channels=1)
decision = DecisionTransformer(config, state_dim=3, action_dim=2, max_time=9)
transformer, attention = Transformer(config, Causal()), Attention(8, 2)

DOORS = [
    Door("attend", attend, {
        "q": q, "k": k, "v": v, "graph": Causal(), "bias": None, "attention_mask": None, "scale": 0.5, "dropout_p": 0.0,
        "score": "dot", "normalize": "softmax", "backend": "auto", "return_lse": False, "return_weights": False,
    }, {"normalize": "normalize|return_lse"}, ("score", "normalize")),
    Door("plan", plan, {
        "graph": Causal(), "n": 6, "m": 6, "heads": 2, "head_dim": 4, "dtype": torch.float32, "device": "cpu",
        "backend": "auto", "bias": None, "padding": False, "dropout": False, "score": "dot", "normalize": "softmax",
        "return_weights": False, "reorder": None, "costs": None,
    }),
    Door("Alibi", attngraph.Alibi, {"slopes": torch.ones(2)}),
    Door("Alibi.geometric", attngraph.Alibi.geometric, {"num_heads": 2}),
    Door("RelativeBias", attngraph.RelativeBias, {
        "table": torch.zeros(2, 8), "max_distance": 16, "bidirectional": True,
    }, {"table": "table|buckets|RelativeBias"}),
    Door("EdgeBias", attngraph.EdgeBias, {"values": torch.zeros(3)}, {"values": "values|EdgeBias"}),
    Door("Additive", attngraph.Additive, {"weight": torch.zeros(4), "activation": torch.tanh}),
    Door("generate", generate, {
        "model": gpt, "tokens": tokens, "max_new_tokens": 2, "attention_mask": None, "context": None,
        "temperature": 1.0, "top_k": None, "top_p": None, "generator": None,
    }),
    Door("TransformerConfig", TransformerConfig, {
        **CONFIG, "num_kv_heads": None, "head_dim": None, "hidden_dim": None, "activation": "gelu", "gated": False,
        "norm": "layer", "norm_eps": 1e-5, "norm_order": "pre", "embed_norm": False, "final_norm": True, "bias": ("q",),
        "qk_norm": False, "scale": None, "score": "dot", "max_length": None, "rotary_base": 10000.0,
        "rotary_scaling": None, "relative_buckets": 32, "relative_max_distance": 128, "relative_bidirectional": True,
        "cross": False, "dropout": 0.0, "init": "gpt2",
    }),
    Door("Transformer", Transformer, {"config": config, "graph": Causal()}),
    Door("Transformer.forward", transformer, {
        "x": x, "graph": None, "positions": None, "attention_mask": None, "memory": None, "memory_graph": None,
        "memory_attention_mask": None,
    }),
    Door("Attention", Attention, {
        "embed_dim": 8, "num_heads": 2, "num_kv_heads": None, "head_dim": None, "memory_dim": None, "bias": ("q",),
        "qk_norm": False, "scale": None, "score": "dot", "dropout": 0.0,
    }),
    Door("Attention.forward", attention, {
        "x": x, "graph": Causal(), "memory": None, "bias": None, "attention_mask": None, "rotary": None,
    }),
    Door("FeedForward", FeedForward, {
        "embed_dim": 8, "hidden_dim": 16, "activation": "gelu", "gated": False, "bias": True, "dropout": 0.0,
    }),
    Door("GPT", GPT, {"config": config, "vocab_size": 11, "graph": Causal(), "tied": True}, {
        "vocab_size": "vocab_size|tokens",
    }),
    Door("GPT.forward", gpt, {"tokens": tokens, "graph": None, "positions": None, "attention_mask": None}),
    Door("Encoder", Encoder, {"config": config, "vocab_size": 11, "graph": Causal(), "num_types": 2, "tied": True}, {
        "vocab_size": "vocab_size|tokens", "num_types": "num_types|types",
    }),
    Door("Encoder.forward", encoder, {
        "tokens": tokens, "graph": None, "positions": None, "attention_mask": None, "types": None,
    }),
    Door("EncoderDecoder.forward", translator, {
        "source": tokens, "target": tokens, "attention_mask": None, "decoder_attention_mask": None,
    }, {"source": "tokens", "target": "tokens"}),
    Door("ViT", ViT, {
        "config": config, "num_classes": 3, "image_size": 4, "patch_size": 2, "channels": 1, "graph": Causal(),
        "pool": "mean",
    }, {"image_size": "image_size|height|width", "patch_size": "patch_size|patch_height|patch_width"}),
    Door("ViT.forward", vit, {"images": torch.randn(2, 1, 4, 4), "graph": None, "attention_mask": None}),
    Door("DecisionTransformer", DecisionTransformer, {
        "config": config, "state_dim": 3, "action_dim": 2, "max_time": 9, "graph": Causal(), "bounded": True,
    }, {"max_time": "max_time|timesteps"}),
    Door("DecisionTransformer.forward", decision, {
        "states": torch.randn(2, 5, 3), "actions": torch.randn(2, 5, 2), "returns": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5), "attention_mask": None,
    }),
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_a_wrong_argument_is_named(door):
    door.function(**door.arguments)
    found = [str(tuple(fault)) for fault in faults(door)]
    assert not found, "\n".join([f"{len(found)} of {len(door.arguments) * len(WRONG)}", *found])
