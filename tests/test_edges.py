"""Values that come with an `edge_index` find the edges of whatever graph they meet."""

from dataclasses import replace

import pytest
import torch
from graphs import GRAPHS
from torch import nn

import attngraph.planning.backends
from attngraph import (
    Beside,
    Causal,
    Disjoint,
    EdgeBias,
    EdgeList,
    Full,
    Identity,
    PerHead,
    Window,
    attend,
    cache,
    from_edge_index,
    plan,
)
from attngraph.graph import columns
from attngraph.models import GPT, DecisionTransformer, Encoder, EncoderDecoder, ViT
from attngraph.nn import Transformer, TransformerConfig

BACKENDS = ["auto", *(name for name in attngraph.planning.backends.names() if name not in ("steps", "blocks"))]
N, H = 9, 2
CHANCE = torch.Generator().manual_seed(3)


def rand(*shape):
    return torch.randn(*shape, generator=CHANCE, dtype=torch.float64)


def sides(n=N, m=N, batch=2, heads=H):
    return rand(batch, heads, n, 4), rand(batch, heads, m, 4), rand(batch, heads, m, 4)


def shuffled(edge_index):
    """The same edges in another order."""
    return edge_index[:, torch.randperm(edge_index.shape[1], generator=CHANCE)]


def dense(edge_index, values, n, m, other=0.0):
    """The same numbers as a bias of all pairs."""
    key, query = edge_index
    found = values.new_full((*values.shape[:-1], n, m), other)
    found[..., query, key] = values
    return found


