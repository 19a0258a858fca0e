"""Expanders are what their name says: connected, regular, and with a spectral gap near the largest possible."""

import itertools

import networkx
import pytest
import torch

from attngraph import Expander, to_networkx


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("n", [3, 4, 16, 100, 101])
def test_an_expander_is_connected_and_regular_but_for_edges_that_cycles_share(n, degree, seed):
    graph = Expander(degree, seed)
    assert torch.equal(graph.mask(n), graph.mask(n).T)
    assert not graph.mask(n).diagonal().any()
    assert networkx.is_connected(to_networkx(graph, n).to_undirected())
    degrees = graph.in_degrees(n)
    assert degrees.min() >= 2
    assert degrees.max() <= degree
    if degree == 2:
        assert degrees.eq(2).all()


def test_two_cycles_share_two_edges_in_the_mean():
    lacking = [n * 8 - Expander(8, seed).num_edges(n) for n in (200, 2000) for seed in range(40)]
    assert 20 < sum(lacking) / len(lacking) < 28  # two directions of two edges, of six pairs of cycles


@pytest.mark.parametrize("n", [500, 512, 529])  # of the table of numbers that is permuted: some left over, or none
@pytest.mark.parametrize("degree", [4, 6, 8])
@pytest.mark.parametrize("seed", range(3))
def test_an_expander_has_the_spectral_gap_of_random_regular_graphs(n, degree, seed):
    eigenvalues = torch.linalg.eigvalsh(Expander(degree, seed).mask(n).double())
    assert max(-eigenvalues[0], eigenvalues[-2]) < 1.05 * 2 * (degree - 1) ** 0.5  # of a ring with chords: near degree
    assert eigenvalues[-1] > degree - 0.2


def test_expanders_of_other_seeds_and_cycles_differ():
    n = 1000
    graphs = [Expander(2, seed).sized(n, n) for seed in (0, 1, 2, -1, (1 << 63) + 5)]
    shared = [(a & b).num_edges() for a, b in itertools.combinations(graphs, 2)]
    assert max(shared) < 30  # 4 in the mean
    assert Expander(2, 7, 10**12).contains(torch.tensor(0), torch.arange(10**6)).sum() <= 2


def test_some_rows_of_an_expander_of_any_size_are_listed():
    n = 10**12 + 39
    keys, _ = Expander(6).rows(10**11, 10**11 + 5).edge_index(5, n)
    assert keys.shape == (30,)
    assert Expander(6, num_nodes=n).contains(torch.arange(5).repeat_interleave(6) + 10**11, keys).all()
