"""Bad input is told in a sentence that names it, by every public function (see wrong_arguments.py)."""

from functools import partial
from tempfile import TemporaryDirectory

import networkx
import pytest
import scipy.sparse
import torch
from matplotlib.figure import Figure
from torch_geometric.explain import Explanation
from transformers import LlamaConfig, LlamaForCausalLM
from wrong_arguments import WRONG, Door, faults

import attngraph
import attngraph.distributed
import attngraph.hf
import attngraph.pyg
from attngraph import (
    Causal,
    Full,
    KVCache,
    Window,
    analysis,
    attend,
    comparison,
    generate,
    plan,
    speculate,
    stream,
    unmask,
)
from attngraph.generation import DraftModel, PromptLookup
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import (
    Attention,
    FeedForward,
    LogMelSpectrogram,
    Transformer,
    TransformerConfig,
    pool,
    random_walk_positions,
)

q, k, v = torch.randn(3, 1, 2, 6, 4).unbind(0)
x = torch.randn(2, 6, 8)
tokens = torch.randint(11, (2, 6))
CONFIG = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "position": "rotary"}
config = TransformerConfig(**CONFIG)
gpt, encoder = GPT(config, 11), Encoder(config, 11)
masked = GPT(config, 11, Full())
translator = EncoderDecoder(config, TransformerConfig(**CONFIG, cross=True), 11)
vit = ViT(config, 3, image_size=4, patch_size=2, channels=1)
decision = DecisionTransformer(config, state_dim=3, action_dim=2, max_time=9)
choosing = DecisionTransformer(config, num_states=3, num_actions=2, max_time=9)
transformer, attention = Transformer(config, Causal()), Attention(8, 2)

KEPT = TemporaryDirectory()
gpt.save(KEPT.name)
GRAPH = Causal() & Window(2, 0)
ALSO = {"graphs": "takes a list of at least one graph", "size": "size|num_queries"}


def recorded(**arguments):
    """What is recorded, and drawn."""
    with attngraph.record(**arguments) as found:
        gpt(tokens)
    return found


RECORDED = recorded(model=gpt)[0]


