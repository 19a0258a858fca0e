"""Batches of small graphs: packed, every graph has the results that it has alone."""

import pytest
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as LoaderOfPyG

from attngraph import Causal, Disjoint, EdgeBias, EdgeList, Full, Window, attend, collate, from_edge_index
from attngraph.nn import Transformer, TransformerConfig

CHANCE = torch.Generator().manual_seed(5)
SIZES = (4, 1, 7, 5, 3)
CONFIG = TransformerConfig(embed_dim=8, num_layers=2, num_heads=2, position="none")


def edges(n):
    """Some edges among n nodes, in no order."""
    every = Full().edge_index(n, n)
    return every[:, torch.randperm(n * n, generator=CHANCE)[: 2 * n]]


def sample(n):
    given = edges(n)
    features = torch.randn(given.shape[1], 3, generator=CHANCE)
    return torch.randn(n, 8, generator=CHANCE), from_edge_index(given, n), features, n % 2


DATASET = [sample(n) for n in SIZES]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_packed_graph_has_the_results_that_it_has_alone(num_workers):
    torch.manual_seed(0)
    model, encode = Transformer(CONFIG, Full()), torch.nn.Linear(3, 2)
    found, labels = [], []
    for x, graph, features, y, batch in DataLoader(
        DATASET,
        batch_size=2,
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
    ):
        out = model(x[None], graph, bias=EdgeBias.of(graph, encode(features).T))[0]
        assert batch.tolist() == [i for i, size in enumerate(torch.bincount(batch).tolist()) for _ in range(size)]
        found += [out[batch == i] for i in range(len(y))]
        labels += y.tolist()
    assert labels == [y for *_, y in DATASET]
    for out, (x, graph, features, _) in zip(found, DATASET, strict=True):
        alone = model(x[None], graph, bias=EdgeBias.of(graph, encode(features).T))[0]
        torch.testing.assert_close(out, alone)


def test_pygs_loader_gives_the_same_batches():
    data = [
        Data(x=x, edge_index=graph.edge_index()[:, graph.position], edge_attr=features, y=y)
        for x, graph, features, y in DATASET
    ]
    (theirs,) = LoaderOfPyG(data, batch_size=len(data))
    x, graph, features, y, batch = collate(DATASET)
    assert torch.equal(x, theirs.x)
    assert torch.equal(features, theirs.edge_attr)
    assert torch.equal(y, theirs.y)
    assert torch.equal(batch, theirs.batch)
    assert graph == from_edge_index(theirs.edge_index, theirs.num_nodes)
    q, k, v = torch.randn(3, 1, 3, x.shape[0], 4, generator=CHANCE).unbind(0)
    ours = attend(q, k, v, graph, bias=EdgeBias.of(graph, features.T))
    assert torch.equal(ours, attend(q, k, v, graph, bias=EdgeBias.of(theirs.edge_index, theirs.edge_attr.T)))


def test_what_is_no_tensor_comes_as_a_list():
    assert collate([("a", EdgeList([[0], [1]], 3)), ("b", EdgeList([[0], [1]], 3))])[0] == ["a", "b"]


def test_any_graphs_are_put_side_by_side():
    graphs = [Causal().sized(3, 3), Window(1, 1).sized(4, 4)]
    graph, batch = collate([(each,) for each in graphs])
    assert graph == Disjoint(graphs)
    assert batch.tolist() == [0, 0, 0, 1, 1, 1, 1]
    across, target, source, batch = collate([(EdgeList([[1], [0]], (1, 2)), torch.ones(1), torch.ones(2))] * 2)
    assert (across, len(target), len(source), batch.tolist()) == (EdgeList([[1, 3], [0, 1]], (2, 4)), 2, 4, [0, 1])


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], ValueError, r"one or more tuples of one length \(got 0"),
        ([(torch.ones(3), Full())], ValueError, r"know their size \(got Full\(\) in sample 0\): graph.sized"),
        ([(torch.ones(3),)], ValueError, "one graph, all at the same place"),
        ([(torch.ones(3), EdgeList([[0], [1]], 3)), (EdgeList([[0], [1]], 3), 1.0)], ValueError, "at the same place"),
        ([(1, EdgeList([[0], [1]], 3)), (EdgeList([[0], [1]], 3),)], ValueError, "of one length"),
        (
            [(torch.ones(4, 1), EdgeList([[0, 1], [1, 2]], 3)), (torch.ones(2, 1), EdgeList([[0, 1], [1, 2]], 3))],
            ValueError,
            "got 4 rows in sample 0, which has 3 nodes and 2 edges",
        ),
        (
            [(torch.ones(3, 1), EdgeList([[0, 1], [1, 2]], 3)), (torch.ones(1, 1), EdgeList([[0, 1], [1, 2]], 3))],
            ValueError,
            "the same in all samples",
        ),
        (
            [(torch.ones(3, 1), EdgeList([[0], [1]], 3)), (torch.ones(3, 2), EdgeList([[0], [1]], 3))],
            ValueError,
            "item 0 of the samples must fit together",
        ),
        ([EdgeList([[0], [1]], 3)], TypeError, r"samples must be tuples, such as \(x, graph, y\)"),
    ],
)
def test_what_is_no_sample_is_told(samples, error, message):
    with pytest.raises(error, match=message):
        collate(samples)
