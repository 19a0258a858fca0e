"""Random-walk positions: those of PyG's transform and of dense powers, for any graph and for batches of them."""

import networkx
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import AddRandomWalkPE

from attngraph import (
    Batched,
    Causal,
    Chunks,
    Disjoint,
    Documents,
    EdgeList,
    Empty,
    Expander,
    Full,
    Identity,
    PerHead,
    Random,
    Window,
    collate,
    from_networkx,
    knn_graph,
)
from attngraph.nn import random_walk_positions, random_walks

GRAPHS = [
    (Full(), 5),
    (Empty(), 4),
    (Identity(), 3),
    (Causal(), 6),
    (Window(1, 2), 9),
    (Chunks(3), 8),
    (Random(2), 12),
    (Expander(4), 11),
    (Documents([3, 1, 4]), 8),
    (EdgeList([[0, 1, 2, 2], [1, 2, 0, 2]], size=5), 5),
    (Full(), 1),
    (Full(), 0),
]


def powers(graph, n, steps):
    """The diagonals of the powers of the random-walk matrix, in float64."""
    adjacency = graph.mask(n, n).T.double()  # from key to query
    walk = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
    rows, power = [], torch.eye(n, dtype=torch.float64)
    for _ in range(steps):
        power = power @ walk
        rows.append(power.diagonal())
    return torch.stack(rows, 1).float()


@pytest.mark.parametrize(("graph", "n"), GRAPHS, ids=lambda value: str(value))
def test_they_are_the_diagonals_of_the_powers_and_those_of_pyg(graph, n):
    found = random_walk_positions(graph, 7, n)
    assert found.shape == (n, 7)
    torch.testing.assert_close(found, powers(graph, n, 7))
    if n:
        data = AddRandomWalkPE(7)(Data(edge_index=graph.edge_index(n, n), num_nodes=n))
        torch.testing.assert_close(found, data.random_walk_pe)


def test_a_batch_has_those_of_its_graphs():
    torch.manual_seed(0)
    graphs = [from_networkx(networkx.gnm_random_graph(n, 2 * n, seed=n)).graph for n in (5, 9, 3)]
    alone = [random_walk_positions(graph, 4) for graph in graphs]
    torch.testing.assert_close(random_walk_positions(Disjoint(graphs), 4), torch.cat(alone))
    _, packed, _ = collate([(torch.zeros(graph.size[0], 1), graph) for graph in graphs])
    torch.testing.assert_close(random_walk_positions(packed, 4), torch.cat(alone))
    padded = random_walk_positions(Batched(graphs), 4)
    assert padded.shape == (3, 9, 4)
    for entry, own in zip(padded, alone, strict=True):
        torch.testing.assert_close(entry[: len(own)], own)
        assert (entry[len(own) :] == 0).all()
    points = torch.randn(2, 6, 3)
    by_entry = random_walk_positions(knn_graph(points, 2), 4)
    torch.testing.assert_close(by_entry[1], random_walk_positions(knn_graph(points[1], 2), 4))


def test_some_columns_at_a_time_are_all_of_them(monkeypatch):
    whole = random_walk_positions(Expander(4), 5, 23)
    monkeypatch.setattr(random_walks, "AT_ONCE", 23 * 4)
    torch.testing.assert_close(random_walk_positions(Expander(4), 5, 23), whole)


def test_another_order_of_the_nodes_is_another_order_of_the_positions():
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    edges = Random(3).edge_index(13, 13)
    found, other = (random_walk_positions(EdgeList(each, 13), 5) for each in (edges, order[edges]))
    torch.testing.assert_close(other[order], found)


def test_they_tell_apart_graphs_of_one_degree():
    """Circulant skip links 2 and 3 of 41 nodes, which colour refinement can't tell apart."""
    one, other = (from_networkx(networkx.circulant_graph(41, [1, skip])).graph for skip in (2, 3))
    found, different = random_walk_positions(one, 16), random_walk_positions(other, 16)
    torch.testing.assert_close(found, found[:1].expand(41, -1))  # every node stands alike
    assert (found[0] - different[0]).abs().max() > 0.01


def test_what_has_no_walks_is_told():
    with pytest.raises(ValueError, match="as many queries as keys"):
        random_walk_positions(Full().sized(3, 4), 2)
    with pytest.raises(ValueError, match="one for all heads"):
        random_walk_positions(PerHead([Full(), Causal()]), 2, 3)
    with pytest.raises(ValueError, match="steps"):
        random_walk_positions(Full(), 0, 3)
    with pytest.raises(ValueError, match="give the missing number"):
        random_walk_positions(Full(), 2)
