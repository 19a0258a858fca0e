"""On a GPU: every option of attend, layers, models and many ranks give what they give in float64 on a CPU."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.testing import assert_close

from attngraph import (
    Additive,
    Alibi,
    Causal,
    Documents,
    EdgeFeatures,
    Full,
    LeakyReLU,
    Prefix,
    Random,
    SoftCap,
    Window,
    attend,
    from_edge_index,
    from_neighbors,
    generate,
)
from attngraph.distributed import distribute
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

N, HEADS, DIM = 300, 4, 32
GRAPHS = [Window(40, 0) | Prefix(4), Causal(), Full(), Window(10, 10) | Random(5)]
OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.3},
    "sigmoid": {"normalize": "sigmoid"},
    "squared ReLU": {"normalize": "squared_relu"},
    "soft cap": {"score": SoftCap(2.0)},
    "leaky ReLU": {"score": LeakyReLU()},
    "sinks": {"sinks": torch.linspace(-1, 1, HEADS)},
    "ALiBi": {"bias": Alibi.geometric(HEADS)},
    "padding": {"attention_mask": torch.arange(N) < torch.tensor([[N], [N - 50]])},
    "everything": {
        "dropout_p": 0.2,
        "score": SoftCap(3.0),
        "bias": Alibi.geometric(HEADS),
        "attention_mask": torch.arange(N) < torch.tensor([[N], [N - 50]]),
    },
}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(graph, options, device, dtype, backend, rounded=torch.float32):
    sides = [randn(2, HEADS, N, DIM, dtype=rounded, seed=seed).to(device, dtype).requires_grad_() for seed in range(3)]
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if isinstance(options.get("bias"), Alibi):
        options["bias"] = Alibi(options["bias"].slopes.to(device, dtype))
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(dtype)
    if "dropout_p" in options:
        options["generator"] = torch.Generator(device).manual_seed(5)
    out = attend(*sides, graph, backend=backend, **options)
    grads = torch.autograd.grad(out, sides, randn(*out.shape, dtype=rounded, seed=3).to(out))
    return [each.detach().double().cpu() for each in (out, *grads)]


def close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "tiles", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_option(graph, options, backend, dtype):
    device = DEVICE if "dropout_p" in OPTIONS[options] else "cpu"  # generators of two devices draw other seeds
    expected = results(graph, OPTIONS[options], device, torch.float64, "edges", dtype)
    found = results(graph, OPTIONS[options], DEVICE, dtype, backend, dtype)
    close(found, expected, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:score=a function")
def test_functions_and_additive_scores():
    for score in (Additive(torch.linspace(-1, 1, DIM)), lambda q_i, k_j: (q_i - k_j).square().sum(-1)):
        found = []
        for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
            placed = Additive(score.weight.to(device, dtype)) if isinstance(score, Additive) else score
            found.append(results(GRAPHS[0], {"score": placed, "scale": 0.1}, device, dtype, "auto"))
        close(*reversed(found), 1e-4)


def test_features_of_edges():
    edge_index = torch.randint(N, (2, 2000), generator=torch.Generator().manual_seed(0)).unique(dim=1)
    found = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        there = edge_index.to(device)
        values, keys, of_values = (
            randn(*shape, seed=seed).to(device, dtype).requires_grad_()
            for seed, shape in enumerate([(edge_index.shape[1], 8), (HEADS, DIM, 8), (HEADS, DIM, 8)])
        )
        q, k, v = (randn(1, HEADS, N, DIM, seed=seed).to(device, dtype).requires_grad_() for seed in range(3))
        features = EdgeFeatures.of(there, values, to_key=keys, to_value=of_values)
        out = attend(q, k, v, from_edge_index(there, N), edge_features=features)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, values, keys, of_values))
        found.append([each.detach().double().cpu() for each in (out, *grads)])
    close(found[1], found[0], 1e-4)


def test_a_graph_for_each_entry_and_neighbours():
    neighbors = torch.randint(N, (2, N, 9), generator=torch.Generator().manual_seed(0))
    close(
        results(from_neighbors(neighbors.to(DEVICE), N), {}, DEVICE, torch.float32, "auto"),
        results(from_neighbors(neighbors, N), {}, "cpu", torch.float64, "edges"),
        1e-5,
    )


def model_of(graphs, **options):
    torch.manual_seed(0)
    config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="rotary", max_length=128, **options)
    return GPT(config, 65, graphs).eval()


GRAPHS_OF_LAYERS = [Causal(), Causal() & (Window(8, 0) | Prefix(2))]


def test_a_model_learns_in_bfloat16_compiled_and_padded():
    model, tokens = model_of(GRAPHS_OF_LAYERS), torch.randint(65, (3, 65))
    mask = torch.arange(64) < torch.tensor([[64], [40], [17]])
    found = []
    for device in ("cpu", DEVICE):
        model = model.to(device)
        run = torch.compile(model, fullgraph=True) if device != "cpu" else model
        there = tokens.to(device)
        logits = run(there[:, :-1], attention_mask=mask.to(device))
        loss = nn.functional.cross_entropy(logits[mask.to(device)], there[:, 1:][mask.to(device)])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss.detach().cpu().double(), *(grad.cpu().double() for grad in grads)])
    close(found[1], found[0], 1e-4)


def test_a_cache_continues_as_the_whole_text_would():
    model, prompt = model_of(GRAPHS_OF_LAYERS).to(DEVICE), torch.randint(65, (2, 20), device=DEVICE)
    whole = generate(model, prompt, 30, temperature=0, use_cache=False)
    assert torch.equal(generate(model, prompt, 30, temperature=0), whole)


def test_dropout_and_packed_documents_in_a_model():
    model = model_of(Causal() & Documents([30, 34]), dropout=0.1).to(DEVICE).train()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(torch.randint(65, (2, 64), device=DEVICE)).float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv", "TransformerConv"])
def test_layers_of_pyg(name):
    layers = pytest.importorskip("torch_geometric.nn")
    from attngraph.pyg import accelerate

    layer = getattr(layers, name)(16, 8, heads=4, edge_dim=5)
    edge_index = torch.randint(N, (2, 2000), generator=torch.Generator().manual_seed(0))
    x, features = randn(N, 16), randn(2000, 5, seed=1)
    expected = layer.double()(x.double(), edge_index, features.double())
    accelerate(layer.float().to(DEVICE))
    out = layer(x.to(DEVICE), edge_index.to(DEVICE), features.to(DEVICE))
    out.sum().backward()
    close([out.detach().double().cpu()], [expected.detach()], 1e-5)


def rank_of(rank, count, port, backend):
    """One rank of a plan is what one process makes of it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group(backend, rank=rank, world_size=count)
    mesh = DeviceMesh.from_group(dist.group.WORLD, DEVICE)
    for graph in (Causal() & (Window(50, 0) | Prefix(3)), Causal(), Random(6) | Window(3, 3)):
        plan = distribute(graph, N, mesh)
        found, expected = [], []
        for into, run in ((expected, lambda x: x), (found, plan.scatter)):
            sides = [run(randn(2, HEADS, N, DIM, seed=seed).to(DEVICE)).detach().requires_grad_() for seed in range(3)]
            out = attend(*sides, plan if into is found else graph)
            grads = torch.autograd.grad(out, sides, run(randn(2, HEADS, N, DIM, seed=3).to(DEVICE)))
            into.extend(each.detach().double().cpu() for each in (out, *grads))
        close([plan.gather(each.to(DEVICE)).cpu() for each in found], expected, 1e-5)
    dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "count"), [("nccl", 1), ("gloo", 2)])
def test_ranks(backend, count):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    torch.multiprocessing.spawn(rank_of, (count, port, backend), nprocs=count)
