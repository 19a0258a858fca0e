"""Answers about graphs equal those of brute force."""

import pytest
import torch
from graphs import GRAPHS

from attngraph import (
    Causal,
    Chunks,
    Documents,
    Full,
    Identity,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    Window,
    analysis,
    from_function,
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
    assert cost == (5050, 0.505, 4 * 5050 * 64, 4 * 100 * 100 * 64)
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
