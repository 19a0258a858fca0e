"""Every rewrite keeps every edge, and a graph is what `split` makes of it."""

import ast
import inspect
import sys

import pytest
import torch
from graphs import GRAPHS
from hypothesis import given
from test_properties import sized_graphs

from attngraph import Causal, Window, parse
from attngraph.graph.base import at_size
from attngraph.graph.listing import split
from attngraph.graph.rewrite import (
    _rewritten,
    _rewritten_intersection,
    _rewritten_union,
    simplify,
)

every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")

RULES = (_rewritten, _rewritten_union, _rewritten_intersection)

# Each rule at least once, in the order in which they stand: before, after.
REWRITES = [
    ("~~Causal()", "Causal()"),
    ("~Full()", "Empty()"),
    ("~Empty()", "Full()"),
    ("~(Causal() | Prefix(2))", "~Causal() & ~Prefix(2)"),
    ("~(Strided(2) & Prefix(2))", "~Strided(2) | ~Prefix(2)"),
    ("Random(2, 0).T.T", "Random(2)"),
    ("Identity().T", "Identity()"),
    ("Strided(3).T", "Strided(3)"),
    ("Expander(4).T", "Expander(4)"),
    ("Window(3, 1).T", "Window(1, 3)"),
    ("Causal(2).T", "~Causal(-3)"),
    ("(~Prefix(3)).T", "~Prefix(3).T"),
    ("(Window(2, 0) ^ Prefix(3)).T", "Window(0, 2) ^ Prefix(3).T"),
    ("Window(0, 0)", "Identity()"),
    ("Prefix(0)", "Empty()"),
    ("Global([])", "Empty()"),
    ("Random(0)", "Empty()"),
    ("Expander(0)", "Empty()"),
    ("Strided(1)", "Full()"),
    ("Chunks(1)", "Identity()"),
    ("ChunkEnds(3, 0)", "Empty()"),
    ("ChunkEnds(3, 3, 1)", "Full()"),
    ("ChunkEnds(3, 1).rows(1, 4)", "ChunkEnds(3, 1).sized(3, None)"),
    ("Strided(2) - Strided(2)", "Empty()"),
    ("Strided(2) - Empty()", "Strided(2)"),
    ("Strided(2) - Full()", "Empty()"),
    ("Full() - Strided(2)", "~Strided(2)"),
    ("Strided(2) - ~Prefix(3)", "Strided(2) & Prefix(3)"),
    ("Strided(2) ^ Strided(2)", "Empty()"),
    ("Empty() ^ Strided(2)", "Strided(2)"),
    ("Strided(2) ^ Full()", "~Strided(2)"),
    ("Full().rows(1, 3)", "Full().sized(2, None)"),
    ("Strided(2).rows(1, 4).rows(1, 3)", "Strided(2).rows(2, 4)"),
    ("Causal().rows(1, 3)", "Causal(1).sized(2, None)"),
    ("Prefix(2).rows(1, 3)", "Prefix(2).sized(2, None)"),
    ("Causal().sized(4, 5).rows(1, 3)", "Causal(1).sized(2, 5)"),
    ("Full().sized(4, 5).rows(1, 3)", "Full().sized(2, 5)"),
    ("Causal().rows(1, 3).T.rows(0, 2).T", "Causal(1).sized(2, 2)"),
    ("Full().rows(1, 3).T.rows(1, 4).T", "Full().sized(2, 3)"),
    ("Strided(2).with_global_nodes(0)", "Strided(2)"),
    ("Full().with_global_nodes(1)", "Full()"),
    ("Strided(2).sized(3, None).sized(3, 4)", "Strided(2).sized(3, 4)"),
    ("Disjoint([Strided(2)])", "Strided(2)"),
]
PAIR_REWRITES = [
    ("Strided(2) | Strided(2)", "Strided(2)"),
    ("Strided(2) | Empty()", "Strided(2)"),
    ("Full() | Strided(2)", "Full()"),
    ("Strided(2) | ~Strided(2)", "Full()"),
    ("Causal(1) | Causal(3)", "Causal(3)"),
    ("Prefix(2) | Prefix(1)", "Prefix(2)"),
    ("Window(1, 1) | Window(2, 1)", "Window(2, 1)"),
    ("Strided(2) | Strided(2) & Prefix(3)", "Strided(2)"),
    ("Strided(2) & Strided(2)", "Strided(2)"),
    ("Full() & Strided(2)", "Strided(2)"),
    ("Strided(2) & Empty()", "Empty()"),
    ("Strided(2) & ~Prefix(3)", "Strided(2) - Prefix(3)"),
    ("Causal(1) & Causal(3)", "Causal(1)"),
    ("Prefix(2) & Prefix(1)", "Prefix(1)"),
    ("Window(1, 3) & Window(2, 1)", "Window(1, 1)"),
    ("Window(4, 4) & Causal(1)", "Window(4, 1)"),
    ("Strided(2) & (Strided(2) | Prefix(3))", "Strided(2)"),
]


def returns(function) -> set[int]:
    """The lines on which a function returns a simpler form."""
    source, first = inspect.getsourcelines(function)
    tree = ast.parse("".join(source))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Return) and ast.unparse(node) != "return None")
    return {node.lineno + first - 1 for node in found}


def test_each_rule_has_its_example():
    rules = {function.__code__: returns(function) for function in RULES}
    reached = set()

    def trace(frame, event, _):
        if frame.f_code in rules:
            reached.add((frame.f_code, frame.f_lineno))
            return trace
        return trace if event == "call" else None

    sys.settrace(trace)
    try:
        for before, _ in REWRITES + PAIR_REWRITES:
            simplify(parse(before))
    finally:
        sys.settrace(None)
    for code, lines in rules.items():
        assert lines <= {line for known, line in reached if known is code}, code.co_name


def test_a_class_derived_from_one_of_ours_is_not_rewritten():
    class Later(Causal):
        def contains(self, q_idx, kv_idx):
            return kv_idx > q_idx

    for graph in (Later().T, Later() & Window(2, 0), Later() | Causal(3), Later().rows(1, 3)):
        n = graph.size[0] or 5
        assert torch.equal(simplify(graph).mask(n, 5), graph.mask(n, 5))


@pytest.mark.parametrize(("before", "after"), REWRITES + PAIR_REWRITES)
def test_a_rule_makes_the_expression_shorter_and_keeps_its_edges(before, after):
    graph = parse(before)
    assert simplify(graph) == parse(after)
    n, m = (given if given is not None else default for given, default in zip(graph.size, (5, 5), strict=True))
    assert torch.equal(simplify(graph).mask(n, m), graph.mask(n, m))


@every
def test_simpler_graphs_have_the_same_edges_and_size(case):
    simpler = simplify(case.graph)
    assert simpler.size == case.graph.size
    assert simpler.heads == case.graph.heads
    assert torch.equal(simpler.mask(case.n, case.m), case.mask)


def agree_outside_of_the_list(graph, n, m):
    bound = at_size(graph, n, m)[0]
    rest, (query, key) = split(bound, n, m)
    differing = rest.mask(n, m) ^ graph.mask(n, m)
    differing[query, key] = False
    return not differing.any()


@every
def test_a_graph_and_the_rest_of_its_split_differ_in_the_list_alone(case):
    if case.graph.heads is None:
        assert agree_outside_of_the_list(case.graph, case.n, case.m)


@given(sized_graphs())
def test_simplify_and_split_keep_the_edges_of_any_expression(case):
    graph, n, m = case
    mask = graph.mask(n, m)
    assert torch.equal(simplify(graph).mask(n, m), mask)
    assert agree_outside_of_the_list(graph, n, m)