RING = torch.tensor([[(i * 4) % N for i in range(N)], [(i * 4 + 1) % N for i in range(N)]])
MORE = torch.cat([RING, torch.tensor([[3, 8, 0, 5], [7, 2, 2, 0]])], dim=1)
SHAPES = {"(E,)": (), "(H, E)": (H,), "(B, H, E)": (2, H), "(B, 1, E)": (2, 1)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_in_any_order_are_those_of_a_dense_bias(backend, shape):
    """Forward, and the gradients of the values, of a graph in another order, with self loops and without an edge."""
    q, k, v = sides()
    given = shuffled(MORE)
    values = rand(*SHAPES[shape], given.shape[1])
    graph = from_edge_index(shuffled(MORE)[:, 1:], N) | Identity()
    found = []
    for make, name in (
        (lambda values: EdgeBias.of(given, values, self_loops=0.25), backend),
        (lambda values: dense(given, values, N, N) + 0.25 * torch.eye(N, dtype=torch.float64), "reference"),
    ):
        learned = values.clone().requires_grad_()
        out = attend(q, k, v, graph, bias=make(learned), backend=name)
        found.append((out, *torch.autograd.grad(out.square().sum(), learned)))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
def test_on_every_graph(case):
    """All graphs of the library: bipartite ones, those of each head, those that no query hears."""
    heads = case.graph.heads or H
    q, k, v = sides(case.n, case.m, heads=heads)
    edges = shuffled(case.graph.edge_index(case.n, case.m))
    values = rand(heads, edges.shape[1])
    out = attend(q, k, v, case.graph, bias=EdgeBias.of(edges, values))
    right = attend(q, k, v, case.graph, bias=dense(edges, values, case.n, case.m), backend="reference")
    torch.testing.assert_close(out, right)


def test_the_order_of_edges_is_of_no_account():
    q, k, v = sides()
    values, order = rand(MORE.shape[1]), torch.randperm(MORE.shape[1], generator=CHANCE)
    graph = from_edge_index(MORE, N)
    found = attend(q, k, v, graph, bias=EdgeBias.of(MORE, values))
    assert torch.equal(found, attend(q, k, v, graph, bias=EdgeBias.of(MORE[:, order], values[order])))
    turned = from_edge_index(MORE[:, order], N)
    assert torch.equal(found, attend(q, k, v, turned, bias=EdgeBias.of(turned, values[order])))
    assert torch.equal(found, attend(q, k, v, turned, bias=EdgeBias.sorted(values[graph.order])))
    assert torch.equal(found, attend(q, k, v, plan(turned, heads=H, bias="edge"), bias=EdgeBias.of(MORE, values)))


def test_renamed_nodes_have_the_same_results():
    q, k, v = sides()
    values, name = rand(H, MORE.shape[1]), torch.randperm(N, generator=CHANCE)
    found = attend(q, k, v, from_edge_index(MORE, N), bias=EdgeBias.of(MORE, values))
    q2, k2, v2 = (torch.empty_like(side).index_copy(2, name, side) for side in (q, k, v))
    renamed = attend(q2, k2, v2, from_edge_index(name[MORE], N), bias=EdgeBias.of(name[MORE], values))
    torch.testing.assert_close(renamed[:, :, name], found)


def test_a_batch_of_graphs_and_keys_beside_each_other():
    q, k, v = sides()
    ahead = torch.tensor([[3, 0, 1], [2, 1, 0]])
    behind = torch.tensor([[1, 4], [4, 2]])
    values = rand(5)
    graph = Disjoint([from_edge_index(ahead, 4), from_edge_index(behind, 5)])
    packed = torch.cat([ahead, behind + 4], dim=1)
    bias = dense(packed, values, N, N)
    right = attend(q, k, v, graph, bias=bias, backend="reference")
    torch.testing.assert_close(attend(q, k, v, graph, bias=EdgeBias.of(packed, values)), right)

    q, k, v = sides(4, 6)
    edges = torch.tensor([[5, 1, 2, 0], [3, 0, 0, 2]])  # keys: two of a memory, then four
    graph = Beside(Full().sized(4, 2), Window(1, 1)) & EdgeList(edges, (4, 6))
    values = rand(H, 4)
    right = attend(q, k, v, graph, bias=dense(edges, values, 4, 6), backend="reference")
    torch.testing.assert_close(attend(q, k, v, graph, bias=EdgeBias.of(edges, values)), right)


def test_heads_with_graphs_of_their_own():
    q, k, v = sides()
    graph = PerHead([from_edge_index(RING, N), from_edge_index(MORE, N)])
    values = rand(H, MORE.shape[1])
    right = attend(q, k, v, graph, bias=dense(MORE, values, N, N), backend="reference")
    torch.testing.assert_close(attend(q, k, v, graph, bias=EdgeBias.of(MORE, values)), right)


def test_what_has_no_value_is_filled():
    q, k, v = sides()
    graph, values = Causal(), rand(MORE.shape[1])
    loops, rest = torch.tensor([1.0, -2.0]).requires_grad_(), torch.tensor(0.5).requires_grad_()
    bias = dense(MORE, values, N, N, other=torch.nan)
    bias = torch.where(torch.eye(N, dtype=torch.bool) & bias.isnan(), loops[:, None, None].double(), bias)
    right = attend(q, k, v, graph, bias=torch.where(bias.isnan(), rest, bias), backend="reference")
    found = attend(q, k, v, graph, bias=EdgeBias.of(MORE, values, self_loops=loops, fill=rest))
    torch.testing.assert_close(found, right)
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), (loops, rest)) for out in (found, right)), strict=True):
        torch.testing.assert_close(ours, theirs)
    alone = attend(q, k, v, graph, bias=EdgeBias.of(MORE, values, fill=-torch.inf))
    torch.testing.assert_close(alone, attend(q, k, v, graph & from_edge_index(MORE, N), bias=EdgeBias.of(MORE, values)))


