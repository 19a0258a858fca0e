"""Graphs that a function computes of what a layer reads, in the place of graphs that are given."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from attngraph import Causal, Full, Graph, PerHead, analysis, draw, from_neighbors, generate, hf, knn_graph, record
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import Transformer, TransformerConfig

SMALL = {"embed_dim": 16, "num_layers": 2, "num_heads": 2}
CONFIG = TransformerConfig(**SMALL, position="none")
TOKENS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))


def nearest(x: torch.Tensor) -> Graph:
    return knn_graph(x, 3, loop=True)


class Projected(nn.Module):
    """The nearest of a projection, which is learned elsewhere."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 2)

    def forward(self, x):
        return knn_graph(self.project(x), 3, loop=True)


class Heard:
    """A function that keeps what it was given."""

    def __init__(self):
        self.x = []

    def __call__(self, x):
        self.x.append(x)
        return nearest(x)


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_it_is_given_what_attention_reads(norm_order):
    heard, read = Heard(), []
    model = Transformer(TransformerConfig(**SMALL, position="none", norm_order=norm_order), heard)
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda _, given, __: read.append(given[0]))
    model(torch.randn(3, 10, 16))
    assert len(heard.x) == 2
    for given, wanted in zip(heard.x, read, strict=True):
        assert given is wanted