LLAMA = LlamaForCausalLM(
    LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
)
DOORS = [
    Door("attend", attend, {
        "q": q, "k": k, "v": v, "graph": Causal(), "bias": None, "attention_mask": None, "scale": 0.5, "dropout_p": 0.0,
        "generator": None, "score": "dot", "normalize": "softmax", "sinks": None, "reduce": None, "edge_features": None,
        "backend": "auto",
        "return_lse": False, "return_weights": False,
    }, {"normalize": "normalize|return_lse"}, ("score", "normalize")),
    Door("plan", plan, {
        "graph": Causal(), "n": 6, "m": 6, "heads": 2, "head_dim": 4, "dtype": torch.float32, "device": "cpu",
        "backend": "auto", "bias": None, "padding": False, "dropout": False, "score": "dot", "normalize": "softmax",
        "return_weights": False, "edge_features": 0, "reorder": None, "costs": None,
    }),
    Door("Plan.explain", plan(Causal(), 6).explain, {
        "dropout_p": 0.1, "score": "dot", "normalize": "softmax", "padding": False, "return_weights": False,
    }, {}, ("score", "normalize")),
    Door("compare", attngraph.compare, {
        "graph": Causal(), "n": 6, "m": 6, "batch": 1, "heads": 2, "head_dim": 4, "dtype": torch.float32,
        "device": "cpu", "repeats": 2, "limit": 1e-9,
    }),
    Door("Alibi", attngraph.Alibi, {"slopes": torch.ones(2)}),
    Door("Alibi.geometric", attngraph.Alibi.geometric, {"num_heads": 2}),
    Door("RelativeBias", attngraph.RelativeBias, {
        "table": torch.zeros(2, 8), "max_distance": 16, "bidirectional": True,
    }, {"table": "table|buckets|RelativeBias"}),
    Door("EdgeBias", attngraph.EdgeBias.of, {
        "edges": torch.tensor([[0, 1, 2], [1, 2, 2]]), "values": torch.zeros(3), "self_loops": None, "fill": 0.0,
    }, {"edges": "edges|edge_index", "values": "values|EdgeBias"}),
    Door("EdgeBias.sorted", attngraph.EdgeBias.sorted, {"values": torch.zeros(3)}),
    Door("EdgeFeatures", attngraph.EdgeFeatures.of, {
        "edges": torch.tensor([[0, 1, 2], [1, 2, 2]]), "values": torch.zeros(3, 2), "to_key": torch.zeros(2, 4, 2),
        "to_value": torch.zeros(2, 4, 2),
    }, {"edges": "edges|edge_index"}),
    Door("EdgeFeatures.sorted", attngraph.EdgeFeatures.sorted, {
        "values": torch.zeros(3, 2), "to_key": torch.zeros(2, 4, 2), "to_value": None,
    }),
    Door("Additive", attngraph.Additive, {"weight": torch.zeros(4), "activation": torch.tanh}),
    Door("SoftCap", attngraph.SoftCap, {"cap": 30.0, "of": "dot"}, {}, ("of",)),
    Door("LeakyReLU", attngraph.LeakyReLU, {"negative_slope": 0.2, "of": "dot"}, {}, ("of",)),
    Door("Temperature", attngraph.Temperature, {"value": torch.ones(2), "of": "dot"}, {}, ("of",)),
    Door("generate", generate, {
        "model": gpt, "tokens": tokens, "max_new_tokens": 2, "attention_mask": None, "context": None,
        "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None, "stop": None,
        "num_beams": 1, "length_penalty": 1.0, "num_return_sequences": 1, "generator": None, "use_cache": True,
        "source": None, "source_attention_mask": None, "return_scores": False,
    }),
    Door("generate from a source", generate, {
        "model": translator, "tokens": tokens, "max_new_tokens": 2, "source": tokens, "source_attention_mask": None,
        "num_beams": 2,
    }, {"source": "source|tokens", "source_attention_mask": "attention_mask"}),
    Door("stream", stream, {
        "model": gpt, "tokens": tokens, "max_new_tokens": 2, "attention_mask": None, "context": None,
        "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None, "stop": None,
        "generator": None, "use_cache": True, "source": None, "source_attention_mask": None, "return_scores": False,
    }),
    Door("speculate", speculate, {
        "model": gpt, "tokens": tokens[:1], "max_new_tokens": 2, "draft": None, "stop": None,
    }, {}, ("draft",)),
    Door("unmask", unmask, {
        "model": masked, "tokens": torch.tensor([[1, 10, 10]]), "mask_token": 10, "steps": 2, "order": "confidence",
        "remask": 0.1, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "attention_mask": None,
        "generator": None,
    }),
    Door("KVCache", KVCache, {"model": gpt, "max_length": 9, "rotary": "absolute"}),
    Door("PromptLookup", PromptLookup, {"length": 4, "ngram": 2}),
    Door("DraftModel", DraftModel, {"model": gpt, "max_length": 9, "branches": (2, 1)}),
    Door("TransformerConfig", TransformerConfig, {
        **CONFIG, "num_kv_heads": None, "head_dim": None, "hidden_dim": None, "activation": "gelu", "gated": False,
        "norm": "layer", "norm_eps": 1e-5, "norm_order": "pre", "embed_norm": False, "final_norm": True, "bias": ("q",),
        "qk_norm": False, "scale": None, "score": "dot", "normalize": "softmax", "max_length": None,
        "rotary_base": 10000.0, "rotary_scaling": None, "relative_buckets": 32,
        "relative_max_distance": 128, "relative_bidirectional": True,
        "cross": False, "dropout": 0.0, "init": "gpt2",
    }),
    Door("Transformer", Transformer, {"config": config, "graph": Causal()}, {}, ("graph",)),
    Door("Transformer.forward", transformer, {
        "x": x, "graph": None, "bias": None, "positions": None, "attention_mask": None, "memory": None,
        "memory_graph": None, "memory_attention_mask": None,
    }, {}, ("graph",)),
    Door("Attention", Attention, {
        "embed_dim": 8, "num_heads": 2, "num_kv_heads": None, "head_dim": None, "memory_dim": None, "bias": ("q",),
        "qk_norm": False, "scale": None, "score": "dot", "normalize": "softmax", "dropout": 0.0,
    }),
    Door("Attention.forward", attention, {
        "x": x, "graph": Causal(), "memory": None, "bias": None, "attention_mask": None, "rotary": None,
        "return_weights": False,
    }),
    Door("FeedForward", FeedForward, {
        "embed_dim": 8, "hidden_dim": 16, "activation": "gelu", "gated": False, "bias": True, "dropout": 0.0,
    }),
    Door("random_walk_positions", random_walk_positions, {"graph": GRAPH, "steps": 2, "n": 6}),
    Door("LogMelSpectrogram", LogMelSpectrogram, {
        "sampling_rate": 8000, "n_fft": 256, "hop_length": 128, "num_mels": 32,
    }),
    Door("LogMelSpectrogram.forward", LogMelSpectrogram(), {"sound": torch.zeros(1, 800)}),
    Door("pool", pool, {"x": x, "reduce": "mean", "batch": None, "num_graphs": None, "attention_mask": None}),
    Door("pool of packed graphs", pool, {
        "x": x[0], "reduce": "max", "batch": torch.arange(6), "num_graphs": 6, "attention_mask": None,
    }, {"num_graphs": "num_graphs|batch"}),
    Door("GPT", GPT, {"config": config, "vocab_size": 11, "graph": Causal(), "tied": True}, {
        "vocab_size": "vocab_size|tokens",
    }, ("graph",)),
    Door("GPT.forward", gpt, {
        "tokens": tokens, "graph": None, "bias": None, "positions": None, "attention_mask": None,
    }, {}, ("graph",)),
    Door("GPT.save", partial(gpt.save, KEPT.name), {"metadata": {"step": "1"}}),
    Door("GPT.load", partial(GPT.load, KEPT.name), {"dtype": None, "device": "cpu"}),
    Door("Encoder", Encoder, {
        "config": config, "vocab_size": 11, "graph": Causal(), "num_types": 2, "tied": True, "num_classes": 3,
        "classify": "sequence",
    }, {"vocab_size": "vocab_size|tokens", "num_types": "num_types|types"}, ("graph",)),
    Door("Encoder.forward", encoder, {
        "tokens": tokens, "graph": None, "bias": None, "positions": None, "attention_mask": None, "types": None,
    }, {}, ("graph",)),
    Door("EncoderDecoder.forward", translator, {
        "source": tokens, "target": tokens, "bias": None, "attention_mask": None, "decoder_bias": None,
        "decoder_attention_mask": None,
    }, {"source": "tokens", "target": "tokens", "decoder_bias": "bias"}),
    Door("ViT", ViT, {
        "config": config, "num_classes": 3, "image_size": 4, "patch_size": 2, "channels": 1, "graph": Causal(),
        "pool": "mean",
    }, {"image_size": "image_size|height|width", "patch_size": "patch_size|patch_height|patch_width"}, ("graph",)),
    Door("ViT.forward", vit, {
        "images": torch.randn(2, 1, 4, 4), "graph": None, "bias": None, "attention_mask": None,
    }, {}, ("graph",)),
    Door("DecisionTransformer", DecisionTransformer, {
        "config": config, "state_dim": 3, "action_dim": 2, "max_time": 9, "graph": Causal(), "bounded": True,
    }, {"max_time": "max_time|timesteps"}, ("graph",)),
    Door("DecisionTransformer of discrete states and actions", DecisionTransformer, {
        "config": config, "num_states": 3, "num_actions": 2, "max_time": 9,
    }, {"max_time": "max_time|timesteps"}),
    Door("DecisionTransformer.forward", decision, {
        "states": torch.randn(2, 5, 3), "actions": torch.randn(2, 5, 2), "returns": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5), "bias": None, "attention_mask": None,
    }),
    Door("DecisionTransformer.forward of discrete states and actions", choosing, {
        "states": torch.ones(2, 5).long(), "actions": torch.ones(2, 5).long(), "returns": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5),
    }),
    *(Door(kind.__name__, kind, arguments, ALSO) for kind, arguments in {
        attngraph.Causal: {"offset": 0}, attngraph.Window: {"left": 2, "right": 0, "dilation": 1},
        attngraph.Prefix: {"length": 2}, attngraph.Global: {"nodes": (0, 2)}, attngraph.Strided: {"stride": 2},
        attngraph.Chunks: {"chunk": 3, "offset": 0}, attngraph.Documents: {"lengths": (2, 3)},
        attngraph.ChunkEnds: {"chunk": 3, "length": 1, "offset": 0},
        attngraph.Tree: {"parents": (-1, 0, 0)}, attngraph.Random: {"degree": 2, "seed": 0},
        attngraph.Expander: {"degree": 2, "seed": 0},
        attngraph.Axial: {"shape": (2, 3)}, attngraph.Neighborhood: {"shape": (2, 3), "radius": 1, "dilation": 1},
        attngraph.ShiftedWindows: {"shape": (4, 4), "window": 2, "shift": 1},
        attngraph.EdgeList: {"edge_index": torch.tensor([[0, 1], [1, 2]]), "size": 3},
        attngraph.Disjoint: {"graphs": [Causal().sized(2, 2), Causal()]},
        attngraph.Batched: {"graphs": [Causal().sized(2, 2), Causal().sized(3, 3)]},
        attngraph.Beside: {"a": Causal().sized(2, 2), "b": Causal()},
        attngraph.above: {"a": Causal().sized(2, 2), "b": Causal()},
        attngraph.PerHead: {"graphs": [Causal(), Causal()]},
        attngraph.Blocks: {"graph": Causal(), "block": 2}, attngraph.TopK: {"k": 2},
        attngraph.BlockTopK: {"block": 4, "k": 2, "queries": 2, "causal": True},
    }.items()),
    *(Door(f"Graph.{name}", getattr(GRAPH, name), arguments, {"count": "count|num_global"}) for name, arguments in {
        "rows": {"start": 1, "stop": 3}, "sized": {"num_queries": 6, "num_keys": 6}, "with_global_nodes": {"count": 1},
        "mask": {"n": 6, "m": 6, "device": "cpu"}, "edge_index": {"n": 6, "m": 6}, "num_edges": {"n": 6, "m": 6},
        "in_degrees": {"n": 6, "m": 6}, "out_degrees": {"n": 6, "m": 6},
        "resolve": {"q": q, "k": k, "attention_mask": None},
        "spans": {"start": 1, "stop": 2, "n": 6, "m": 6}, "of_head": {"index": 0}, "edge_heads": {"n": 6, "m": 6},
    }.items()),
    Door("parse", attngraph.parse, {"text": "Causal()", "names": {"own": Causal()}}, {"text": "text|expression"}),
    Door("parse_list", attngraph.parse_list, {"text": "Causal()", "names": None}, {"text": "text|expression"}),
    Door("from_neighbors", attngraph.from_neighbors, {"index": torch.zeros(3, 2, dtype=torch.int64), "num_keys": 3}),
    Door("knn_graph", attngraph.knn_graph, {"x": torch.randn(5, 2), "k": 3, "loop": False, "queries": None}),
    Door("radius_graph", attngraph.radius_graph, {
        "x": torch.randn(5, 2), "r": 1.0, "loop": False, "max_num_neighbors": None, "queries": None,
    }),
    Door("from_dense", attngraph.from_dense, {"mask": torch.eye(3, dtype=torch.bool)}),
    Door("from_function", attngraph.from_function, {
        "function": lambda i, j: j <= i, "size": (3, 3),
    }, {"size": "size|num_queries"}, ("function",)),
    Door("from_edge_index", attngraph.from_edge_index, {
        "edge_index": torch.tensor([[0, 1], [1, 2]]), "num_nodes": 3, "size": None,
    }, {"num_nodes": "num_nodes|size|num_queries", "size": "size|num_nodes|num_sources"}),
    Door("from_networkx", attngraph.from_networkx, {
        "G": networkx.path_graph(3), "nodelist": [0, 1, 2], "edge_attr": None,
    }),
    Door("from_networkx of two sides", attngraph.from_networkx, {
        "G": networkx.path_graph(3), "nodelist": None, "top": [0, 2], "bottom": [1], "bipartite": False,
    }, {"top": "top|bottom|bipartite", "bottom": "top|bottom|bipartite"}),
    Door("to_networkx", attngraph.to_networkx, {
        "graph": Causal(), "n": 3, "m": 3, "nodes": "abc", "weights": None, "edge_attr": "weight", "reduce": "mean",
    }),
    Door("collate", attngraph.collate, {"samples": [(torch.randn(3, 2), Causal().sized(3, 3))]}),
    Door("from_scipy_sparse_matrix", attngraph.from_scipy_sparse_matrix, {"matrix": scipy.sparse.eye_array(3)}),
    Door("to_scipy_sparse_matrix", attngraph.to_scipy_sparse_matrix, {
        "graph": Causal(), "n": 3, "m": 3, "weights": None, "format": "coo", "array": False,
    }),
    Door("to_block_mask", attngraph.to_block_mask, {"graph": Causal(), "n": 130, "m": 130}),
    Door("analysis.is_causal", analysis.is_causal, {"graph": Causal(), "n": 4}),
    Door("analysis.leaks", analysis.leaks, {"graphs": [Causal()], "n": 4}),
    Door("analysis.receptive_field", analysis.receptive_field, {"graphs": [Causal()], "node": 2, "n": 4}),
    Door("analysis.reach", analysis.reach, {"graphs": [Causal()], "n": 4}),
    Door("analysis.last_reader", analysis.last_reader, {"graph": Causal(), "n": 4, "m": 4}),
    Door("analysis.leak_path", analysis.leak_path, {"graphs": [Causal()], "n": 4}),
    Door("analysis.growth", analysis.growth, {"graphs": [Causal()], "node": 2, "n": 4}),
    Door("analysis.path", analysis.path, {"graphs": [Causal()], "source": 1, "target": 2, "n": 4}),
    Door("analysis.diameter", analysis.diameter, {"graph": Causal(), "n": 4}),
    Door("analysis.components", analysis.components, {"graphs": [Causal()], "n": 4}),
    Door("analysis.bottlenecks", analysis.bottlenecks, {"graphs": [Causal()], "n": 4}),
    Door("analysis.peak_alive", analysis.peak_alive, {"graph": Causal(), "n": 4}),
    Door("analysis.cost", analysis.cost, {
        "graphs": Causal(), "n": 4, "dim": 8, "heads": 2, "kv_heads": None, "dtype": torch.float32, "cache": True,
        "seconds": True, "device": "cpu",
    }),
    Door("analysis.compare", analysis.compare, {
        "a": Causal(), "b": Window(1, 0), "n": 4, "dim": 8, "heads": 2, "kv_heads": None, "dtype": torch.float32,
        "device": "cpu",
    }),
    Door("draw.connectivity", attngraph.draw.connectivity, {
        "graph": Causal(), "n": 6, "m": 6, "labels": None, "key_labels": None, "title": None,
    }),
    Door("draw.messages", attngraph.draw.messages, {
        "graph": Causal(), "n": 6, "m": 6, "node": None, "weights": torch.ones(21), "labels": None, "key_labels": None,
        "title": None,
    }, {"n": "n|weights", "m": "m|weights", "graph": "graph|weights"}),
    Door("draw.save", partial(attngraph.draw.save, path=f"{KEPT.name}/picture.png"), {"picture": Figure()}),
    Door("draw.attention", attngraph.draw.attention, {
        "weights": torch.ones(21), "graph": Causal(), "n": 6, "m": 6, "head": None, "labels": None, "key_labels": None,
        "title": "",
    }, {"n": "n|weights", "m": "m|weights", "graph": "graph|weights"}),
    Door("draw.explanation", attngraph.draw.explanation, {
        "explanation": Explanation(edge_index=torch.eye(2).long(), edge_mask=torch.ones(2), num_nodes=2),
        "labels": None, "key_labels": None, "title": "",
    }),
    Door("hf.connect", attngraph.hf.connect, {
        "model": LLAMA, "graph": Causal(), "mode": "intersect", "evict": False,
    }, {}, ("graph",)),
    Door("hf.disconnect", attngraph.hf.disconnect, {"model": LLAMA}),
    Door("hf.attention_modules", attngraph.hf.attention_modules, {"model": LLAMA}),
    Door("pyg.accelerate", attngraph.pyg.accelerate, {"model": torch.nn.Linear(1, 1)}),
    Door("pyg.from_batch", attngraph.pyg.from_batch, {"batch": torch.tensor([0, 0, 1])}),
    Door("distributed.compare_strategies", attngraph.distributed.compare_strategies, {
        "graph": Causal(), "n": 64, "ranks": 2, "heads": 2, "kv_heads": None, "head_dim": 8, "dtype": torch.float32,
    }),
    Door("draw.receptive_field", attngraph.draw.receptive_field, {
        "graphs": [Causal()], "node": 2, "n": 6, "labels": None, "title": None,
    }),
    Door("draw.set_title", partial(attngraph.draw.set_title, Figure().subplots()), {"text": "a title"}),
    Door("record", recorded, {"model": gpt, "layers": None, "heads": None, "gradients": False}),
    Door("Recorded.draw", RECORDED.draw, {
        "head": 0, "batch": 0, "labels": None, "key_labels": None, "title": None,
    }),
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_a_wrong_argument_is_named(door, monkeypatch):
    monkeypatch.setattr(comparison._Match, "flex", lambda self: 1 / 0)  # it takes half a minute to compile
    door.function(**door.arguments)
    found = [str(tuple(fault)) for fault in faults(door)]
    assert not found, "\n".join([f"{len(found)} of {len(door.arguments) * len(WRONG)}", *found])
