"""The library's own files and those of Hugging Face: neither destroys the other, and both say what they can't keep."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from attngraph import Causal, EdgeList, Graph, PerHead, Window, from_function, hf
from attngraph.models import GPT, Model
from attngraph.nn import TransformerConfig

CONFIG = TransformerConfig(
    embed_dim=24, num_layers=2, num_heads=3, activation="gelu_tanh", position="learned", max_length=9
)


class Ring(Graph):
    nodes: int

    def contains(self, q_idx, kv_idx):
        return (kv_idx - q_idx) % self.nodes == 1


def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def test_a_checkpoint_of_hugging_face_is_not_overwritten(tmp_path):
    model = GPT(CONFIG, 17)
    hf.save(model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"checkpoint of Hugging Face, .*: save to another directory"):
        model.save(tmp_path)
    assert contents(tmp_path) == before
    hf.save(model, tmp_path)  # its own kind it may
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileExistsError):
        model.save(tmp_path)


def test_an_own_model_is_not_overwritten(tmp_path):
    model = GPT(CONFIG, 17)
    model.save(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"must not hold another model; .*Model.load.*: save to another"):
        hf.save(model, tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')  # beside an own model, whatever it says
    model.save(tmp_path)


def test_a_config_alone_is_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    GPT(CONFIG, 17).save(tmp_path)
    assert GPT.load(tmp_path).vocab_size == 17


def test_a_directory_of_both_says_how_it_is_read(tmp_path):
    model = GPT(CONFIG, 17)
    hf.save(model, tmp_path)
    model.save(tmp_path / "own")
    theirs = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "own" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"attngraph\.models\.GPT\.load, or by attngraph\.models\.Model\.load, and"):
        hf.load(tmp_path)
    assert isinstance(Model.load(tmp_path), GPT)
    (tmp_path / "model.safetensors").write_bytes(theirs)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing tensors") as error:
        hf.load(tmp_path)
    assert "Model.load" not in str(error.value)


@pytest.mark.parametrize("graph", [Ring(9), Causal() & Ring(9), from_function(lambda i, j: j <= i)], ids=str)
def test_graphs_that_cant_be_written_are_told_as_by_save(graph, tmp_path):
    model, told = GPT(CONFIG, 17, graph), []
    for save in (model.save, lambda path: hf.save(model, path)):
        with pytest.raises(ValueError, match=r"can't be saved, as it can't be made again .*EdgeList") as error:
            save(tmp_path / "new")
        told.append(str(error.value))
    assert told[0] == told[1]
    assert not (tmp_path / "new").exists()


def test_graphs_of_heads_that_cant_be_written_are_saved_as_advised(tmp_path):
    graph = PerHead([Ring(9), Causal(), Window(1, 0)]).sized(9, 9)
    model = GPT(CONFIG, 17, graph)
    with pytest.raises(ValueError, match="save it as its edges, ") as error:
        model.save(tmp_path)
    advice = str(error.value).partition("save it as its edges, ")[2]
    names = {"PerHead": PerHead, "EdgeList": EdgeList, "graph": graph, "n": 9, "m": 9}
    model.transformer.graphs = eval(advice, names)
    model.save(tmp_path)
    (again, _) = GPT.load(tmp_path).transformer.graphs
    assert torch.equal(again.mask(9, 9), graph.mask(9, 9))


def test_a_compiled_model_is_saved_as_it_is(tmp_path):
    model = GPT(CONFIG, 17)
    hf.save(torch.compile(model), tmp_path)
    loaded = hf.load(tmp_path)
    hf.save(torch.compile(loaded), tmp_path)
    again = hf.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
