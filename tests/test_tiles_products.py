"""Scores of edges by tiles on a CPU equal those made edge by edge, in every gradient too; and so does `attend`."""

import pytest
import torch
from irregular import learned, some_mask

from attngraph import (
    Alibi,
    Causal,
    EdgeList,
    Empty,
    Full,
    Prefix,
    Random,
    SoftCap,
    Window,
    attend,
)
from attngraph.graph.base import at_size
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

pytest.importorskip("numba")
from attngraph.kernels.cpu import products as by_edges
from attngraph.kernels.cpu import tiles_products as by_tiles

GRAPHS = [
    (Causal() & (Window(70, 0) | Prefix(4)), 200, 200),
    (Window(20, 30) | Random(3), 130, 200),
    (EdgeList(some_mask(150, 100).nonzero().flip(1).T, (150, 100)), 150, 100),
    (Full(), 70, 140),
    (Full(), 1, 1),
    (Empty(), 70, 70),
]
HEADS = [(1, 2, 2), (2, 4, 2), (1, 4, 1)]  # B, H, Hkv
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
every_graph = pytest.mark.parametrize(("graph", "n", "m"), GRAPHS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def tensors(n, m, heads=(2, 4, 2), dim=16, dtype=torch.float64):
    """q and k."""
    B, H, Hkv = heads
    return [learned(B, H, n, dim, dtype=dtype).detach(), learned(B, Hkv, m, dim, seed=2, dtype=dtype).detach()]


def layout_of(graph, n, m):
    return Tiles(n, m, tabulate(at_size(graph, n, m)[0], n, m, (64, 64)))


def results(graph, q, k):
    """The products, dq and dk."""
    layout = layout_of(graph, q.shape[2], k.shape[2])
    found = by_tiles.products(q, k, layout, 0.4)
    return [found, *by_tiles.products_backward(learned(*found.shape, seed=7), q, k, layout, 0.4)]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        atol = float(other.abs().max()) * TOLERANCES[one.dtype] if other.numel() else 0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=atol)


@every_graph
@every_dtype
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_products_equal_those_edge_by_edge_in_every_gradient(graph, n, m, heads, dtype):
    q, k = tensors(n, m, heads, dtype=dtype)
    mask = graph.mask(n, m)
    rows = CSR.from_edges(*mask.nonzero().unbind(1), n, m)
    expected = by_edges.products(q, k, None, rows, 0.4, "", 0.0)
    gradients = by_edges.products_backward(learned(*expected.shape, seed=7), q, k, None, rows, 0.4, "", 0.0)
    assert_close(results(graph, q, k), [expected, *gradients[:2]])


@every_graph
@every_dtype
@pytest.mark.parametrize("dim", [1, 5, 33, 80])
def test_any_dimension_equals_the_sums_written_out(graph, n, m, dim, dtype):
    q, k = (side.requires_grad_() for side in tensors(n, m, dim=dim))
    query, key = graph.mask(n, m).nonzero().unbind(1)
    expected = 0.4 * (q[:, :, query] * k.repeat_interleave(2, 1)[:, :, key]).sum(-1)
    gradients = torch.autograd.grad((expected * learned(*expected.shape, seed=7).detach()).sum(), (q, k))
    found = results(graph, q.detach().to(dtype), k.detach().to(dtype))
    assert_close(found, [expected.detach(), *gradients])


@every_graph
@every_dtype
def test_weights_by_a_known_lse_are_the_exponents(graph, n, m, dtype):
    q, k = tensors(n, m, dtype=dtype)
    query, layout = graph.mask(n, m).nonzero()[:, 0], layout_of(graph, n, m)
    scores = by_tiles.products(q, k, layout, 0.5)
    lse = torch.zeros(*q.shape[:3], dtype=dtype)
    lse = lse.scatter_reduce(2, query.expand_as(scores), scores, "amax") + 0.1
    expected = (scores - lse[:, :, query]).exp()
    assert_close([by_tiles.products(q, k, layout, 0.5, lse)], [expected])


@every_dtype
def test_any_number_of_threads_gives_the_same_bits(dtype):
    q, k = tensors(600, 600, dtype=dtype)
    runs = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        runs.append(results(Causal() & (Window(100, 0) | Prefix(4)), q, k))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


GRAPH, NODES = Causal() & (Window(150, 0) | Prefix(4)), 1000
SILU = {"normalize": torch.nn.functional.silu}
WEIGHTS = {"return_weights": True, "backend": "tiles"}
CALLS = {
    "weights by a function": SILU,
    "the same, returned": SILU | {"return_weights": True},
    "the same of a soft cap": SILU | {"score": SoftCap(2.0)},
    "weights": WEIGHTS,
    "weights and lse": WEIGHTS | {"return_lse": True},
    "weights and padding": WEIGHTS | {"attention_mask": torch.tensor([NODES, NODES // 3])},
    "weights and sinks": WEIGHTS | {"sinks": torch.zeros(4, dtype=torch.float64)},
    "weights and a bias": WEIGHTS | {"bias": Alibi.geometric(4)},
    "weights after a soft cap": WEIGHTS | {"score": SoftCap(2.0)},
    "their entropy": WEIGHTS | {"reduce": "entropy"},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_attend_by_scores_of_tiles_equals_the_edges_in_every_gradient(options, monkeypatch):
    sides = [*tensors(NODES, NODES, dim=8), learned(2, 2, NODES, 8, seed=3).detach()]
    sides, made, kernel = [side.requires_grad_() for side in sides], [], by_tiles.products

    def noted(*given):
        made.append(given)
        return kernel(*given)

    monkeypatch.setattr(by_tiles, "products", noted)
    runs = []
    for name in (options.get("backend", "auto"), "edges"):
        found = attend(*sides, GRAPH, **(options | {"backend": name}))
        assert made
        found = (found,) if isinstance(found, torch.Tensor) else found
        total = sum((part * learned(*part.shape, seed=7).detach()).sum() for part in found)
        runs.append([*found, *torch.autograd.grad(total, sides)])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_gradients_of_gradients_of_weights_equal_the_edges():
    sides = [side.requires_grad_() for side in (*tensors(100, 100, dim=4), learned(2, 2, 100, 4, seed=3).detach())]
    runs = []
    for name in ("tiles", "edges"):
        out, weights = attend(*sides, Window(9, 0), return_weights=True, backend=name)
        gradients = torch.autograd.grad(out.sum() + weights.square().sum(), sides, create_graph=True)
        runs.append(torch.autograd.grad(sum(part.square().sum() for part in gradients), sides))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