def test_each_layer_of_each_entry_hears_its_own():
    model, x, read = Transformer(CONFIG, nearest), torch.randn(3, 10, 16, requires_grad=True), []
    for layer in model.layers:
        layer.attention.out.weight.data *= 300
        layer.attention.register_forward_hook(lambda _, given, __: read.append(given[0]))
    out = model(x)
    graphs = [nearest(each) for each in read]
    assert graphs[0] != graphs[1]
    torch.testing.assert_close(out, model(x, graphs))
    torch.testing.assert_close(out[1], model(x[1:2])[0], atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_functions_stand_among_graphs_and_in_a_call():
    x, model = torch.randn(3, 10, 16), Transformer(CONFIG, [Causal(), nearest])
    torch.testing.assert_close(Transformer.forward(model, x, [Causal(), nearest]), model(x))
    assert not torch.allclose(model(x, nearest), model(x))
    model.graphs = partial(knn_graph, k=3)
    assert model.extra_repr() == "graph: <function knn_graph>"
    model.graphs = [Causal(), nearest]
    assert model.extra_repr() == "graph of layer 0: Causal()\ngraph of layer 1: <function nearest>"


def test_a_module_is_a_part_of_the_model():
    function = Projected()
    model = Transformer(CONFIG, [Causal(), function])
    names = {name for name, _ in model.named_parameters() if name.startswith("graph_modules")}
    assert names == {"graph_modules.0.project.weight", "graph_modules.0.project.bias"}
    x = torch.randn(2, 10, 16)
    other = Transformer(CONFIG, [Causal(), Projected()])
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    twin = copy.deepcopy(model)
    assert twin.graphs[1] is twin.graph_modules[0] is not function
    model.double()(x.double())
    model.graphs = function
    assert model.graphs == (function, function)
    assert len(list(model.parameters())) == len(list(twin.parameters()))
    model.graphs = Causal()
    assert not hasattr(model, "graph_modules")


CROSS = TransformerConfig(**SMALL, position="none", cross=True)
MODELS = {
    "GPT": (lambda graph: GPT(CONFIG, 11, graph), (TOKENS,)),
    "Encoder": (lambda graph: Encoder(CONFIG, 11, graph), (TOKENS,)),
    "ViT": (
        lambda graph: ViT(CONFIG, 3, image_size=8, patch_size=2, channels=1, graph=graph),
        (torch.randn(2, 1, 8, 8),),
    ),
    "DecisionTransformer": (
        lambda graph: DecisionTransformer(CONFIG, state_dim=5, action_dim=2, max_time=9, graph=graph),
        (torch.randn(2, 5, 5), torch.randn(2, 5, 2), torch.randn(2, 5, 1), torch.arange(5).expand(2, 5)),
    ),
    "EncoderDecoder": (
        lambda graph: EncoderDecoder(CONFIG, CROSS, 11, encoder_graph=graph, decoder_graph=graph),
        (TOKENS, TOKENS),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_one(name, tmp_path):
    make, given = MODELS[name]
    heard = Heard()
    model = make(heard)
    model(*given).sum().backward()
    assert len(heard.x) == 2 * (1 + (name == "EncoderDecoder"))
    assert "<function Heard>" in str(model)
    with pytest.raises(ValueError, match=r"<function Heard> can't be saved.*state_dict"):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_library_has_no_functions(tmp_path):
    with pytest.raises(ValueError, match="<function nearest> can't be saved"):
        hf.save(GPT(TransformerConfig(**SMALL, activation="gelu_tanh", max_length=9), 11, nearest), tmp_path)


def test_a_memory_beside_the_nodes():
    decoder = TransformerConfig(**SMALL, position="none")
    model = EncoderDecoder(CONFIG, decoder, 11, decoder_graph=lambda x: Causal()).eval()
    found = model(TOKENS, TOKENS)
    model.decoder.graphs = Causal()
    torch.testing.assert_close(found, model(TOKENS, TOKENS))


def test_padding_is_heard_by_nobody():
    model, heard = Encoder(CONFIG, 11, nearest), Heard()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    found = model(TOKENS, attention_mask=mask)
    model.transformer.graphs = heard
    torch.testing.assert_close(model(TOKENS, attention_mask=mask), found)
    graphs = [nearest(x) for x in heard.x]
    torch.testing.assert_close(model(TOKENS, graphs, attention_mask=mask), found)


def test_weights_of_other_graphs_are_told_by_the_function():
    state = GPT(CONFIG, 11, nearest).state_dict()
    GPT(CONFIG, 11, nearest).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"theirs, graph: <function nearest>; here, graph: Causal\(\)"):
        GPT(CONFIG, 11).load_state_dict(state)


def test_what_runs_a_model_runs_it():
    model = GPT(CONFIG, 11, nearest).eval()
    assert generate(model, TOKENS, 3, use_cache=False).shape == (2, 9)
    with record(model) as recorded:
        model(TOKENS)
    assert recorded[1].edge_index.shape == (2, 2 * 6 * 3)
    torch.testing.assert_close(
        torch.func.functional_call(model, dict(model.named_parameters()), (TOKENS,)), model(TOKENS)
    )


@pytest.mark.slow
def test_a_program_breaks_where_the_graph_is_computed():
    model, x = Transformer(CONFIG, nearest), torch.randn(3, 20, 16)
    program = torch.compile(model)
    for _ in range(2):
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (lambda x: x, TypeError, r"a function that returns a Graph: <function <lambda>> returned a Tensor"),
        (lambda x: None, TypeError, "<function <lambda>> returned None"),
        (Projected().project, TypeError, "<function Linear> returned a Tensor"),
        (lambda x: PerHead([Causal()] * 3), ValueError, "3 heads but q has 2"),
        (lambda x: Full().sized(4, 4), ValueError, "4 query nodes but q has 10"),
        (lambda x: from_neighbors(torch.zeros(2, 10, 1, dtype=torch.int64)), ValueError, "2 for a batch of 3"),
        (Causal, TypeError, "the class Causal"),
        ([nearest], ValueError, r"one for each of 2 layers \(got 1\)"),
        ([nearest, Causal], TypeError, "one for each of 2 layers"),
    ],
)
def test_what_returns_no_graph_is_told(graph, error, message):
    with pytest.raises(error, match=message):
        Transformer(CONFIG, graph)(torch.randn(3, 10, 16))


def test_questions_about_graphs_want_graphs():
    model = Transformer(CONFIG, nearest)
    for ask in (partial(analysis.leaks, n=4), partial(draw.connectivity, n=4)):
        with pytest.raises(TypeError, match="got a function"):
            ask(model.graphs)
