"""Graphs from the keys of each query: one graph, or one for each entry of a batch."""

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch

from attngraph import Batched, EdgeList, attend, from_dense, from_neighbors, parse
from attngraph.measuring import _resident
from attngraph.models import Encoder
from attngraph.nn import TransformerConfig

SHAPES = [((7, 3), 7), ((7, 3), 20), ((1, 1), 1), ((5, 0), 5), ((0, 3), 4), ((6, 9), 4)]


def neighbors(*shape: int, keys: int) -> torch.Tensor:
    """Random ones, some of them -1, some twice, in any order."""
    return torch.randint(-1, keys, shape, generator=torch.Generator().manual_seed(sum(shape)))


def dense(index: torch.Tensor, keys: int) -> torch.Tensor:
    """(N, k) as a mask."""
    mask = torch.zeros(len(index), keys + 1, dtype=torch.bool)
    return mask.scatter_(1, index % (keys + 1), True)[:, :keys]  # -1 is the last


@pytest.mark.parametrize(
    ("shape", "keys"), [((7, 3), 7), ((7, 3), 20), ((1, 1), 1), ((5, 0), 5), ((0, 3), 4), ((6, 9), 4)]
)
def test_they_are_the_edges(shape, keys):
    index = neighbors(*shape, keys=keys)
    graph = from_neighbors(index, keys)
    assert graph == from_dense(dense(index, keys))
    assert graph.size == (shape[0], keys)
    assert graph.entries is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_sorted_neighbors_of_any_dtype(dtype):
    index = torch.rand(9, 9).topk(4).indices
    assert from_neighbors(index.sort(1).values.to(dtype)) == from_neighbors(index)


@pytest.mark.parametrize("backend", ["auto", "rows", "reference"])
def test_each_entry_of_a_batch_hears_its_own(backend):
    index = neighbors(3, 10, 4, keys=8)
    graph = from_neighbors(index, 8)
    q = torch.randn(3, 2, 10, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(3, 2, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias, padding = torch.randn(3, 2, 10, 8, dtype=torch.float64), torch.tensor([8, 5, 7])
    found = attend(q, k, v, graph, bias=bias, attention_mask=padding, backend=backend)
    each = Batched([from_neighbors(entry, 8) for entry in index])
    right = attend(q, k, v, each, bias=bias, attention_mask=padding, backend="edges")
    torch.testing.assert_close(found, right, atol=1e-12, rtol=1e-12)
    gradients, wanted = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, right))
    torch.testing.assert_close(gradients, wanted, atol=1e-10, rtol=1e-10)
    assert torch.equal(graph.edge_index(), each.edge_index())


def test_a_batch_says_what_it_is():
    graph = from_neighbors(neighbors(3, 10, 4, keys=10))
    for same in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph), parse(repr(graph)), eval(repr(graph))):
        assert same == graph
        assert same.entries == 3
    assert graph != EdgeList(graph.edge_index(), graph.size)
    assert "entries=3" in str(graph)
    with pytest.raises(ValueError, match="one graph for each entry of the batch"):
        attend(*torch.randn(3, 2, 1, 10, 4), graph)
    with pytest.raises(ValueError, match="no edge may lead from one entry to another"):
        EdgeList([[0], [5]], 6, entries=2)
    with pytest.raises(ValueError, match="equal sizes"):
        EdgeList([[0], [1]], 5, entries=2)


def test_models_take_a_graph_for_each_entry():
    model = Encoder(TransformerConfig(embed_dim=16, num_layers=2, num_heads=2), vocab_size=11).eval()
    tokens, index = torch.randint(11, (3, 12)), neighbors(3, 12, 4, keys=12)
    together = model(tokens, from_neighbors(index))
    alone = [model(entry[None], from_neighbors(own)) for entry, own in zip(tokens, index, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"score": "additive"}, {"return_weights": True}])
def test_plans_end_with_their_graph(options):
    q, k, v = torch.randn(3, 1, 2, 500, 4)
    graph = from_neighbors(neighbors(500, 9, keys=500))
    attend(q, k, v, graph, **options)
    assert graph.plans
    ends = weakref.ref(graph)
    gc.disable()
    try:
        del graph
        assert ends() is None
    finally:
        gc.enable()


def listed(index: torch.Tensor) -> EdgeList:
    """The same edges as a list, whose plans are cached."""
    return EdgeList(
        torch.stack([index.flatten(), torch.arange(len(index)).repeat_interleave(index.shape[1])]), len(index)
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs to know the memory of this process")
@pytest.mark.parametrize("make", [from_neighbors, listed])
def test_ten_thousand_graphs_leave_nothing_behind(make):
    q, k, v = torch.randn(3, 1, 1, 30, 4)
    held = []
    for step in range(10_000):
        attend(q, k, v, make(torch.randint(30, (30, 3))))
        if step in (2_000, 9_999):
            gc.collect()
            held.append(_resident("VmRSS"))  # KiB
    assert held[1] - held[0] < 8 << 10


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "must have shape"),
        (torch.zeros(2, 3), "integers"),
        (torch.tensor([[0, 3]]), "keys from 0 to 0"),
        (torch.tensor([[-2]]), "keys from 0 to 0"),
        (torch.zeros(0, 2, 2, dtype=torch.int64), "B > 0"),
    ],
)
def test_what_is_no_neighbor_is_told(index, message):
    with pytest.raises((TypeError, ValueError), match=message):
        from_neighbors(index)


def test_neighbors_are_those_of_when_the_graph_was_made():
    index = torch.tensor([[1, 2], [0, 0], [2, 1]])
    graph = from_neighbors(index)
    index.zero_()
    expected = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    assert torch.equal(graph.mask(), expected)
    assert torch.equal(graph.edge_index(), torch.tensor([[1, 2, 0, 1, 2], [0, 0, 1, 2, 2]]))
    assert graph == EdgeList([[1, 2, 0, 1, 2], [0, 0, 1, 2, 2]], 3)


@pytest.mark.parametrize("none", [False, True])
def test_a_small_graph_of_neighbors_is_what_a_plan_of_it_computes(none):
    """It runs by a mask, without a plan; by name, with one."""
    index = torch.rand(2, 9, 9).topk(3).indices
    index[0, 0] = -1 if none else 0
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    graph, options = from_neighbors(index), {"return_lse": True, "return_weights": True}
    for more in ({}, {"attention_mask": torch.tensor([9, 5])}, {"bias": torch.randn(2, 9, 9, dtype=torch.float64)}):
        found, expected = (attend(q, k, v, graph, backend=name, **options, **more) for name in ("auto", "edges"))
        torch.testing.assert_close(found, expected)
        one, other = (torch.autograd.grad(out.sum(), (q, k, v)) for out, *_ in (found, expected))
        torch.testing.assert_close(one, other)


def test_neighbors_in_compiled_programs():
    """Given to a program, or made in it."""
    index = torch.rand(1, 12, 12).topk(3).indices
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    expected = attend(q, k, v, from_neighbors(index), backend="edges")
    given = torch.compile(attend, backend="aot_eager", fullgraph=True)
    made = torch.compile(lambda q, k, v, index: attend(q, k, v, from_neighbors(index)), backend="aot_eager")
    torch.testing.assert_close(given(q, k, v, from_neighbors(index)), expected)
    torch.testing.assert_close(made(q, k, v, index), expected)