@pytest.mark.parametrize(
    ("make", "graph", "message"),
    [
        (lambda: EdgeBias.of(RING, torch.zeros(N)), from_edge_index(MORE, N), "none for 4 of 13, first for key 5"),
        (lambda: EdgeBias.of(RING, torch.zeros(N)), from_edge_index(RING, N) | Identity(), r"self_loops=0\.0"),
        (lambda: EdgeBias.of(RING, torch.zeros(N), self_loops=0.0), from_edge_index(MORE, N), r"fill=0\.0"),
        (lambda: EdgeBias.of([[1, 2], [0, 1]], torch.zeros(2), fill=0.0), Causal(), "none of those given is"),
        (lambda: EdgeBias.of([[N], [0]], torch.zeros(1), fill=0.0), Causal(), "key nodes are below 9 .got 9"),
        (lambda: EdgeBias.of([[1, 1], [2, 2]], torch.zeros(2)), Causal(), "each given once .got 2 columns for 1"),
        (lambda: EdgeBias.of(RING, torch.zeros(N, 2)), Causal(), r"got shape \(9, 2\)\): values.T"),
        (lambda: EdgeBias.of(RING, torch.zeros(N - 1)), Causal(), "E = 9 edges that are given"),
    ],
)
def test_an_edge_without_a_value_is_an_error(make, graph, message):
    q, k, v = (side.float() for side in sides())
    for _ in range(2):  # also when it is looked up
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, graph, bias=make())


def test_whose_values_they_are_has_to_be_said():
    with pytest.raises(TypeError, match=r"EdgeBias.of\(edge_index, values\), or EdgeBias.sorted"):
        EdgeBias(torch.zeros(3))


def test_a_training_step_sorts_nothing(monkeypatch):
    cache.clear()
    q, k, v = sides()
    graph, values = from_edge_index(MORE, N) | Identity(), rand(MORE.shape[1])
    right = attend(q, k, v, graph, bias=EdgeBias.of(MORE, values, self_loops=0.0))

    def again(*_):
        raise AssertionError("sorted twice")

    monkeypatch.setattr(columns, "_columns", again)
    monkeypatch.setattr(torch, "unique", again)
    assert torch.equal(attend(q, k, v, graph, bias=EdgeBias.of(MORE, values, self_loops=0.0)), right)


def test_second_derivatives_and_transforms():
    q, k, v = sides(batch=1)
    graph = from_edge_index(MORE, N) | Identity()

    def out(values):
        return attend(q, k, v, graph, bias=EdgeBias.of(MORE, values, self_loops=0.0))

    values = rand(MORE.shape[1]).requires_grad_()
    assert torch.autograd.gradgradcheck(out, values, fast_mode=True)
    several = rand(3, MORE.shape[1])
    torch.testing.assert_close(torch.vmap(out)(several), torch.stack([out(each) for each in several]))


def test_in_a_compiled_program():
    """One program for graphs and values of one size; fills and errors as outside of it."""
    torch._dynamo.reset()
    q, k, v = sides()

    def step(values, bias_of, graph):
        return attend(q, k, v, graph, bias=EdgeBias.of(bias_of, values, self_loops=0.5))

    program = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        given = from_edge_index(MORE[:, torch.randperm(MORE.shape[1], generator=CHANCE)], N)
        graph = from_edge_index((MORE + seed) % N, N) | Identity()
        graph = given | Identity() if seed < 2 else graph & given | Identity()
        values = rand(H, MORE.shape[1]).requires_grad_()
        found, right = program(values, given, graph), step(values, given, graph)
        torch.testing.assert_close(found, right)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), values)[0] for out in (found, right)))
    with pytest.raises(ValueError, match=r"fill=0\.0"):
        program(values, given, Causal() | given)


# --------------------------------------------------------------------------------------------------- in models

CONFIG = TransformerConfig(embed_dim=16, num_layers=2, num_heads=H, position="none", init="gpt2")


def model_of(graph=Full()):  # noqa: B008
    torch.manual_seed(0)
    return Transformer(CONFIG, graph).double()


