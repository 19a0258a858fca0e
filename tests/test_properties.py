"""Laws over generated graphs, shapes, biases and head groupings. 60 examples of each.

HYPOTHESIS_PROFILE=thorough tries 500, as make test-all does; nightly 20,000.
"""

import pytest
import torch
from hypothesis import assume, given, strategies
from test_attend import BIASES, DISTANCES, assert_equal, biases, refuses_distances, results, tensors

from attngraph import (
    Beside,
    Causal,
    ChunkEnds,
    Chunks,
    Disjoint,
    Documents,
    EdgeList,
    Empty,
    Full,
    Global,
    Graph,
    Identity,
    LeakyReLU,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    SoftCap,
    Strided,
    Temperature,
    Tree,
    Window,
    attend,
    from_dense,
    parse,
)

KINDS = ["leaf", "leaf", "|", "&", "-", "^", "~", ".T", "rows", "global", "disjoint", "beside"]
few = strategies.integers(0, 4)
some = strategies.integers(1, 4)


@strategies.composite
def edge_lists(draw, n, m):
    if n == 0 or m == 0:
        return EdgeList([[], []], (n, m))
    pairs = draw(strategies.lists(strategies.tuples(strategies.integers(0, m - 1), strategies.integers(0, n - 1))))
    return EdgeList(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T, (n, m))


