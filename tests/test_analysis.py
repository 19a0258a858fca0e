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
    ChunkEnds,
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
from attngraph.__main__ import main

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
        lambda: ChunkEnds(few + 2, rng.randrange(few + 2), rng.randrange(4)),
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
    alive = [sum(key <= query <= max(key, last[key]) for key in range(n)) for query in range(n)]
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


@pytest.mark.share(13)
@pytest.mark.parametrize("seed", range(100))
def test_ten_random_graphs_get_the_answers_of_networkx(seed):
    rng = random.Random(seed)
    for _ in range(10):
        n = rng.choice([rng.randrange(1, 13), rng.randrange(13, 40)])
        stack = [some_layer(rng, n)] * 2 if rng.random() < 0.5 else [some_layer(rng, n) for _ in range(3)]
        require_the_answers_of_networkx(stack, [graph.mask(n, n) for graph in stack], n)


# -------------------------------------------------------------------------------------- through many layers


def test_a_planted_edge_into_the_future_is_found_with_its_way():
    for planted in (0, 7, 11):
        layers = [Causal() & (Window(16, 0) | Prefix(4))] * 12
        layers[planted] = layers[planted] | EdgeList([[900], [313]], size=1000)
        assert analysis.leaks(layers, 1000) == [(planted, 900, 313)]
        assert analysis.leak_path(layers, 1000) == [900] * (planted + 1) + [313] * (12 - planted)
        assert analysis.path(layers, 900, 313, 1000) == analysis.leak_path(layers, 1000)
        assert analysis.path(layers, 901, 313, 1000) == []
    by_head = PerHead([Causal(), Causal() | EdgeList([[9], [3]], size=20)])
    assert analysis.leak_path([Causal(), by_head, Causal()], 20) == [9, 9, 3, 3]
    assert analysis.leak_path([Causal()] * 3) == []


def test_the_receptive_field_of_a_million_nodes_takes_milliseconds():
    layers, n = [Window(256, 0) | Prefix(4)] * 24, 1_000_000
    expected = [*range(4), *range(n - 1 - 24 * 256, n)]
    assert analysis.receptive_field(layers, n - 1, n).tolist() == expected
    assert analysis.growth(layers, n - 1, n) == [4 + 256 * depth + 1 for depth in range(1, 25)]
    times = []
    for _ in range(5):
        began = time.process_time()
        analysis.receptive_field(layers, n - 1, n)
        times.append(time.process_time() - began)
    assert min(times) < 0.05


@pytest.mark.parametrize(
    "graph",
    [
        Causal() & (Strided(16) | Window(15, 0)),
        Window(2, 0, 8) | Chunks(50, 7),
        Causal() - Random(3),
        (Strided(7) | Window(0, 2) & Strided(2)) - Random(60),
        Window(3, 0) | Random(1),
        Global([5, 300]) & Strided(2),
        Tree([-1, *range(599)]),
        EdgeList([[599, *range(0, 300, 3)], [0, *range(3, 303, 3)]], size=600),
        Window(1, 0, 50) & Prefix(100) | EdgeList([[7, 500], [500, 3]], size=600),
        Documents([100, 0, 1, 499]).T @ Window(0, 1),
        from_function(lambda q, k: (q - k) % 25 == 3),
    ],
    ids=str,
)
def test_larger_graphs_are_walked_as_their_masks_say(graph):
    n = 600
    step = (graph.mask(n, n) | torch.eye(n, dtype=torch.bool)).float()
    twice = step @ step > 0
    for node in (0, 1, 299, 599):
        field = twice[node].nonzero()[:, 0]
        assert torch.equal(analysis.receptive_field([graph] * 2, node, n), field)
        assert analysis.growth([graph] * 2, node, n) == [int(step[node].sum()), len(field)]
    hops, reached = 0, torch.eye(n, dtype=torch.bool)
    while not torch.equal(further := (step @ reached.float() > 0), reached):
        hops, reached = hops + 1, further
    assert analysis.diameter(graph, n) == hops
    parts = {min(nodes): nodes for nodes in networkx.weakly_connected_components(messages(graph.mask(n, n)))}
    labels = analysis.components(graph, n).tolist()
    assert [sorted(parts[first]) for first in sorted(parts)] == [
        [i for i in range(n) if labels[i] == part] for part in range(max(labels) + 1)
    ]
    last = torch.where(graph.mask(n, n), torch.arange(n)[:, None], -1).amax(0)
    assert torch.equal(analysis.last_reader(graph, n), last)


