"""Answers about graphs equal those of brute force, and of networkx."""

import random
import time
from itertools import pairwise

import networkx
import numpy
import pytest
import torch
from graphs import GRAPHS

from attngraph import (
    Causal,
    Chunks,
    Documents,
    EdgeList,
    Empty,
    Full,
    Global,
    Identity,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    Strided,
    TopK,
    Tree,
    Window,
    analysis,
    from_function,
    plan,
)

every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
square = pytest.mark.parametrize(
    "case", [case for case in GRAPHS if case.n == case.m], ids=lambda case: f"{str(case.graph)[:60]}-{case.n}"
)


def union(mask):
    return mask.any(0) if mask.ndim == 3 else mask


@every
def test_last_reader_is_the_last_true_of_each_column(case):
    mask = union(case.mask)
    expected = [max((i for i in range(case.n) if mask[i, j]), default=-1) for j in range(case.m)]
    assert analysis.last_reader(case.graph, case.n, case.m).tolist() == expected


@square
def test_causal_is_nothing_above_the_diagonal(case):
    future = union(case.mask).triu(1)
    assert analysis.is_causal(case.graph, case.n) == (not future.any())
    leaks = [(leak.layer, leak.query, leak.key) for leak in analysis.leaks([Causal(), case.graph], case.n)]
    assert leaks == [(1, *edge) for edge in future.nonzero()[:1].tolist()]


