"""Graphs of points: nearest neighbours and balls, against a sort of all distances."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attngraph import Batched, EdgeList, attend, from_dense, knn_graph, radius_graph
from attngraph.interop import points
from attngraph.measuring import cost

WAYS = ["tree", "products"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """What finds candidates."""
    monkeypatch.setattr(points, "_tree_is_faster", lambda of: request.param == "tree" and of.keys.shape[2] > 0)
    return request.param


def distances(queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """All of them, (N, M), by x - y in float64."""
    q, k = (each.double().numpy() for each in (queries, keys))
    return np.sqrt(((q[:, None] - k[None]) ** 2).sum(-1))


def nearest(x, k, *, loop=False, queries=None, r=np.inf) -> EdgeList:
    """The same by sorting each row of distances; of equal ones, the smaller number comes first."""
    far = distances(x if queries is None else queries, x)
    allowed = far <= r
    if queries is None and not loop:
        np.fill_diagonal(allowed, False)
    order = np.argsort(np.where(allowed, far, np.inf), axis=1, kind="stable")[:, :k]
    mask = np.zeros(far.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=1)
    return from_dense(torch.from_numpy(mask & allowed))


def cloud(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("k", [1, 5, 200])
def test_the_nearest_are_those_of_a_sort(way, dim, loop, k):
    x = cloud(90, dim)
    assert knn_graph(x, k, loop=loop) == nearest(x, k, loop=loop)


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("most", [None, 1, 4])
@pytest.mark.parametrize("r", [0.0, 0.7, 2.0, float("inf")])
def test_a_ball_is_that_of_all_distances(way, dim, loop, most, r):
    x = cloud(90, dim)
    assert radius_graph(x, r, loop=loop, max_num_neighbors=most) == nearest(x, most or 90, loop=loop, r=r)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 3), st.integers(1, 12), st.sampled_from([0, 1, 1.5, 2]), st.booleans(),
    st.sampled_from(WAYS), st.integers(0, 9),
)  # fmt: skip
def test_of_equal_distances_the_smaller_number_wins(n, dim, k, r, loop, way, seed):
    """On a small grid, with many points twice."""
    x = torch.randint(3, (n, dim), generator=torch.Generator().manual_seed(seed)).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "_tree_is_faster", lambda of: way == "tree")
        assert knn_graph(x, k, loop=loop) == nearest(x, k, loop=loop)
        assert radius_graph(x, r, loop=loop) == nearest(x, n, loop=loop, r=r)
        assert radius_graph(x, r, loop=loop, max_num_neighbors=k) == nearest(x, k, loop=loop, r=r)


@pytest.mark.parametrize("count", [300, 3000])
def test_a_block_ends_anywhere(way, count, monkeypatch):
    monkeypatch.setattr(points, "BLOCK", count)
    x = cloud(90, 2).round(decimals=1)
    assert knn_graph(x, 6) == nearest(x, 6)
    assert radius_graph(x, 0.5) == nearest(x, 90, r=0.5)


@pytest.mark.parametrize("offset", [1e4, -3e4])
@pytest.mark.parametrize("dim", [2, 30])
def test_points_far_from_the_origin_have_the_same_neighbours(way, offset, dim):
    near = (cloud(200, dim) * 64).round() / 64  # which float32 holds with an offset too
    assert knn_graph(near + offset, 6) == knn_graph(near, 6) == nearest(near, 6)
    assert radius_graph(near + offset, 1.0) == radius_graph(near, 1.0)


def test_clusters_that_are_far_apart_are_resolved(way):
    """Where products of matrices have no digits left: one cluster fills 1e-9 of the distance to the other."""
    x = torch.cat([cloud(40, 3) * 1e-5, cloud(40, 3) * 1e-5 + 1e5]).double()
    x[40:] += torch.rand(40, 3, dtype=torch.float64) * 1e-5
    assert knn_graph(x, 5) == nearest(x, 5)
    assert radius_graph(x, 1e-5) == nearest(x, 80, r=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_points_of_any_dtype(way, dtype):
    x = (cloud(60, 3) * 10).to(dtype)
    assert knn_graph(x, 4) == nearest(x, 4)
    assert radius_graph(x, 5) == nearest(x, 60, r=5)


@pytest.mark.parametrize(
    "make", [lambda x, **more: knn_graph(x, 4, **more), lambda x, **more: radius_graph(x, 1, **more)]
)
def test_a_batch_is_its_entries(way, make):
    x, queries = torch.stack([cloud(50, 3, seed) for seed in range(3)]), torch.randn(3, 20, 3)
    for more, each in (({}, {}), ({"queries": queries}, {"queries": queries[1]})):
        graph = make(x, **more)
        assert graph.entries == 3
        alone = [make(own, **({"queries": q} if more else {})) for own, q in zip(x, queries, strict=True)]
        assert torch.equal(graph.edge_index(), Batched(alone).edge_index())
        assert make(x[1], **each) == alone[1]
        assert graph.plans == {}  # kept by nobody


@pytest.mark.parametrize("dim", [2, 9])
def test_others_may_ask(way, dim):
    x, queries = cloud(70, dim), cloud(30, dim, 1)
    graph = knn_graph(x, 5, queries=queries)
    assert graph.size == (30, 70)
    assert graph == nearest(x, 5, queries=queries)
    assert radius_graph(x, 1.0, queries=queries) == nearest(x, 70, queries=queries, r=1.0)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 0, 3), (2, 1, 3), (3, 0), (1, 0)])
@pytest.mark.parametrize("loop", [False, True])
def test_few_points_hear_few(way, shape, loop):
    x = torch.zeros(shape)
    n, entries = shape[-2], shape[0] if len(shape) == 3 else 1
    for graph in (knn_graph(x, 3, loop=loop), radius_graph(x, 0.0, loop=loop)):
        assert graph.size == (entries * n, entries * n)
        assert graph.num_edges() == entries * n * max(n - (not loop), 0)
    assert knn_graph(torch.zeros(0, 3), 2, queries=torch.zeros(4, 3)).size == (4, 0)
    assert radius_graph(torch.zeros(0, 3), 2, queries=torch.zeros(4, 3)).num_edges() == 0


def test_it_is_heard_in_a_batch():
    x = torch.randn(2, 30, 3, requires_grad=True)
    q = x.repeat(1, 1, 2)[:, None]
    for graph in (knn_graph(x, 4), radius_graph(x, 1.0, loop=True)):
        out = attend(q, q, q, graph)
        mask = torch.stack([graph.mask()[:30, :30], graph.mask()[30:, 30:]])
        weights = (q @ q.mT * 6**-0.5).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        torch.testing.assert_close(out, weights @ q)
        out.sum().backward()


@pytest.mark.parametrize("dim", [3, 20])
def test_its_memory_is_that_of_the_edges(dim):
    x = torch.randn(20_000, dim) if dim > 3 else torch.rand(20_000, dim) * 6
    knn_graph(x[:2000], 8)
    for make in (lambda: knn_graph(x, 8), lambda: radius_graph(x, 0.3)):
        _, mib = cost(make)
        assert mib is None or mib < 250  # all distances are 3,052


def test_the_ways_are_the_same_for_many_points(monkeypatch):
    x, found = torch.rand(5000, 3), []
    for tree in (True, False):
        monkeypatch.setattr(points, "_tree_is_faster", lambda of, tree=tree: tree)
        found.append((knn_graph(x, 10), radius_graph(x, 0.1)))
    assert found[0] == found[1]


@pytest.mark.skipif(importlib.util.find_spec("torch_cluster") is None, reason="needs torch_cluster")
@pytest.mark.parametrize("loop", [False, True])
def test_it_is_that_of_pyg(loop):
    import torch_cluster

    x = torch.rand(200, 3)
    assert knn_graph(x, 6, loop=loop) == EdgeList(torch_cluster.knn_graph(x, 6, loop=loop), 200)
    theirs = torch_cluster.radius_graph(x, 0.2, loop=loop, max_num_neighbors=200)
    assert radius_graph(x, 0.2, loop=loop) == EdgeList(theirs, 200)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: knn_graph(torch.zeros(3), 1), r"shape \(N, D\)"),
        (lambda: knn_graph(torch.zeros(0, 3, 2), 1), "B > 0"),
        (lambda: knn_graph(torch.tensor([[0.0], [torch.nan]]), 1), "x must be finite"),
        (lambda: radius_graph(torch.tensor([[0.0], [torch.inf]]), 1), "x must be finite"),
        (lambda: knn_graph(torch.zeros(3, 2), 1, queries=torch.full((1, 2), torch.nan)), "queries must be finite"),
        (lambda: knn_graph(torch.zeros(3, 2), 1, queries=torch.zeros(3, 4)), "dimensions of x"),
        (lambda: knn_graph(torch.zeros(2, 3, 2), 1, queries=torch.zeros(3, 3, 2)), "batch"),
        (lambda: knn_graph(torch.zeros(3, 2), 1, queries=torch.zeros(3, 2), loop=True), "loop=True"),
        (lambda: knn_graph(torch.zeros(3, 2), 0), "k must be"),
        (lambda: radius_graph(torch.zeros(3, 2), -1.0), "r must be a distance"),
        (lambda: radius_graph(torch.zeros(3, 2), float("nan")), "r must be a distance"),
        (lambda: knn_graph(torch.zeros(3, 2, dtype=torch.bool), 1), "real numbers"),
    ],
)
def test_what_is_no_point_is_told(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
