"""Deep and wide expressions: every answer is that of the mask, and costs about as much as the edges.

A union of many graphs, a graph for each of many heads, operations nested two hundred deep, parts that occur again and
again (``g = g | g.T``, which written out has 2⁴⁰ terms): nothing may double with each of them.
"""

import random
import time
from functools import reduce

import pytest
import torch
from hypothesis import given, settings, strategies

from attngraph import (
    Axial,
    Beside,
    Causal,
    Chunks,
    Disjoint,
    Documents,
    EdgeList,
    Expander,
    Full,
    Identity,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    ShiftedWindows,
    Strided,
    Tree,
    Window,
    analysis,
    attend,
    from_function,
    plan,
)
from attngraph.graph.base import at_size
from attngraph.graph.listing import split
from attngraph.graph.rewrite import simplify

N = 512
SECONDS = 8  # of CPU for any question: ten times what the slowest takes; what doubles 40 times never ends
few = settings(max_examples=settings.default.max_examples // 60)
some = settings(max_examples=settings.default.max_examples // 2)


def listed(rng):
    pairs = torch.tensor([[rng.randrange(N) for _ in range(200)] for _ in range(2)])
    return rng.choice([
        lambda: EdgeList(pairs, N),
        lambda: Random(rng.randrange(4), seed=rng.randrange(99)),
        lambda: Expander(2 * rng.randrange(3), seed=rng.randrange(99)),
        lambda: Tree([rng.randrange(-1, node) for node in range(N)]),
        lambda: EdgeList(pairs[:, :9], N) @ EdgeList(pairs[:, 9:], N),
    ])()  # fmt: skip


def banded(rng):
    small = rng.randrange(1, 9)
    return rng.choice([
        lambda: Causal(small - 4), lambda: Window(small, 9 - small), lambda: Window(small, 0, small), Full, Identity,
        lambda: Prefix(small), lambda: Strided(small), lambda: Chunks(8 * small, small),
        lambda: Documents([N // 2 - small, small, N // 2]),
    ])()  # fmt: skip


def mixed(rng):
    small = rng.randrange(1, 5)
    return rng.choice([
        lambda: listed(rng), lambda: banded(rng), lambda: banded(rng), lambda: Neighborhood((16, 32), small),
        lambda: Axial((16, 32)), lambda: ShiftedWindows((16, 32), 4, small),
        lambda: from_function(lambda q, k: (q * k) % 7 == small),
    ])()  # fmt: skip


def combined(rng, g, other):
    """One more operation around a graph of N × N, its nodes where they are."""
    return rng.choice([
        lambda: g | other, lambda: g & other, lambda: g - other, lambda: other - g, lambda: g ^ other, lambda: ~g,
        lambda: g.T, lambda: (g | other).sized(N, N), lambda: g.sized(N, N).rows(0, N),
    ])()  # fmt: skip


def moved(rng, g, other):
    """The same, its nodes elsewhere."""
    return rng.choice([
        lambda: g.sized(N, N).rows(1, N).T.rows(1, N).T.with_global_nodes(1),
        lambda: Disjoint([g.rows(0, N // 2).T.rows(0, N // 2).T, Causal()]).sized(N, N),
        lambda: Beside(g.T.rows(0, 9).T.sized(N, 9), other.T.rows(0, N - 9).T).sized(N, N),
    ])()  # fmt: skip


def wide(rng, leaf):
    operators = lambda a, b: a | b, lambda a, b: a & ~b, lambda a, b: a ^ b, lambda a, b: a - b
    return reduce(rng.choice(operators), [leaf(rng) for _ in range(40)])


def heads(rng, leaf):
    return PerHead([(leaf(rng) | Window(head, 0)).sized(N, N) for head in range(64)])


def deep(rng, leaf):
    graph = leaf(rng)
    while graph._depth < 195:
        graph = (moved if rng.random() < 0.1 else combined)(rng, graph, leaf(rng))
    return graph


def shared(rng, leaf):
    graph = leaf(rng) | leaf(rng)
    for _ in range(40):
        graph = combined(rng, graph, rng.choice([graph.T, ~graph, leaf(rng)]))
    return graph


KINDS = {each.__name__: each for each in (wide, heads, deep, shared)}
LEAVES = {each.__name__: each for each in (listed, banded, mixed)}


def quickly(question):
    began = time.process_time()
    answer = question()
    assert time.process_time() - began < SECONDS
    return answer


@pytest.mark.share(2)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=strategies.integers(0, 2**20))
def test_no_question_doubles_with_the_operations(kind, leaf, seed):
    graph = quickly(lambda: KINDS[kind](random.Random(seed), LEAVES[leaf]))
    mask = quickly(lambda: graph.mask(N, N))
    union = mask.any(0) if graph.heads else mask
    query, key = union.nonzero().unbind(1)
    assert quickly(lambda: graph.num_edges(N, N)) == mask.sum()
    assert torch.equal(quickly(lambda: graph.edge_index(N, N)), torch.stack([key, query]))
    assert torch.equal(quickly(lambda: graph.in_degrees(N, N)), mask.sum(-1))
    assert quickly(lambda: analysis.is_causal(graph, N)) == (not union.triu(1).any())
    inside = torch.zeros(N, dtype=torch.bool)
    for first, stop in quickly(lambda: graph.spans(100, 150, N, N)):
        inside[first:stop] = True
    assert not (union[100:150].any(0) & ~inside).any()
    bound = at_size(graph, N, N)[0]
    assert torch.equal(quickly(lambda: simplify(bound)).mask(N, N), mask)
    if not graph.heads:
        rest, (query, key) = quickly(lambda: split(bound, N, N))
        differing = rest.mask(N, N) ^ mask
        differing[query, key] = False
        assert not differing.any()
    count = graph.heads or 1
    made = quickly(lambda: plan(graph, N, N, heads=count, head_dim=4))
    q, k, v = torch.randn(3, 1, count, N, 4, generator=torch.Generator().manual_seed(seed))
    expected = attend(q, k, v, graph, backend="dense")
    torch.testing.assert_close(attend(q, k, v, made), expected, atol=1e-5, rtol=1e-4)
    assert len(str(graph)) < 100_000