@square
def test_reach_and_receptive_field_are_products_with_the_residual_stream(case):
    if not case.n:
        return
    step = (union(case.mask) | torch.eye(case.n, dtype=torch.bool)).float()
    expected = step @ step @ (Window(1, 0).mask(case.n, case.n) | torch.eye(case.n, dtype=torch.bool)).float() > 0
    stack = [Window(1, 0), case.graph, case.graph]
    assert torch.equal(analysis.reach(stack, case.n), expected)
    for node in {0, case.n // 2, case.n - 1}:
        assert torch.equal(analysis.receptive_field(stack, node, case.n), expected[node].nonzero()[:, 0])


def test_graphs_of_any_size_are_asked_far_out():
    assert analysis.is_causal(Causal() & (Window(4096, 0) | Prefix(16)))
    assert not analysis.is_causal(Window(4096, 1))
    assert not analysis.is_causal(Full())
    assert analysis.is_causal(Documents([3]) & Causal())
    assert analysis.is_causal(PerHead([Causal(), Window(3, 0)]) & Window(9, 9))
    assert not analysis.is_causal(PerHead([Causal(), Window(3, 1)]))
    assert analysis.leaks([PerHead([Causal(), Window(3, 1)])], 8) == [(0, 1, 0)]


def test_cost_counts_edges_of_each_head():
    cost = analysis.cost(Causal(), 100, dim=64, heads=4)
    assert cost[:4] == (5050, 0.505, 4 * 5050 * 64, 4 * 100 * 100 * 64)
    both = analysis.cost(PerHead([Full(), Random(10)]), 100, dim=64, heads=2)
    assert both.edges == 11_000
    assert both.flops == 4 * (10_000 + 1_000) // 2 * 64
    stack = analysis.cost([Causal(), Window(3, 0), Neighborhood((10, 10), 1)], 100, dim=64, heads=2)
    alone = [analysis.cost(each, 100, dim=64, heads=2) for each in (Causal(), Window(3, 0), Neighborhood((10, 10), 1))]
    assert stack.edges == sum(each.edges for each in alone)
    assert stack.flops == sum(each.flops for each in alone)
    assert stack.dense_flops == 3 * alone[0].dense_flops
    assert analysis.cost(Neighborhood((10, 10), 1), dim=64, heads=2) == alone[2]  # it knows its size
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        analysis.cost(Full(), 10, dim=7, heads=2)


def test_one_graph_is_a_stack_of_one():
    graph = Neighborhood((3, 3), 1)
    assert torch.equal(analysis.reach(graph), analysis.reach([graph], 9))
    assert torch.equal(analysis.receptive_field(graph, 0), analysis.receptive_field([graph], 0, 9))
    assert analysis.leaks(graph) == analysis.leaks([graph], 9)
    assert analysis.is_causal([Causal(), Window(3, 0)])
    assert not analysis.is_causal([Causal(), graph])
    with pytest.raises(ValueError, match="no layer knows its own"):
        analysis.reach([Causal()])


def test_what_is_too_large_to_look_at_is_told():
    assert analysis.leaks([Causal(), Full()]) == [(1, 1, 0)]
    with pytest.raises(ValueError, match="give the number of nodes"):
        analysis.is_causal(from_function(lambda q, k: q >= k))
    with pytest.raises(ValueError, match="give the number of nodes"):
        analysis.is_causal(Window(1, 0) @ Window(5, 0))


def test_a_node_outside_is_told():
    with pytest.raises(ValueError, match="node must be from 0 to 3"):
        analysis.receptive_field([Causal()], 4, 4)


def test_what_the_form_tells_needs_no_size():
    for graph in (
        Causal() & Random(3),
        Causal() & from_function(lambda q, k: q > k),
        Causal() | Window(3, 0),
        Identity(),
    ):
        assert analysis.is_causal(graph)
    assert analysis.is_causal(PerHead([Causal(), Causal(-1) & Random(2)]))
    assert not analysis.is_causal(Chunks(64))
    assert analysis.is_causal(Chunks(1))
    with pytest.raises(ValueError, match="give the number of nodes"):
        analysis.is_causal(Random(3))


def test_reach_does_not_depend_on_the_default_dtype():
    expected = analysis.reach([Window(1, 0)] * 2, 5)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(analysis.reach([Window(1, 0)] * 2, 5), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------- beside networkx


def some_graph(rng, n):
    """An expression of a few operations on n nodes."""
    few = rng.randrange(5)
    leaves = [
        lambda: rng.choice([Full(), Empty(), Identity(), Causal()]), lambda: Causal(few - 2), lambda: Prefix(few),
        lambda: Window(few, rng.randrange(3), 1 + rng.randrange(3)), lambda: Strided(few + 1),
        lambda: Chunks(few + 1, rng.randrange(4)), lambda: Random(rng.randrange(3), seed=few), lambda: Global([few]),
        lambda: EdgeList([[rng.randrange(n) for _ in range(2 * few)] for _ in range(2)], size=n),
        lambda: Tree([rng.randrange(-1, node) for node in range(n)]), lambda: Documents([few % n, n - few % n]),
        lambda: from_function(lambda q, k: (q * k) % 7 == few),
    ]  # fmt: skip
    graph = rng.choice(leaves)()
    for _ in range(rng.randrange(4)):
        other = rng.choice(leaves)()
        graph = rng.choice([
            lambda a, b: a | b, lambda a, b: a & b, lambda a, b: a - b, lambda a, b: b - a, lambda a, b: a ^ b,
            lambda a, b: ~a, lambda a, b: a.T, lambda a, b: (a.sized(n, n) @ b), lambda a, b: Causal() & (a | b),
        ])(graph, other)  # fmt: skip
    return graph


def some_layer(rng, n):
    """The same, or one for each of two heads."""
    return some_graph(rng, n) if rng.random() < 0.9 else PerHead([some_graph(rng, n), some_graph(rng, n)])


def messages(mask):
    """The same in networkx: a key's message goes to its queries."""
    return networkx.from_numpy_array(union(mask).T.numpy(), create_using=networkx.DiGraph)


def layered(masks, n):
    """A node for each node before the first layer and after each; edges lead from one layer to the next."""
    whole = networkx.DiGraph()
    whole.add_nodes_from((depth, i) for depth in range(len(masks) + 1) for i in range(n))
    for depth, mask in enumerate(masks):
        whole.add_edges_from(((depth, i), (depth + 1, i)) for i in range(n))
        whole.add_edges_from(((depth, key), (depth + 1, query)) for key, query in messages(mask).edges)
    return whole


def require_the_answers_of_networkx(stack, masks, n):
    graph, of_graph = stack[0], messages(masks[0])
    require_the_fields_of(layered(masks, n), stack, n)
    assert analysis.is_causal(graph, n) == all(key <= query for key, query in of_graph.edges)
    lengths = [length for _, to in networkx.all_pairs_shortest_path_length(of_graph) for length in to.values()]
    assert analysis.diameter(graph, n) == max(lengths, default=0)
    if n and networkx.is_strongly_connected(of_graph):
        assert analysis.diameter(graph, n) == networkx.diameter(of_graph)
    last = [max(of_graph.successors(key), default=-1) for key in range(n)]
    assert analysis.last_reader(graph, n).tolist() == last
    alive = [sum(key <= query <= last[key] for key in range(n)) for query in range(n)]
    assert analysis.peak_alive(graph, n) == max(alive, default=0)
    require_the_structure_of(networkx.compose_all([messages(mask) for mask in masks]), stack, n)
    if not n:
        return
    only_a, only_b, both = analysis.compare(graph, stack[1], n, dim=4, heads=graph.heads or stack[1].heads or 1)[:3]
    a, b = (mask if mask.ndim == 3 else mask[None] for mask in masks[:2])
    assert (only_a, only_b, both) == ((a & ~b).sum(), (b & ~a).sum(), (a & b).sum())


def require_the_fields_of(whole, stack, n):
    depth = len(stack)
    reached = analysis.reach(stack, n)
    for node in {0, n // 2, n - 1} if n else ():
        field = sorted(i for layer, i in networkx.ancestors(whole, (depth, node)) if layer == 0)
        assert analysis.receptive_field(stack, node, n).tolist() == field
        assert reached[node].nonzero()[:, 0].tolist() == field
        ends = [networkx.ancestors(whole, (layer, node)) for layer in range(1, depth + 1)]
        assert analysis.growth(stack, node, n) == [sum(layer == 0 for layer, _ in before) for before in ends]
        for source in {0, n // 3, n - 1}:
            way = analysis.path(stack, source, node, n)
            assert bool(way) == (source in field)
            assert networkx.is_path(whole, list(enumerate(way)))
            assert not way or (way[0], way[-1], len(way)) == (source, node, depth + 1)
    into_the_past = [(i, j) for i in range(n) for j in range(i + 1, n) if reached[i, j]]
    way = analysis.leak_path(stack, n)
    assert bool(way) == bool(into_the_past)
    assert networkx.is_path(whole, list(enumerate(way)))
    assert not way or ((way[-1], way[0]) in into_the_past and len(way) == depth + 1)


def require_the_structure_of(together, stack, n):
    label = {i: part for part, nodes in enumerate(networkx.weakly_connected_components(together)) for i in nodes}
    assert analysis.components(stack, n).tolist() == [label[i] for i in range(n)]
    plain = together.to_undirected()
    plain.remove_edges_from(list(networkx.selfloop_edges(plain)))
    edges, resistance = analysis.bottlenecks(stack, n)
    found = dict(zip(map(tuple, edges.T.tolist()), resistance.tolist(), strict=True))
    assert sorted(found) == sorted(map(tuple, map(sorted, plain.edges)))
    assert all(before > after - 1e-8 for before, after in pairwise(found.values()))
    assert {pair for pair in found if found[pair] > 1 - 1e-8} == set(map(tuple, map(sorted, networkx.bridges(plain))))
    if found:  # networkx.resistance_distance takes zeros for tiny numbers: between two nodes of K₁₂ 0.168, which is ⅙
        laplacian = networkx.laplacian_matrix(plain, nodelist=range(n)).toarray()
        inverse = numpy.linalg.pinv(laplacian.astype(float), rcond=1e-9, hermitian=True)
        expected = {(u, v): inverse[u, u] + inverse[v, v] - 2 * inverse[u, v] for u, v in found}
        assert found == pytest.approx(expected, abs=1e-9)


@square
def test_every_graph_gets_the_answers_of_networkx(case):
    window = Window(1, 0)
    mask = torch.tensor([[i - 1 <= j <= i for j in range(case.n)] for i in range(case.n)]).reshape(case.n, case.n)
    require_the_answers_of_networkx([case.graph, window, case.graph], [case.mask, mask, case.mask], case.n)
    require_the_answers_of_networkx([case.graph, case.graph], [case.mask, case.mask], case.n)


@pytest.mark.share(9)
@pytest.mark.parametrize("seed", range(100))
def test_ten_random_graphs_get_the_answers_of_networkx(seed):
    rng = random.Random(seed)
    for _ in range(10):
        n = rng.choice([rng.randrange(1, 13), rng.randrange(13, 40)])
        stack = [some_layer(rng, n)] * 2 if rng.random() < 0.5 else [some_layer(rng, n) for _ in range(3)]
        require_the_answers_of_networkx(stack, [graph.mask(n, n) for graph in stack], n)