def test_bridges_are_the_worst_bottlenecks():
    found = analysis.bottlenecks(Documents([20, 20]) | EdgeList([[19], [20]], size=40))
    assert found.edges[:, 0].tolist() == [19, 20]
    assert found.resistance[0] == pytest.approx(1)
    assert found.resistance[1:].tolist() == pytest.approx([2 / 20] * 2 * 190)  # of a clique of c nodes, 2 / c
    assert found.edges[:, 1:4].T.tolist() == [[0, 1], [0, 2], [0, 3]]  # equal ones in order


# ---------------------------------------------------------------------------------------------------- costs


def test_a_cache_holds_the_keys_that_are_heard_later():
    window = Causal() & (Window(256, 0) | Prefix(4))
    assert analysis.peak_alive(window, 1000) == analysis.peak_alive(window, 100_000) == 261
    assert analysis.peak_alive(window, 100) == 100
    assert analysis.peak_alive(Causal() & Chunks(64), 1000) == 64
    assert analysis.peak_alive(Documents([30, 50, 20]) & Causal()) == 50
    assert analysis.peak_alive(Causal(-1), 7) == 7  # the last is heard by nobody, and there when it comes
    assert analysis.peak_alive(Empty(), 9) == 1
    assert analysis.peak_alive(Full(), 0) == 0
    size = 16 * 4
    cost = analysis.cost(window, 1000, dim=128, heads=8, cache=True)
    assert cost.cache_bytes == 2 * 8 * 261 * size
    assert analysis.cost(window, 1000, dim=128, heads=8, kv_heads=2, cache=True).cache_bytes == 2 * 2 * 261 * size
    half = analysis.cost([window, Causal()], 1000, dim=128, heads=8, kv_heads=2, cache=True, dtype=torch.bfloat16)
    assert half.cache_bytes == 2 * 2 * (261 + 1000) * 16 * 2


def test_a_head_of_keys_holds_what_any_of_its_queries_hears():
    by_head = PerHead([Window(3, 0), Window(9, 0), Window(5, 0), Causal() & Prefix(2)])
    assert [analysis.peak_alive(by_head.of_head(h), 100) for h in range(4)] == [4, 10, 6, 3]
    assert analysis.cost(by_head, 100, dim=4, heads=4, cache=True).cache_bytes == 2 * 4 * (4 + 10 + 6 + 3)
    # Of the last two heads together, six keys of the window and the two first: not more than eight at once.
    assert analysis.cost(by_head, 100, dim=4, heads=4, kv_heads=2, cache=True).cache_bytes == 2 * 4 * (10 + 8)
    assert analysis.peak_alive(by_head, 100) == 12


