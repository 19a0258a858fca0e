"""Models are kept: what `save` writes, `load` makes again, in any process; what can't be written is told before."""

import copy
import inspect
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from modules import MODELS, given, made, variants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from attngraph import (
    Causal,
    Documents,
    EdgeList,
    Full,
    Graph,
    Identity,
    PerHead,
    Prefix,
    Random,
    Window,
    from_function,
    hf,
)
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, Model, ViT
from attngraph.nn import AudioEmbedding, PatchEmbedding, TokenEmbedding, TransformerConfig

LISTED = EdgeList([[2, 0, 2, 8, 3], [1, 1, 1, 4, 8]], 9)
CONFIG = TransformerConfig(embed_dim=24, num_layers=2, num_heads=3, position="rotary")
VARIANTS = [pytest.param(*each, id=f"{each[0].__name__}-{each[1]}") for each in variants() if each[0] in MODELS]


def written(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(model, other):
    """Classes, arguments, graphs, and every output, bit for bit."""
    assert type(other) is type(model)
    assert str(other) == str(model)
    inputs = given(model)
    with torch.no_grad():
        assert torch.equal(other(**inputs), model(**inputs))
    ours, theirs = model.state_dict(keep_vars=True), other.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor)
    assert len(list(other.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(("cls", "position"), VARIANTS)
def test_a_model_is_kept(cls, position, tmp_path):
    model = made(cls, position)
    model.save(tmp_path)
    same(model, cls.load(tmp_path))
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_every_argument_of_a_constructor_is_kept(cls, tmp_path):
    """A new one that `_arguments` forgets would be another model after loading."""
    graphs = {"graph", "encoder_graph", "decoder_graph"}  # those of the Transformers
    assert set(inspect.signature(cls.__init__).parameters) - {"self"} - graphs == set(made(cls)._arguments())


SWITCHES = {
    "num_kv_heads": 1, "head_dim": 6, "hidden_dim": 31, "activation": "silu", "gated": True, "norm": "rms",
    "norm_eps": 1e-7, "norm_order": "post", "embed_norm": True, "final_norm": False, "bias": ("q", "ff"),
    "qk_norm": True, "scale": (0.3, 0.1), "score": "additive", "normalize": "sigmoid", "position": "rotary",
    "max_length": 33, "rotary_base": 123.456, "relative_buckets": 6, "relative_max_distance": None,
    "relative_bidirectional": False, "cross": False, "dropout": 0.125, "init": "zero",
    "rotary_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 6},
}  # fmt: skip


def test_every_switch_is_kept(tmp_path):
    config = TransformerConfig(embed_dim=24, num_layers=2, num_heads=3, **SWITCHES)
    assert set(SWITCHES) | {"embed_dim", "num_layers", "num_heads"} == set(vars(config))
    model = Encoder(config, 11, num_types=3, tied=False)
    model.save(tmp_path)
    again = Encoder.load(tmp_path)
    assert again.config == config
    assert again._arguments() == model._arguments()


GRAPHS = [
    LISTED,
    [LISTED, LISTED & Causal()],
    [Causal() & (Window(3, 0) | Prefix(2)), Causal()],
    PerHead([Causal(), LISTED | Identity(), ~LISTED.T - Window(1, 0)]),
    Causal() & Documents([4, 5]),
    (LISTED @ LISTED) ^ Random(3, seed=5),
    LISTED.rows(0, 9).sized(9, 9),
]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_graphs_are_kept(graph, tmp_path):
    model = GPT(CONFIG, 17, graph).eval()
    model.save(tmp_path)
    again = GPT.load(tmp_path)
    assert again.transformer.graphs == model.transformer.graphs
    same(model, again)


def test_edges_keep_the_order_in_which_they_were_given(tmp_path):
    GPT(CONFIG, 17, [LISTED, LISTED & Causal()]).save(tmp_path)
    listed = GPT.load(tmp_path).transformer.graphs[0]
    assert torch.equal(listed.position, LISTED.position)
    assert torch.equal(listed.order, LISTED.order)
    assert torch.equal(LISTED.given, torch.tensor([[2, 0, 2, 8, 3], [1, 1, 1, 4, 8]]))
    assert [name for name in written(tmp_path)[1] if name.startswith("edges")] == ["edges:0"]  # shared, so once


def test_more_lists_than_ten_are_each_their_own(tmp_path):
    config = TransformerConfig(embed_dim=8, num_layers=12, num_heads=1, position="none")
    model = GPT(config, 7, [EdgeList([[layer], [0]], 12) for layer in range(12)])
    model.save(tmp_path)
    assert GPT.load(tmp_path).transformer.graphs == model.transformer.graphs


def test_what_else_models_are_made_of_is_kept(tmp_path):
    vit = ViT(CONFIG, 5, image_size=(8, 4), patch_size=2, channels=1, graph=Window(2, 2), pool="cls").eval()
    vit.save(tmp_path / "vit")
    images = torch.randn(2, 1, 8, 4)
    again = ViT.load(tmp_path / "vit")
    assert again.transformer.graphs == vit.transformer.graphs
    assert torch.equal(again(images), vit(images))
    decoder = TransformerConfig(embed_dim=24, num_layers=1, num_heads=3, position="rotary", cross=True)
    sources = {
        "tokens": TokenEmbedding(9, 24, "letters"), "patches": PatchEmbedding((4, 4), (2, 2), 3, 24),
        "sound": AudioEmbedding(5, 24),
    }  # fmt: skip
    for name, source in sources.items():
        model = EncoderDecoder(
            CONFIG, decoder, 7, source=source, encoder_graph=[Window(1, 1), Full()], memory_graph=Window(2, 2),
            tied=False, logit_scale=0.1,
        )  # fmt: skip
        model.save(tmp_path / name)
        found = EncoderDecoder.load(tmp_path / name)
        assert str(found) == str(model)
        assert found.encoder.graphs == model.encoder.graphs
        assert (found.memory_graph, found.logit_scale) == (Window(2, 2), 0.1)
    assert EncoderDecoder.load(tmp_path / "tokens").source.what == "letters"


def test_precision_is_kept_or_chosen(tmp_path):
    model = GPT(CONFIG, 17).to(torch.bfloat16)
    model.head.to(torch.float64)  # tied: the embedding is too
    model.save(tmp_path)
    again = GPT.load(tmp_path)
    assert {name: p.dtype for name, p in again.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    assert {p.dtype for p in GPT.load(tmp_path, dtype=torch.float16).parameters()} == {torch.float16}
    assert {p.device.type for p in GPT.load(tmp_path, device="meta").parameters()} == {"meta"}
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        GPT.load(tmp_path, dtype=torch.int32)


def test_a_loaded_model_is_trained_and_saved_over_its_own_file(tmp_path):
    GPT(CONFIG, 17).save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = GPT.load(tmp_path).train()
    tokens = torch.randint(17, (2, 9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens).square().mean().backward()
    optimizer.step()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save(tmp_path)
    assert torch.equal(GPT.load(tmp_path)(tokens), model.eval()(tokens))


def test_another_process_has_the_same_model(tmp_path):
    model = made(GPT)
    model.transformer.graphs = [LISTED, Causal() & LISTED]
    model.save(tmp_path)
    tokens = torch.randint(17, (1, 9))
    torch.save((tokens, model(tokens)), tmp_path / "expected")
    code = (
        "import sys, torch; from attngraph.models import Model; model = Model.load(sys.argv[1])\n"
        "tokens, wanted = torch.load(sys.argv[1] + '/expected'); torch.testing.assert_close(model(tokens), wanted)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)


# ------------------------------------------------------------------------------------------------- what can't be kept


class Ring(Graph):
    nodes: int

    def contains(self, q_idx, kv_idx):
        return (kv_idx - q_idx) % self.nodes == 1


class Causal_(Graph):
    def contains(self, q_idx, kv_idx):
        return kv_idx < q_idx


Causal_.__name__ = "Causal"  # as one of the library's


@pytest.mark.parametrize("graph", [from_function(lambda i, j: j <= i), Ring(9), Causal() & Ring(9), Causal_()], ids=str)
def test_a_graph_that_cant_be_written_is_an_error_before_anything_is(graph, tmp_path):
    model = GPT(CONFIG, 17, graph)
    with pytest.raises(ValueError, match=r"can't be saved, .*save it as its edges, EdgeList"):
        model.save(tmp_path / "new")
    translator = made(EncoderDecoder)
    translator.memory_graph = graph
    with pytest.raises(ValueError, match=r"can't be saved, .*save it as its edges, EdgeList"):
        translator.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.transformer.graphs = EdgeList(graph.edge_index(9, 9), size=(9, 9))  # as the error advises
    model.save(tmp_path / "new")


def test_a_model_that_its_constructor_does_not_make_is_an_error(tmp_path):
    model = GPT(CONFIG, 17)
    model.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"left over: adapter.bias, adapter.weight"):
        model.save(tmp_path / "new")
    model = GPT(CONFIG, 17, tied=False)
    model.head = nn.Linear(24, 3, bias=False)
    with pytest.raises(ValueError, match=r"head.weight of shape \(3, 24\) where \(17, 24\) belongs"):
        model.save(tmp_path / "new")
    model = GPT(CONFIG, 17, tied=False)
    model.head.weight = model.embedding.weight  # tied by hand
    with pytest.raises(ValueError, match=r"missing: head.weight"):
        model.save(tmp_path / "new")
    source = nn.Embedding(5, 24)
    model = EncoderDecoder(CONFIG, TransformerConfig(**{**vars(CONFIG), "cross": True}), 17, source=source)
    with pytest.raises(
        ValueError, match=r"EncoderDecoder.source can't be saved: .*TokenEmbedding.*\(got a Embedding\)"
    ):
        model.save(tmp_path / "new")
    with pytest.raises(ValueError, match="metadata must be strings by name"):
        GPT(CONFIG, 17).save(tmp_path / "new", metadata={"step": 3})
    assert not (tmp_path / "new").exists()


class Scaled(GPT):
    def __init__(self, config, vocab_size, factor, **options):
        super().__init__(config, vocab_size, **options)
        self.factor = factor

    def _arguments(self):
        return {**super()._arguments(), "factor": self.factor}


class Forgetful(Scaled):
    _arguments = GPT._arguments


def test_a_subclass_that_does_not_say_what_it_is_made_of_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a Forgetful can't be saved: its _arguments\(\) must be its .*'factor'"):
        Forgetful(CONFIG, 17, factor=2.5).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_subclass_says_what_it_is_made_of(tmp_path):
    Scaled(CONFIG, 17, factor=2.5).save(tmp_path)
    assert Scaled.load(tmp_path).factor == Model.load(tmp_path).factor == 2.5
    with pytest.raises(ValueError, match=r"it holds a Scaled, not a GPT: Scaled.load reads it"):
        GPT.load(tmp_path)


# ------------------------------------------------------------------------------------------------------ wrong files


@pytest.fixture
def gpt(tmp_path):
    GPT(CONFIG, 17, [LISTED, Causal()]).save(tmp_path, metadata={"step": "7"})
    return tmp_path


def changed(folder, change):
    """Its header and tensors, changed."""
    metadata, tensors = written(folder)
    header = json.loads(metadata["attngraph"])
    change(header, tensors)
    save_file(tensors, folder / "model.safetensors", {**metadata, "attngraph": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(format=2), "its format is 2, and this version of attngraph reads 1 at most"),
        (lambda h, t: h.update(model="ViT"), "it holds a ViT, not a GPT: ViT.load reads it"),
        (lambda h, t: h.pop("model"), "its header makes no model (KeyError: 'model')"),
        (
            lambda h, t: h["arguments"].update(vocab_size=18),
            "embedding.weight of shape (17, 24) where (18, 24) belongs",
        ),
        (lambda h, t: h["arguments"].update(flux=1), "its header makes no model (TypeError: "),
        (lambda h, t: h["arguments"].update(tied=False), "missing: head.weight"),
        (
            lambda h, t: h["arguments"].update(config={"print": {"a": 1}}),
            "its header makes no model (KeyError: 'print')",
        ),
        (lambda h, t: h["graphs"].update(transformer=["Causal()"]), "one for each of 2 layers (got 1)"),
        (lambda h, t: h["graphs"].update(transformer=["_0", "_0"]), "not part of a graph expression: '_0'"),
        (lambda h, t: h["graphs"].update(transformer=["print(1)", "Full()"]), "not part of a graph expression"),
        (lambda h, t: h["graphs"].clear(), "it must have graphs for transformer"),
        (lambda h, t: t.pop("edges:0"), "not part of a graph expression"),
        (lambda h, t: t.update({"edges:0": torch.full((2, 3), 9)}), "edge_index must name key nodes from 0 to 8"),
        (lambda h, t: t.update({"edges:0": torch.ones(3)}), "must be tensors (2, E)"),
        (lambda h, t: t.pop("embedding.weight"), "missing: embedding.weight"),
        (lambda h, t: t.update(extra=torch.ones(1)), "left over: extra"),
        (
            lambda h, t: t.update({"embedding.weight": torch.ones(17, 24, dtype=torch.int64)}),
            "whole numbers for fractions",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(gpt, change, message):
    changed(gpt, change)
    with pytest.raises(ValueError) as error:
        GPT.load(gpt)
    assert message in str(error.value)
    assert str(gpt) in str(error.value)


def test_a_directory_of_something_else_says_so(gpt, tmp_path):
    with pytest.raises(ValueError, match=r"it holds a GPT, not a ViT: GPT.load reads it"):
        ViT.load(gpt)
    with pytest.raises(FileNotFoundError, match=r"nowhere.* does not exist: load takes a directory that save wrote"):
        GPT.load(gpt / "nowhere")
    for content in (b"", b"no tensors", (gpt / "model.safetensors").read_bytes()[:-10]):
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="can't be read"):
            GPT.load(tmp_path / "cut")
    save_file(load_file(gpt / "model.safetensors"), gpt / "model.safetensors")
    with pytest.raises(ValueError, match=r"was not written by save$"):
        GPT.load(gpt)
    (gpt / "config.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"\(got None\); a model that attngraph saved is read by its class"):
        hf.load(gpt)
    (gpt / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"was not written by save; .* which attngraph.hf.load reads"):
        GPT.load(gpt)


def test_an_interrupted_save_leaves_the_file_that_was_there(gpt, monkeypatch):
    before = (gpt / "model.safetensors").read_bytes()
    for stage in ("save_file", "os"):
        with monkeypatch.context() as patched:

            def stopped(*_):
                raise KeyboardInterrupt

            if stage == "save_file":

                def half(tensors, path, metadata):
                    Path(path).write_bytes(b"half a file")
                    raise KeyboardInterrupt

                patched.setattr(safetensors.torch, "save_file", half)
            else:
                patched.setattr(os, "replace", stopped)
            with pytest.raises(KeyboardInterrupt):
                GPT(CONFIG, 17).save(gpt)
        assert os.listdir(gpt) == ["model.safetensors"]
        assert (gpt / "model.safetensors").read_bytes() == before


def test_several_save_to_one_directory_at_once(tmp_path):
    """Found: all wrote to the same file aside, which the first renamed."""
    models = [GPT(CONFIG, 17) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            list(pool.map(lambda model: model.save(tmp_path), models))
    assert os.listdir(tmp_path) == ["model.safetensors"]
    kept = GPT.load(tmp_path).state_dict()
    assert any(all(torch.equal(each.state_dict()[name], kept[name]) for name in kept) for each in models)


def test_what_a_killed_process_left_is_removed_when_it_is_old(gpt):
    old, new = gpt / ".partial-a-model.safetensors", gpt / ".partial-b-model.safetensors"
    for left in (old, new):
        left.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    GPT(CONFIG, 17).save(gpt)
    assert sorted(os.listdir(gpt)) == [new.name, "model.safetensors"]


# ----------------------------------------------------------------------------- what a model and its weights say of it


def test_a_model_prints_its_graphs_score_and_dropout():
    config = TransformerConfig(
        embed_dim=24,
        num_layers=5,
        num_heads=3,
        position="none",
        dropout=0.25,
        score="additive",
        scale=0.5,
        normalize="relu",
    )
    model = GPT(config, 17, Causal())
    assert "graph: Causal()" in str(model)
    assert "score=additive, scale=0.5, normalize=relu, dropout=0.25" in str(model)
    model.transformer.graphs = [Window(4, 0)] * 3 + [Full(), Documents([1] * 5000)]
    text = str(model.transformer)
    assert "graph of layers 0–2: Window(4, 0)\n" in text
    assert "graph of layer 3: Full()\n" in text
    assert max(map(len, text.splitlines())) < 220
    deep = GPT(TransformerConfig(embed_dim=8, num_layers=40, num_heads=1, position="none"), 3)
    deep.transformer.graphs = [Window(layer, 0) for layer in range(40)]
    assert "… and 32 more" in str(deep)
    assert "memory_graph: Window(1, 1)" in str(
        EncoderDecoder(CONFIG, TransformerConfig(**{**vars(CONFIG), "cross": True}), 9, memory_graph=Window(1, 1))
    )


def loaded_with_warnings(model, state, **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.load_state_dict(state, **options)
    return [str(each.message) for each in told if "graphs" in str(each.message)]


def test_weights_of_another_graph_are_warned_of(tmp_path):
    """Both are named; no key is added, and files of weights alone, older ones and plain dicts load as ever."""
    model, other = GPT(CONFIG, 17, Causal()), GPT(CONFIG, 17, [Causal(), Full()])
    state = model.state_dict()
    assert [*state] == [*dict(other.named_parameters()), "head.weight"]
    torch.save(state, tmp_path / "state.pt")
    for given_state in (state, copy.deepcopy(state), torch.load(tmp_path / "state.pt", weights_only=True)):
        for options in ({}, {"assign": True}):
            (told,) = loaded_with_warnings(copy.deepcopy(other), given_state, **options)
            assert (
                "transformer.graphs: theirs, graph: Causal(); here, graph of layer 0: Causal(), graph of layer 1: Ful"
                in told
            )
            assert not loaded_with_warnings(copy.deepcopy(model), given_state, **options)
    assert not loaded_with_warnings(other, dict(state))
    wrapped = nn.Sequential(other)
    (told,) = loaded_with_warnings(wrapped, nn.Sequential(model).state_dict())
    assert "other 0.transformer.graphs" in told


def test_weights_of_another_number_of_layers_are_warned_of():
    state = GPT(CONFIG, 17).state_dict()
    (told,) = loaded_with_warnings(GPT(replace(CONFIG, num_layers=3), 17), state, strict=False)
    assert "theirs, of 2 layers, graph: Causal(); here, of 3 layers, graph: Causal()" in told


def test_weights_of_another_memory_graph_are_warned_of():
    model = made(EncoderDecoder)
    state = model.state_dict()
    model.memory_graph = Window(1, 1)
    (told,) = loaded_with_warnings(model, state)
    assert "other memory_graphs: theirs, graph: Full(); here, graph: Window(1, 1)" in told


def test_graphs_of_functions_are_told_apart_by_their_names_alone():
    """They are numbered in each process, which says nothing of the weights."""

    def near(i, j):
        return i - j < 3

    one, other = GPT(CONFIG, 17, from_function(near)), GPT(CONFIG, 17, from_function(near))
    assert not loaded_with_warnings(one, other.state_dict())
    assert loaded_with_warnings(one, GPT(CONFIG, 17, from_function(lambda i, j: i >= j)).state_dict())


def test_decision_transformers_are_kept_whatever_they_are_made_of(tmp_path):
    none = dict.fromkeys(("state_dim", "num_states", "action_dim", "num_actions"))
    for sizes in (
        {"state_dim": 5, "action_dim": 2, "bounded": False},
        {"num_states": 5, "action_dim": 2, "bounded": True},
        {"state_dim": 5, "num_actions": 2, "bounded": True},
        {"num_states": 5, "num_actions": 2, "bounded": True},
    ):
        model = DecisionTransformer(CONFIG, **sizes, max_time=9).eval()
        model.save(tmp_path)
        again = DecisionTransformer.load(tmp_path)
        assert again._arguments() == {"config": CONFIG, "max_time": 9, **none, **sizes}
        states = torch.randint(5, (2, 4)) if "num_states" in sizes else torch.randn(2, 4, 5)
        actions = torch.randint(2, (2, 4)) if "num_actions" in sizes else torch.randn(2, 4, 2)
        inputs = states, actions, torch.randn(2, 4, 1), torch.arange(4).expand(2, 4)
        with torch.no_grad():
            assert torch.equal(again(*inputs), model(*inputs))