def test_a_model_takes_edge_values_of_all_layers_or_of_each():
    graph, x, values = from_edge_index(MORE, N) | Identity(), rand(2, N, 16), rand(2, H, MORE.shape[1])
    model, as_tensor = model_of(graph), dense(MORE, values, N, N)
    each = [EdgeBias.of(MORE, of_layer, self_loops=0.0) for of_layer in values]
    torch.testing.assert_close(model(x, bias=each[0]), model(x, bias=as_tensor[0]))
    torch.testing.assert_close(model(x, bias=each), model(x, bias=list(as_tensor)))
    torch.testing.assert_close(model(x, bias=[None, each[1]]), model(x, bias=[0 * as_tensor[0], as_tensor[1]]))
    assert not torch.allclose(model(x, bias=each), model(x))
    with pytest.raises(ValueError, match=r"one for each of 2 .got 1"):
        model(x, bias=each[:1])
    with pytest.raises(ValueError, match="position='alibi' is a bias itself"):
        Transformer(replace(CONFIG, position="alibi"), graph)(x.float(), bias=each)


def test_edge_features_are_learned():
    """A linear map of them is a bias of each head; its gradient is that of a dense bias."""
    x, features = rand(1, N, 16), rand(MORE.shape[1], 5)
    model, encode = model_of(from_edge_index(MORE, N)), nn.Linear(5, H).double()
    found = []
    for make in (lambda values: EdgeBias.of(MORE, values), lambda values: dense(MORE, values, N, N)):
        out = model(x, bias=make(encode(features).T))
        found.append(torch.autograd.grad(out.square().sum(), encode.weight)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


def test_every_model_takes_them():
    graph = from_edge_index(MORE, N) | Identity()
    bias, other = (EdgeBias.of(MORE, torch.randn(MORE.shape[1]), self_loops=0.0) for _ in range(2))
    tokens, images = torch.randint(11, (2, N)), torch.randn(2, 1, 4, 4)
    config = replace(CONFIG, init="gpt2")
    cross = replace(config, cross=True)
    states = torch.randn(2, N // 3, 3)
    translator = EncoderDecoder(config, cross, 11, encoder_graph=graph, decoder_graph=graph)
    for of_bias in (
        lambda **given: GPT(config, 11, graph)(tokens, **given),
        lambda **given: Encoder(config, 11, graph)(tokens, **given),
        lambda **given: ViT(config, 3, image_size=4, patch_size=(2, 1), channels=1)(images, graph, **given),
        lambda **given: translator(tokens, tokens, **given),
        lambda **given: translator(tokens, tokens, **{f"decoder_{name}": each for name, each in given.items()}),
        lambda **given: DecisionTransformer(config, state_dim=3, action_dim=2, max_time=9, graph=graph)(
            states, states[..., :2], states[..., :1], torch.arange(3).expand(2, 3), **given
        ),
    ):
        found = []
        for given in (bias, bias, other):
            torch.manual_seed(1)
            found.append(of_bias(bias=given))
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[2], atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_the_nodes_of_a_bias(side):
    graph, x, values = Causal() & Window(4, 0), rand(2, N, 16), rand(H, 45)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, slice(0, 3) if side == "left" else slice(N - 3, N)] = False
    edges = Causal().edge_index(N, N)
    model = model_of(graph)
    real = torch.arange(N)[mask[1]]
    part = dense(edges, values, N, N)[:, real][:, :, real]
    out = model(x, bias=EdgeBias.of(edges, values), attention_mask=mask)
    torch.testing.assert_close(out[1:, real], model(x[1:, real], bias=part))


@pytest.mark.parametrize("each_layer", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_models_with_edge_values_compile(compiler, each_layer):
    """Layers whose look-ups are alike: Inductor must not take one for the other."""
    torch._dynamo.reset()
    model, x = model_of(from_edge_index(MORE, N) | Identity()), rand(2, N, 16)
    program = torch.compile(model, backend=compiler, fullgraph=True)
    for _ in range(2):
        values = rand(H, MORE.shape[1]).requires_grad_()
        found, right = (
            run(x, bias=[EdgeBias.of(MORE, values, self_loops=0.0), EdgeBias.of(MORE, 2 * values, self_loops=0.0)])
            if each_layer
            else run(x, bias=EdgeBias.of(MORE, values, self_loops=0.0))
            for run in (program, model)
        )
        torch.testing.assert_close(found, right)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), values)[0] for out in (found, right)))