@strategies.composite
def squares(draw, n):
    """A graph that needs as many keys as queries."""
    kind = draw(strategies.sampled_from(["documents", "tree", "grid", "hops"]))
    if kind == "documents":
        cuts = sorted(draw(strategies.lists(strategies.integers(0, n), max_size=3)))
        return Documents([stop - start for start, stop in zip([0, *cuts], [*cuts, n], strict=True)])
    if kind == "tree":
        return Tree([draw(strategies.integers(-1, node - 1)) for node in range(n)])
    if kind == "grid" and n:
        width = draw(strategies.sampled_from([side for side in range(1, n + 1) if n % side == 0]))
        return Neighborhood((n // width, width), draw(few), draw(some))
    return draw(graphs(n, n, 1)).sized(n, n) @ draw(graphs(n, n, 1))


@strategies.composite
def graphs(draw, n, m, depth=3):
    """A graph expression that fits n queries and m keys."""
    leaves = [
        strategies.sampled_from([Full(), Empty(), Identity()]),
        strategies.builds(Causal, strategies.integers(-4, 4)),
        strategies.builds(Window, few, few, some),
        strategies.builds(Prefix, few),
        strategies.builds(Global, strategies.lists(strategies.integers(0, 9), max_size=3)),
        strategies.builds(Strided, some),
        strategies.builds(Chunks, some, few),
        strategies.builds(lambda rest, length, offset: ChunkEnds(rest + length, length, offset), some, few, few),
        strategies.builds(Random, few, few),
        edge_lists(n, m),
    ]
    if n == m and depth > 1:
        leaves.append(squares(n))
    kind = draw(strategies.sampled_from(KINDS)) if depth else "leaf"

    def part(rows=n, columns=m):
        return draw(graphs(rows, columns, depth - 1))

    match kind:
        case "|":
            return part() | part()
        case "&":
            return part() & part()
        case "-":
            return part() - part()
        case "^":
            return part() ^ part()
        case "~":
            return ~part()
        case ".T":
            return part(m, n).T
        case "rows":
            start = draw(few)
            return part(n + start, m).sized(n + start, m).rows(start, n + start)
        case "global" if n and m:
            return part(n - 1, m - 1).with_global_nodes(1)
        case "disjoint":
            rows, columns = draw(strategies.integers(0, n)), draw(strategies.integers(0, m))
            return Disjoint([part(rows, columns).sized(rows, columns), part(n - rows, m - columns)])
        case "beside":
            columns = draw(strategies.integers(0, m))
            return Beside(part(n, columns).sized(n, columns), part(n, m - columns))
    return draw(strategies.one_of(leaves))


@strategies.composite
def sized_graphs(draw, heads=None):
    n, m = draw(strategies.integers(0, 12)), draw(strategies.integers(0, 12))
    if heads:
        return PerHead([draw(graphs(n, m, 2)) for _ in range(heads)]), n, m
    return draw(graphs(n, m)), n, m


@given(sized_graphs())
def test_edges_counts_and_degrees_are_those_of_the_mask(case):
    graph, n, m = case
    mask = graph.mask(n, m)
    query, key = mask.nonzero().unbind(1)
    assert torch.equal(graph.edge_index(n, m), torch.stack([key, query]))
    assert graph.num_edges(n, m) == len(key)
    assert torch.equal(graph.in_degrees(n, m), mask.sum(1))
    assert torch.equal(graph.out_degrees(n, m), mask.sum(0))


@given(sized_graphs())
def test_repr_round_trips(case):
    graph, n, m = case
    again = parse(repr(graph))
    assert again == graph
    assert again._key == graph._key
    assert torch.equal(again.mask(n, m), graph.mask(n, m))


@given(sized_graphs(), sized_graphs())
def test_de_morgan_and_distribution(one, other):
    a, n, m = one
    b: Graph = other[0] if other[1:] == (n, m) else Window(2, 1) ^ Prefix(3)
    assert torch.equal((~(a | b)).mask(n, m), (~a & ~b).mask(n, m))
    assert torch.equal((a - b).mask(n, m), (a & ~b).mask(n, m))
    assert torch.equal((a ^ b).mask(n, m), ((a | b) - (a & b)).mask(n, m))
    assert torch.equal((a & b).T.mask(m, n), (a.T & b.T).mask(m, n))
    assert a.num_edges(n, m) + b.num_edges(n, m) == (a | b).num_edges(n, m) + (a & b).num_edges(n, m)


@given(
    sized_graphs(),
    strategies.sampled_from(BIASES),
    strategies.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    strategies.integers(1, 9),
    strategies.integers(1, 3),
    strategies.booleans(),
    strategies.integers(0, 2**20),
)
def test_every_backend_equals_the_reference(case, kind, grouping, dim, batch, padded, seed):
    graph, n, m = case
    heads, kv_heads = grouping
    assume(not (kind in DISTANCES and refuses_distances(graph, n, m)))
    q, k, v = tensors(n, m, heads=heads, kv_heads=kv_heads, dim=dim, batch=batch, seed=seed)
    bias, learned = biases(kind, graph, n, m, heads, batch)
    mask = torch.rand(batch, m, generator=torch.Generator().manual_seed(seed)) < 0.7 if padded else None
    expected = results(q, k, v, graph, bias, learned, "reference", attention_mask=mask)
    for backend in ("edges", "dense", "tiles", "rows", "auto"):
        assert_equal(results(q, k, v, graph, bias, learned, backend, attention_mask=mask), expected)


@given(sized_graphs(heads=2), strategies.sampled_from(BIASES), strategies.integers(0, 2**20))
def test_graphs_of_heads_equal_the_reference(case, kind, seed):
    graph, n, m = case
    assume(not (kind in DISTANCES and refuses_distances(graph, n, m)))
    q, k, v = tensors(n, m, heads=2, kv_heads=1, seed=seed)
    bias, learned = biases(kind, graph, n, m, 2)
    expected = results(q, k, v, graph, bias, learned, "reference")
    for backend in ("edges", "dense", "tiles", "rows", "auto"):
        assert_equal(results(q, k, v, graph, bias, learned, backend), expected)


@strategies.composite
def with_heads(draw, n, m, depth=2):
    """A graph of two heads that fits n queries and m keys: graphs for each head anywhere within an expression."""

    def plain(rows=n, columns=m):
        return draw(graphs(rows, columns, 1))

    def part(rows=n, columns=m):
        return draw(with_heads(rows, columns, depth - 1))

    match draw(strategies.sampled_from([*"||&-^~", "T", "rows", "global", "disjoint", "beside", "@"])) if depth else "":
        case "|":
            return part() | plain()
        case "&":
            return plain() & part()
        case "-":
            return part() - part()
        case "^":
            return part() ^ plain()
        case "~":
            return ~part()
        case "T":
            return part(m, n).T
        case "rows":
            start = draw(few)
            return part(n + start, m).sized(n + start, m).rows(start, n + start)
        case "global" if n and m:
            return part(n - 1, m - 1).with_global_nodes(1)
        case "disjoint":
            rows, columns = draw(strategies.integers(0, n)), draw(strategies.integers(0, m))
            return Disjoint([part(rows, columns).sized(rows, columns), plain(n - rows, m - columns)])
        case "beside":
            columns = draw(strategies.integers(0, m))
            return Beside(plain(n, columns).sized(n, columns), part(n, m - columns))
        case "@":
            between = draw(few)
            return part(n, between).sized(n, between) @ plain(between, m).sized(between, m)
    one, other = plain(), plain()
    return PerHead([one.sized(n, m) if draw(strategies.booleans()) else one, other])


@given(strategies.data(), few, few)
def test_graphs_for_each_head_within_any_expression(data, n, m):
    graph = data.draw(with_heads(n, m))
    mask = graph.mask(n, m)
    assert mask.shape == (2, n, m)
    query, key = mask.any(0).nonzero().unbind(1)
    assert graph.num_edges(n, m) == mask.sum()
    assert torch.equal(graph.edge_index(n, m), torch.stack([key, query]))
    assert torch.equal(graph.edge_heads(n, m), mask[:, query, key])
    assert torch.equal(graph.in_degrees(n, m), mask.sum(-1))
    assert torch.equal(graph.out_degrees(n, m), mask.sum(-2))
    assert parse(repr(graph)) == graph
    q, k, v = tensors(n, m, heads=2, kv_heads=1)
    expected = results(q, k, v, from_dense(mask), None, None, "reference")
    for backend in ("reference", "edges", "dense", "tiles", "rows", "auto"):
        assert_equal(results(q, k, v, graph, None, None, backend), expected)


@given(strategies.text("Causl()Window|&~^-@.T[]0123456789, PrefixEdgList=*\n'\"_:{}", max_size=60))
def test_parse_gives_a_graph_or_a_value_error(text):
    try:
        graph = parse(text)
    except ValueError:
        return
    assert parse(repr(graph)) == graph


@pytest.mark.parametrize("expression", ["Causal() @ Causal()", "Window(1, 1) @ Window(1, 1) @ Window(1, 1)"])
def test_hops_compose(expression):
    mask = torch.ones(1)
    for factor in expression.split(" @ "):
        mask = mask @ parse(factor).mask(7, 7).float() if mask.ndim == 2 else parse(factor).mask(7, 7).float()
    assert torch.equal(parse(expression).mask(7, 7), mask > 0)


scores = strategies.sampled_from(["dot", SoftCap(0.7), LeakyReLU(0.2), "additive", Temperature(torch.tensor(0.5))])
normalisers = strategies.sampled_from(["softmax", "sigmoid", "none", "relu", "squared_relu", torch.tanh])


@given(
    sized_graphs() | sized_graphs(heads=4),
    scores,
    normalisers,
    strategies.sampled_from([0.0, 0.3]),
    strategies.sampled_from([1, 2, 4]),
    strategies.sampled_from(["none", "edges", "dense-keys"]),
    strategies.booleans(),
)
def test_scores_weights_and_dropout_equal_the_reference(case, score, normalize, dropout_p, kv_heads, kind, padded):
    graph, n, m = case
    sides = tensors(n, m, kv_heads=kv_heads)
    bias, _ = biases(kind, graph, n, m)
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(3)) < 0.6 if padded else None
    found = {}
    fused = normalize != torch.tanh and (score == "dot" or isinstance(score, SoftCap | LeakyReLU))
    for backend in ("reference", "edges", *(("tiles", "rows") if fused else ("steps",)), "auto"):
        torch.manual_seed(5)
        options = {"score": score, "normalize": normalize, "bias": bias, "attention_mask": mask}
        out, weights = attend(*sides, graph, backend=backend, dropout_p=dropout_p, return_weights=True, **options)
        loss = (out * torch.linspace(1, 2, out.numel()).view_as(out)).sum() + weights.square().sum()
        loss = loss + 0 * sum(side.sum() for side in sides)
        found[backend] = (out, weights, *torch.autograd.grad(loss, sides))
    for backend in found:
        for one, other in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
