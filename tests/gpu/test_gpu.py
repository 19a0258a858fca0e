"""On a GPU: layouts, kernels and plans equal the reference there too."""

import pytest
import torch
from torch.testing import assert_close

from attngraph import (
    Alibi,
    BlockTopK,
    Causal,
    Documents,
    EdgeBias,
    Full,
    Global,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    RelativeBias,
    TopK,
    Window,
    attend,
    from_edge_index,
    knn_graph,
    plan,
    radius_graph,
)
from attngraph.graph.base import at_size
from attngraph.planning.layouts import csr as rows
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GRAPHS = [
    Window(100, 0),
    Causal() & (Window(64, 0) | Prefix(4)),
    Window(30, 30) | Global([0, 7]) | Random(3),
    Neighborhood((20, 20), 3),
    Documents([100, 250, 50]),
    Causal(),
    Full(),
    Causal() | Random(2),
]
N = 400


def tensors(dtype, n=N, heads=(2, 4, 2), dim=64, dim_v=64):
    B, H, Hkv = heads
    chance = torch.Generator("cuda").manual_seed(0)
    shapes = (B, H, n, dim), (B, Hkv, n, dim), (B, Hkv, n, dim_v)
    return [torch.randn(shape, generator=chance, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def results(sides, graph, backend="auto", **options):
    """out, lse and the gradients of q, k, v, all from fixed gradients of out and lse."""
    out, lse = attend(*sides, graph, return_lse=True, backend=backend, **options)
    chance = torch.Generator("cuda").manual_seed(1)
    up, up_lse = (torch.randn(side.shape, generator=chance, device="cuda") for side in (out, lse))
    loss = (out * up.to(out.dtype)).sum() + (lse.masked_fill(lse == -torch.inf, 0) * up_lse.to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, sides)]


def close(found, wanted, tolerance):
    for part, right in zip(found, wanted, strict=True):
        assert_close(part.double(), right.double(), rtol=0, atol=tolerance * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("tile", [(128, 64), (64, 64)])
def test_layouts_are_the_same_as_on_a_cpu(graph, tile):
    bound, n, m = at_size(graph, N, N)
    here = tabulate(bound, n, m, tile)
    with torch.device("cuda"):
        there = tabulate(bound, n, m, tile)
    assert there.row.is_cuda
    assert torch.equal(Tiles(n, m, here).mask(), Tiles(n, m, there).on(torch.device("cpu")).mask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "tiles", "rows"])
def test_plans_equal_the_reference(graph, dtype, backend):
    sides = tensors(dtype)
    wanted = results([side.detach().double().requires_grad_() for side in sides], graph, "edges")
    close(results(sides, graph, backend), wanted, 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (80, 80), (128, 128), (256, 256), (200, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["tiles", "rows"])
def test_every_dimension(dims, dtype, backend):
    sides = tensors(dtype, dim=dims[0], dim_v=dims[1])
    wanted = results([side.detach().double().requires_grad_() for side in sides], GRAPHS[1], "edges")
    close(results(sides, GRAPHS[1], backend), wanted, 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["tiles", "rows"])
@pytest.mark.parametrize("kind", ["alibi", "relative", "edge", "dense", "keys"])
def test_every_bias_and_its_gradient(kind, backend):
    graph, chance = Window(100, 20) | Prefix(4), torch.Generator("cuda").manual_seed(2)
    shape = {"relative": (4, 32), "edge": (4, graph.num_edges(N, N)), "dense": (4, N, N), "keys": (4, 1, N)}.get(kind)
    found = []
    for dtype, own in ((torch.float64, "edges"), (torch.float32, backend)):
        chance.manual_seed(2)
        values = torch.randn(shape or (1,), generator=chance, device="cuda").to(dtype).requires_grad_()
        makers = {
            "alibi": lambda values: Alibi(Alibi.geometric(4).slopes.to(values)),
            "relative": lambda values: RelativeBias(values, max_distance=64),
            "edge": EdgeBias.sorted,
        }
        bias = makers.get(kind, lambda values: values)(values)
        sides = [side.detach().to(dtype).requires_grad_() for side in tensors(torch.float32)]
        out = attend(*sides, graph, bias=bias, backend=own)
        wanted = sides if kind == "alibi" else [*sides, values]
        found.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    close(found[1], found[0], 1e-5)


def test_heads_with_graphs_of_their_own():
    graph = PerHead([Window(40, 0), Causal(), Window(9, 9) | Prefix(2), Window(40, 0)])
    sides = tensors(torch.float32)
    wanted = results([side.detach().double().requires_grad_() for side in sides], graph, "edges")
    close(results(sides, graph), wanted, 4e-6)


@pytest.mark.parametrize("backend", ["tiles", "rows"])
def test_two_runs_give_the_same_bits(backend):
    sides = tensors(torch.bfloat16)
    runs = [results(sides, GRAPHS[2], backend) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_it_compiles():
    sides = tensors(torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, GRAPHS[1]).square().sum(), fullgraph=True)
    wanted = torch.autograd.grad(attend(*sides, GRAPHS[1]).square().sum(), sides)
    close(torch.autograd.grad(compiled(*sides), sides), wanted, 2e-2)


def test_sizes_beyond_32_bits():
    """Of 40 million nodes, some rows, in one call whose tensors have 2.6 billion numbers each."""
    n, graph = 40_000_000, Window(64, 0)
    q, k, v = (torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = attend(q, k, v, graph, backend="tiles")
    for i in (0, 63, 1_000_003, n // 2, n - 1):
        few = slice(max(0, i - 64), i + 1)
        right = attend(q[:, :, i : i + 1], k[:, :, few], v[:, :, few], Full(), backend="dense")
        assert_close(out[:, :, i : i + 1], right, rtol=0, atol=0.03)


def test_an_edge_list_on_the_device():
    edge_index = torch.randint(N, (2, 3000), device="cuda")
    sides = tensors(torch.float32)
    graph = from_edge_index(edge_index, N)
    wanted = results([side.detach().double().requires_grad_() for side in sides], graph, "edges")
    for backend in ("auto", "tiles", "rows"):
        close(results(sides, graph, backend), wanted, 4e-6)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_rows_are_the_same_as_on_a_cpu(graph, monkeypatch):
    monkeypatch.setitem(rows.HEAVY_DEGREE, "cpu", rows.HEAVY_DEGREE["cuda"])
    here = CSR.from_graph(*at_size(graph, N, N))
    with torch.device("cuda"):
        there = CSR.from_graph(*at_size(graph, N, N))
    for name in ("by_query", "by_key", "numbered"):
        for one, other in zip(getattr(here, name)[:-1], getattr(there, name)[:-1], strict=True):
            assert other.is_cuda
            assert torch.equal(one, other.cpu())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_tensor_on_the_device_is_remembered_until_it_changes(dtype):
    edge_index = torch.randint(N, (2, 3000), device="cuda", dtype=dtype)
    graph = from_edge_index(edge_index, N)
    assert from_edge_index(edge_index, N) is graph
    edge_index[0, 0] = (edge_index[0, 0] + 1) % N
    assert from_edge_index(edge_index, N) is not graph


@pytest.mark.parametrize("graph", [Full(), Causal()], ids=str)
@pytest.mark.parametrize("dim", [64, 256])
def test_the_lse_of_all_pairs_and_its_gradient(graph, dim):
    sides = tensors(torch.bfloat16, dim=dim, dim_v=dim)
    wanted = results([side.detach().double().requires_grad_() for side in sides], graph, "edges")
    close(results(sides, graph), wanted, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_sizes_that_are_no_multiple_of_8(dtype):
    graph, sides = Neighborhood((15, 15), 2), tensors(dtype, 225)
    wanted = results([side.detach().double().requires_grad_() for side in sides], graph, "edges")
    for backend in ("auto", "dense", "tiles", "rows"):
        made = plan(graph, 225, 225, heads=4, device="cuda", backend=backend)
        close(results(sides, made), wanted, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_rows_of_hubs_in_double_precision():
    """A query that hears all, and a key that all hear, are cut into pieces."""
    n = 3000
    graph = Prefix(1) | Random(2) | from_edge_index(torch.stack([torch.arange(n), torch.zeros(n).long()]), n)
    sides = tensors(torch.float64, n, (1, 2, 1), 16, 16)
    close(results(sides, graph, "rows"), results(sides, graph, "edges"), 1e-12)


def test_packed_documents():
    graph, sides = Causal() & Documents([100, 150, 100, 50]), tensors(torch.bfloat16)
    wanted = results([side.detach().double().requires_grad_() for side in sides], graph, "edges")
    made = plan(graph, N, N, heads=4, device="cuda", backend="dense")
    assert made.parts[0].layout.lengths
    close(results(sides, made), wanted, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("shape", [(500, 3), (4, 300, 40), (2, 64, 2)])
def test_points_hear_those_that_they_hear_on_a_cpu(shape):
    x = torch.randn(shape).round(decimals=1)
    for make in (lambda x: knn_graph(x, 7), lambda x: radius_graph(x, 1.0, loop=True, max_num_neighbors=5)):
        found = make(x.cuda())
        assert found.code.is_cuda
        assert found == make(x)


@pytest.mark.parametrize("graph", [TopK(7) & Causal(), BlockTopK(128, 3, 128), BlockTopK(64, 3)], ids=str)
def test_what_queries_and_keys_choose(graph):
    q, k, v = (torch.randn(2, 2, 700, 32).cuda().requires_grad_() for _ in range(3))
    resolved = graph.resolve(q.detach().cpu(), k.detach().cpu())  # numbers that differ by rounding may choose otherwise
    out = attend(q, k, v, graph)
    expected = attend(*(side.detach().cpu().double() for side in (q, k, v)), resolved)
    assert ((out.cpu().double() - expected).abs().amax(-1) < 1e-3).float().mean() > 0.99
    out.sum().backward()


def test_a_plan_says_what_runs():
    made = plan(Window(256, 0), 4096, 4096, heads=8, device="cuda")
    assert [part.backend.name for part in made.parts] == ["tiles"]
    assert "tiles" in made.explain()