def test_bytes_and_seconds_are_those_of_all_layers():
    layers = [Causal(), Window(16, 0)]
    cost = analysis.cost(layers, 128, dim=64, heads=4, kv_heads=2, dtype=torch.float16, seconds=True)
    assert cost.bytes == 2 * 128 * 2 * (64 + 32) * 2  # layers, nodes, (q and out, k and v), bytes of a number
    plans = [plan(graph, 128, heads=4, head_dim=16, dtype=torch.float16) for graph in layers]
    assert cost.seconds == sum(each.seconds for each in plans)
    assert cost.layout_bytes == sum(each.nbytes for each in plans)
    assert analysis.cost(layers, 128, dim=64, heads=4)[5:] == (None, None, None)
    twice = analysis.cost(layers * 2, 128, dim=64, heads=4, kv_heads=2, dtype=torch.float16, seconds=True)
    assert (twice.seconds, twice.layout_bytes) == (2 * cost.seconds, cost.layout_bytes)
    assert twice.bytes == 2 * cost.bytes
    found = analysis.compare(*layers, 128, dim=64, heads=4, kv_heads=2, dtype=torch.float16)
    assert (found.only_a, found.only_b) == (128 * 129 // 2 - Window(16, 0).num_edges(128, 128), 0)
    assert found.a.seconds + found.b.seconds == cost.seconds


def test_what_has_no_cache_says_why():
    with pytest.raises(
        ValueError, match=r"Window\(1, 1\) query 0 hears the later key 1: cache=False, or graph & Causal"
    ):
        analysis.cost([Causal(), Window(1, 1)], 8, dim=4, heads=2, cache=True)
    with pytest.raises(ValueError, match="a cache is for nodes that are queries and keys"):
        analysis.cost(Causal().sized(4, 6), dim=4, heads=2, cache=True)
    with pytest.raises(ValueError, match="kv_heads must be a divisor of heads"):
        analysis.cost(Causal(), 8, dim=12, heads=6, kv_heads=4)


@pytest.mark.parametrize(
    "question",
    [
        analysis.leaks, analysis.leak_path, analysis.reach, analysis.diameter, analysis.components,
        analysis.bottlenecks, analysis.last_reader, analysis.peak_alive,
        lambda graph, n: analysis.growth(graph, 0, n), lambda graph, n: analysis.receptive_field(graph, 0, n),
        lambda graph, n: analysis.path(graph, 0, 1, n), lambda graph, n: analysis.cost(graph, n, dim=4, heads=2),
        lambda graph, n: analysis.compare(Causal(), graph, n, dim=4, heads=2),
    ],
)  # fmt: skip
def test_what_queries_and_keys_choose_is_refused(question):
    with pytest.raises(ValueError, match=r"not known before the data: graph.resolve\(q, k\)"):
        question(TopK(2), 8)


def test_a_choice_among_the_past_is_causal():
    assert analysis.leaks([TopK(2) & Causal(), Causal()]) == []


# --------------------------------------------------------------------------------------- python -m attngraph


def printed(capsys, *arguments):
    main(list(arguments))
    return capsys.readouterr().out


def test_show_prints_the_facts(capsys):
    text = "Causal() & (Window(64, 0) | Prefix(4))"
    told = printed(capsys, "show", text, "--size", "1024", "--layers", "6", "--facts")
    facts = {line[:17].strip(): line[17:] for line in told.splitlines()}
    assert facts["graph"] == text
    assert facts["edges"].startswith(f"{6 * 68310:,} of all layers, 6.51% of all pairs")
    assert facts["causal"] == "yes"
    assert facts["receptive field"] == "of node 1,023 after each layer: 69, 133, 197, 261, 325, 389"
    assert (facts["components"], facts["diameter"]) == ("1", "16")
    assert facts["cache"].startswith(f"{6 * 8 * 69:,} keys and values of all layers and heads, 1.617 MiB, at most")
    assert "ms" in facts["expected"]
    told = printed(capsys, "show", "Causal(), Causal() | Prefix(2), Documents([3, 4])", "--facts")
    assert "no: in layer 1 query 0 hears the later key 1; input to output 1 → 1 → 0 → 0" in told


def test_explain_prints_the_plan(capsys):
    told = printed(capsys, "explain", "Causal() & Window(64, 0)", "--size", "512", "--dim", "128", "--heads", "2")
    assert told.strip() == plan(Causal() & Window(64, 0), 512, heads=2, head_dim=64).explain()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "Causal()"], "give one, as --size 1024"),
        (["show", "Causl()", "--size", "8"], "not part of a graph expression"),
        (["show", "Causal()", "--size", "x"], "invalid int value"),
        (["show", "Causal()", "--size", "-3"], "n must be 0 or more"),
        (["show", "TopK(2)", "--size", "8"], "graph.resolve(q, k) gives the graph"),
        (["show", "Documents([3, 4])", "--size", "8"], "the same number of query nodes"),
        (["show", "Causal()", "--size", "8", "--heads", "3"], "dim must be a multiple of heads"),
        (["show", "Causal(), Full()", "--size", "8", "--layers", "3"], "--layers must be 2"),
        (["explain", "Causal(), Full()", "--size", "8"], "the graph of one layer"),
        (["explain", "Causal()", "--size", "8", "--heads", "0"], "--dim must be a multiple"),
        (["explain"], "graph"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in told
    assert told.count("\n") == 1
