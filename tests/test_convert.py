"""Graphs of other libraries survive the way in and out."""

import copy
import pickle
import random
from types import SimpleNamespace

import networkx
import pytest
import scipy.sparse
import torch
from graphs import GRAPHS
from torch_geometric.data import Data
from torch_geometric.utils import to_dense_adj

from attngraph import (
    Causal,
    EdgeBias,
    EdgeList,
    PerHead,
    Window,
    attend,
    from_dense,
    from_edge_index,
    from_function,
    from_networkx,
    from_scipy_sparse_matrix,
    to_networkx,
    to_scipy_sparse_matrix,
)
from attngraph.nn import Transformer, TransformerConfig

CONFIG = TransformerConfig(embed_dim=8, num_layers=2, num_heads=2, position="none")
every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")


@every
def test_masks_and_edge_index_round_trip(case):
    assert torch.equal(from_dense(case.mask).mask(), case.mask)
    edges = case.graph.edge_index(case.n, case.m)
    again = from_edge_index(edges, size=(case.m, case.n))
    assert torch.equal(again.edge_index(), edges)


@every
def test_scipy_and_networkx_round_trip(case):
    edges = case.graph.edge_index(case.n, case.m)
    matrix = to_scipy_sparse_matrix(case.graph, case.n, case.m)
    assert matrix.shape == (case.m, case.n)
    assert torch.equal(from_scipy_sparse_matrix(matrix).edge_index(), edges)
    found = to_networkx(case.graph, case.n, case.m)
    assert torch.equal(from_networkx(found).graph.edge_index(), edges)
    assert found.number_of_nodes() == max(case.n, case.m)


@pytest.mark.parametrize("number", range(0, 1253, 50))
def test_graphs_of_the_atlas(number):
    atlas = networkx.graph_atlas(number)
    adjacency = torch.from_numpy(networkx.to_numpy_array(atlas)).bool() if len(atlas) else torch.zeros(0, 0).bool()
    assert torch.equal(from_networkx(atlas).graph.mask(), adjacency)


def test_direction_is_pygs_and_networkxs():
    """An edge from 0 to 1: query 1 hears key 0, so row 1 of the mask is True in column 0."""
    mask = torch.tensor([[False, False], [True, False]])
    assert torch.equal(from_edge_index(torch.tensor([[0], [1]]), 2).mask(), mask)
    assert torch.equal(from_networkx(networkx.DiGraph([(0, 1)])).graph.mask(), mask)
    assert torch.equal(from_scipy_sparse_matrix(scipy.sparse.coo_matrix([[0, 1], [0, 0]])).mask(), mask)
    assert torch.equal(from_dense(mask).edge_index(), torch.tensor([[0], [1]]))
    data = Data(edge_index=from_dense(mask).edge_index(), num_nodes=2)
    assert to_dense_adj(data.edge_index)[0].T.bool().tolist() == mask.tolist()


def test_networkx_numbers_keep_their_node():
    """Positions of a sequence must not be scrambled by the order of insertion."""
    graph = networkx.DiGraph()
    graph.add_nodes_from([2, 0, 1])
    graph.add_edge(2, 0)
    assert from_networkx(graph).graph == EdgeList([[2], [0]], 3)
    named = networkx.DiGraph([("c", "a")])
    assert from_networkx(named).graph == EdgeList([[0], [1]], 2)
    assert from_networkx(named, nodelist=["a", "c"]).graph == EdgeList([[1], [0]], 2)


def test_undirected_edges_are_heard_in_both_directions_and_loops_once():
    graph = networkx.Graph([(0, 1), (1, 1)])
    assert from_networkx(graph).graph == EdgeList([[0, 1, 1], [1, 0, 1]], 2)
    assert from_networkx(networkx.MultiDiGraph([(0, 1), (0, 1)])).graph.num_edges() == 1


@pytest.mark.parametrize("kind", [networkx.Graph, networkx.DiGraph, networkx.MultiGraph, networkx.MultiDiGraph])
def test_weights_of_networkx_are_those_of_its_matrix(kind):
    """Undirected ones in both directions, loops once, parallel ones added up, whatever order the edges have."""
    names, chance = ["d", "a", "c", "b"], random.Random(3)
    pairs = [("d", "a"), ("b", "d"), ("c", "c"), ("a", "b"), ("a", "d"), ("b", "a"), ("c", "c"), ("b", "c")]
    theirs = kind()
    theirs.add_nodes_from(names)
    theirs.add_weighted_edges_from([(u, v, chance.random()) for u, v in pairs], "strength")
    graph, nodes, values = from_networkx(theirs, edge_attr="strength")
    assert nodes == names
    key, query = graph.edge_index()
    matrix = torch.from_numpy(networkx.to_numpy_array(theirs, weight="strength")).float()
    torch.testing.assert_close(values, matrix[key, query])
    assert graph.num_edges() == int((matrix != 0).sum())
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    expected = attend(q, k, v, graph, bias=matrix.T, backend="reference")
    for bias in (EdgeBias.of(graph, values), EdgeBias.of(graph.edge_index(), values), EdgeBias.sorted(values)):
        torch.testing.assert_close(attend(q, k, v, graph, bias=bias), expected)

    again = to_networkx(graph, nodes=nodes, weights=values, edge_attr="strength")
    assert list(again) == names
    assert from_networkx(again, names).graph == graph
    torch.testing.assert_close(from_networkx(again, edge_attr="strength").values, values)


def test_names_and_numbers_of_networkx():
    graph, nodes, values = from_networkx(networkx.path_graph(3))
    assert (nodes, values) == ([0, 1, 2], None)
    turned = from_networkx(networkx.path_graph(["x", "y", "z"]), nodelist=["z", "y", "x"])
    assert turned == (graph, ["z", "y", "x"], None)
    assert from_networkx(networkx.Graph(), edge_attr="weight").values.shape == (0,)
    part = networkx.Graph()
    part.add_edge("a", "b", weight=1)
    part.add_edge("b", "c")
    with pytest.raises(
        ValueError, match=r"edge_attr must be an attribute of every edge .*\('b', 'c'\) lacks.*setdefault"
    ):
        from_networkx(part, edge_attr="weight")
    part.edges["b", "c"]["weight"] = "much"
    with pytest.raises(TypeError, match=r"edge_attr must be an attribute that is a number .got 'much'"):
        from_networkx(part, edge_attr="weight")
    with pytest.raises(ValueError, match="nodes must name each of 3 nodes once"):
        to_networkx(graph, nodes="aab")
    with pytest.raises(ValueError, match=r"weights must have shape \(4,\), one for each edge, or .*got \(3,\)"):
        to_networkx(graph, weights=torch.ones(3))
    q, k, v = torch.randn(3, 1, 1, 3, 4)
    for use in (lambda: attend(q, k, v, turned), lambda: Transformer(CONFIG, turned)):
        with pytest.raises(TypeError, match=r"did you mean its .graph"):
            use()


@pytest.mark.parametrize("kind", [networkx.DiGraph, networkx.MultiDiGraph, networkx.Graph, networkx.MultiGraph])
def test_several_attributes_are_features_of_the_edges(kind):
    theirs = kind()
    pairs = [("d", "a"), ("b", "d"), ("c", "c"), ("a", "b"), ("a", "d"), ("c", "c")]
    for place, (u, v) in enumerate(pairs):
        theirs.add_edge(u, v, far=place / 7, strong=2**place, known=place % 2 == 0)
    names = ["far", "strong", "known"]
    graph, _, values = from_networkx(theirs, edge_attr=names)
    assert values.shape == (graph.num_edges(), 3)
    for column, name in zip(values.T, names, strict=True):
        torch.testing.assert_close(column, from_networkx(theirs, edge_attr=name).values)
    assert from_networkx(theirs, edge_attr=[]).values.shape == (graph.num_edges(), 0)
    assert from_networkx(theirs, edge_attr="far").bias.values.shape == (graph.num_edges(),)
    assert from_networkx(theirs).bias is None
    with pytest.raises(ValueError, match=r"one number for each edge .got 3 attributes"):
        from_networkx(theirs, edge_attr=names).bias  # noqa: B018
    with pytest.raises(ValueError, match="lacks"):
        from_networkx(theirs, edge_attr=["far", "near"])


def test_a_bias_of_networkx_in_one_call():
    made = from_networkx(networkx.les_miserables_graph(), edge_attr="weight")
    matrix = torch.from_numpy(networkx.to_numpy_array(networkx.les_miserables_graph())).float()
    q, k, v = torch.randn(3, 1, 2, len(made.nodes), 8)
    expected = attend(q, k, v, made.graph, bias=matrix, backend="reference")
    torch.testing.assert_close(attend(q, k, v, made.graph, bias=made.bias), expected)


def two_sides(kind):
    """Edges between readers and books, from book to reader where directed; the nodes in a mixed order."""
    theirs = kind()
    for node, side in [("Emma", 1), ("Bob", 0), ("Ann", 0), ("Ulysses", 1), ("Cid", 0), (("a", "tuple"), 1)]:
        theirs.add_node(node, bipartite=side)
    pairs = [("Emma", "Ann"), ("Ulysses", "Cid"), ("Ulysses", "Ann"), (("a", "tuple"), "Cid")]
    theirs.add_weighted_edges_from([(book, reader, place + 0.5) for place, (book, reader) in enumerate(pairs)])
    return theirs


@pytest.mark.parametrize("kind", [networkx.Graph, networkx.DiGraph, networkx.MultiGraph, networkx.MultiDiGraph])
def test_of_two_sides_the_top_ones_are_queries(kind):
    theirs, top, bottom = two_sides(kind), ["Ann", "Bob", "Cid"], [("a", "tuple"), "Ulysses", "Emma"]
    made = from_networkx(theirs, edge_attr="weight", top=top, bottom=bottom)
    undirected = networkx.Graph(theirs.to_undirected())
    matrix = torch.from_numpy(networkx.bipartite.biadjacency_matrix(undirected, top, bottom).toarray()).float()
    assert torch.equal(made.graph.mask(), matrix != 0)
    key, query = made.graph.edge_index()
    torch.testing.assert_close(made.values, matrix[query, key])
    assert (made.queries, made.keys, made.nodes) == (top, bottom, top + bottom)
    by_attribute = from_networkx(theirs, bipartite=True)
    assert by_attribute.queries == ["Bob", "Ann", "Cid"]
    assert by_attribute.keys == ["Emma", "Ulysses", ("a", "tuple")]
    for alone in ({"top": top}, {"bottom": by_attribute.keys}):
        found = from_networkx(theirs, **alone)
        assert found.keys == by_attribute.keys
        assert sorted(found.queries) == top
        assert found.graph.num_edges() == 4

    again = to_networkx(made.graph, nodes=made.nodes, weights=made.values)
    assert networkx.get_node_attributes(again, "bipartite") == networkx.get_node_attributes(theirs, "bipartite")
    assert {(*sorted(map(str, edge)), weight) for *edge, weight in again.edges(data="weight")} == {
        (*sorted(map(str, edge)), weight) for *edge, weight in undirected.edges(data="weight")
    }
    back = from_networkx(again, edge_attr="weight", bipartite=True)
    assert (back.graph, back.nodes) == (made.graph, made.nodes)
    assert torch.equal(back.values, made.values)


def test_two_sides_may_be_unequal_or_empty():
    for n, m in ((2, 5), (5, 2), (3, 3), (0, 3), (3, 0), (0, 0)):
        theirs = networkx.complete_bipartite_graph(n, m)
        made = from_networkx(theirs, bipartite=True)
        assert made.graph.size == (n, m)
        assert made.graph.num_edges() == n * m
        assert (made.queries, made.keys) == ([*range(n)], [*range(n, n + m)])


def test_what_two_sides_are_not_is_told():
    theirs = two_sides(networkx.DiGraph)
    with pytest.raises(ValueError, match=r"from bottom to top .*'Emma' → 'Ann'.*G\.reverse"):
        from_networkx(theirs, bottom=["Bob", "Ann", "Cid"])
    theirs.add_edge("Ann", "Bob")
    for kind in (networkx.DiGraph, networkx.Graph):
        with pytest.raises(ValueError, match=r"two sides of all edges.*('Ann' → 'Bob'|'Bob' → 'Ann')"):
            from_networkx(kind(theirs), top=["Ann", "Bob", "Cid"])
    with pytest.raises(ValueError, match=r"top and bottom must name each node of the graph once .differing: .*Ulysses"):
        from_networkx(theirs, top=["Ann", "Bob", "Cid"], bottom=["Emma"])
    with pytest.raises(ValueError, match="a node is named twice"):
        from_networkx(networkx.path_graph(2), top=[0, 1], bottom=[1])
    with pytest.raises(ValueError, match="nodelist must be None"):
        from_networkx(theirs, list(theirs), bipartite=True)
    with pytest.raises(ValueError, match=r"bipartite must be an attribute of every node, 0 or 1 .got None of 0"):
        from_networkx(networkx.path_graph(2), bipartite=True)


def test_attention_weights_are_edge_attributes():
    graph, names, _ = from_networkx(networkx.davis_southern_women_graph())
    q, k, v = torch.randn(3, 3, 2, len(names), 8, requires_grad=True)
    weights = attend(q, k, v, graph, return_weights=True)[1]
    key, query = graph.edge_index().tolist()
    pairs = [(names[u], names[v]) for u, v in zip(key, query, strict=True)]
    for given in (weights, weights[0], weights[0, 1], weights.bfloat16()):
        mean, every = (to_networkx(graph, nodes=names, weights=given, reduce=how) for how in ("mean", None))
        assert list(mean) == list(every) == names
        for pair, each in zip(pairs, given.unbind(-1), strict=True):
            assert mean.edges[pair]["weight"] == pytest.approx(each.float().mean().item(), rel=1e-3)
            assert every.edges[pair]["weight"] == each.tolist()
    for node in names:  # the weights of all keys of a query
        assert mean.in_degree(node, weight="weight") == pytest.approx(1, abs=0.05)
    for wrong in (weights[None], weights[..., 1:], weights.mT):
        with pytest.raises(ValueError, match=r"weights must have shape .178,., one for each edge, or .H, 178. or"):
            to_networkx(graph, nodes=names, weights=wrong)
        with pytest.raises(ValueError, match="weights must have shape"):
            to_scipy_sparse_matrix(graph, weights=wrong)
    assert to_networkx(EdgeList([[], []], 3), weights=torch.ones(2, 0)).number_of_edges() == 0


FORMATS = ["coo", "csr", "csc"]


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_scipy_in_every_format_both_ways(format, array):
    graph, weights = EdgeList([[0, 3, 1, 3], [2, 0, 0, 1]], (3, 4)), torch.rand(2, 3, 4)
    made = to_scipy_sparse_matrix(graph, format=format, array=array)
    assert made.format == format
    assert isinstance(made, scipy.sparse.sparray if array else scipy.sparse.spmatrix)
    assert made.toarray().tolist() == graph.mask().T.int().tolist()
    assert from_scipy_sparse_matrix(made) == graph
    filled = to_scipy_sparse_matrix(graph, weights=weights, format=format, array=array)
    key, query = graph.edge_index()
    torch.testing.assert_close(torch.from_numpy(filled.toarray())[key, query], weights.mean((0, 1)))
    assert to_scipy_sparse_matrix(graph, weights=weights.half()).dtype == "float32"
    assert to_scipy_sparse_matrix(graph, weights=torch.arange(4)).dtype == "int64"


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "float32", "float64"])
@pytest.mark.parametrize("kind", [f"{name}_{of}" for name in [*FORMATS, "lil", "dok"] for of in ("array", "matrix")])
def test_scipy_of_any_numbers_and_kind(kind, dtype):
    dense = (torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.4).numpy()
    matrix = getattr(scipy.sparse, kind)(dense.astype(dtype))
    assert from_scipy_sparse_matrix(matrix).mask().T.tolist() == dense.tolist()


@pytest.mark.parametrize("kind", [scipy.sparse.csr_array, scipy.sparse.csr_matrix])
def test_scipy_with_zeros_duplicates_and_no_order(kind):
    values, column, start = [5.0, 0.0, 2.0, 3.0, 4.0], [2, 0, 1, 1, 0], [0, 2, 4, 4, 5]
    graph = from_scipy_sparse_matrix(kind((values, column, start), shape=(4, 3)))
    assert graph.size == (3, 4)
    assert graph == EdgeList([[0, 0, 1, 3], [2, 0, 1, 0]], (3, 4))  # the zero is an edge, the two of (1, 1) are one
    matrix = kind(([5.0, 0.0, 2.0, 4.0], [2, 0, 1, 0], [0, 2, 3, 3, 4]), shape=(4, 3))
    bias = EdgeBias.of(from_scipy_sparse_matrix(matrix), torch.from_numpy(matrix.tocoo().data).float())
    q, (k, v) = torch.randn(1, 1, 3, 8), torch.randn(2, 1, 1, 4, 8)
    expected = attend(q, k, v, graph, bias=torch.from_numpy(matrix.toarray()).float().T, backend="reference")
    torch.testing.assert_close(attend(q, k, v, graph, bias=bias), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_scipy_arrays_of_other_dimensions_are_refused(shape):
    array = SimpleNamespace(tocoo=lambda: SimpleNamespace(shape=shape))  # which SciPy has from 1.13 on
    with pytest.raises(ValueError, match=r"matrix must have two dimensions, sources and targets .got shape"):
        from_scipy_sparse_matrix(array)
    with pytest.raises(TypeError, match=r"from_dense.matrix.T."):
        from_scipy_sparse_matrix(torch.ones(2, 2).numpy())


def test_heads_and_sizes():
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert isinstance(from_dense(mask), PerHead)
    assert torch.equal(from_dense(mask).mask(), mask)
    assert from_edge_index(torch.tensor([[0, 4], [1, 2]])).size == (5, 5)
    assert from_edge_index(torch.tensor([[0, 4], [1, 2]]), num_nodes=7).size == (7, 7)
    edges = torch.tensor([[0, 4], [1, 2]])
    assert from_edge_index(edges, size=(6, 3)).size == (3, 6)  # sources are keys, targets queries
    assert from_edge_index(edges, size=(None, 4)).size == (4, 5)
    with pytest.raises(ValueError, match=r"a source 4, but size says 3 sources.*\(num_sources, num_targets\)"):
        from_edge_index(edges, size=(3, 6))
    with pytest.raises(ValueError, match="give num_nodes, or size"):
        from_edge_index(edges, 5, size=(5, 5))
    assert from_edge_index(torch.zeros(2, 0, dtype=torch.int64)).size == (0, 0)
    assert from_function(lambda q, k: q > k, size=(3, 4)).size == (3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_networkx(networkx.path_graph(3), nodelist=[0, 1]), "must name each node of the graph once"),
        (lambda: from_networkx(networkx.path_graph(2), nodelist=[0, 0]), "must name each node of the graph once"),
        (lambda: from_dense(torch.ones(3)), "a mask (N, M), or (H, N, M)"),
        (lambda: to_networkx(Causal()), "give the missing number"),
        (lambda: to_networkx(Window(1, 0), 3, -1), "m must be a number of nodes"),
    ],
)
def test_bad_input_is_an_error(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_networkx([(0, 1)]), r"networkx.DiGraph\(edges\)"),
        (lambda: from_function(lambda b, h, q, k: q >= k), r"lambda q, k: mask_mod\(0, 0, q, k\)"),
        (lambda: from_function(lambda q: q), r"a function of \(q_idx, kv_idx\) \(got one of \(q\)\)"),
        (lambda: from_function(lambda q, k: q >= k and q < 4).mask(5, 5), "combine them by & | ~"),
        (lambda: Causal() & torch.ones(2, 2), r"got a Tensor\); a mask becomes one by from_dense"),
        (lambda: torch.ones(2, 2) & Causal(), r"got a Tensor\); a mask becomes one by from_dense"),
        (lambda: Causal() & Window, r"did you mean Window\(\)"),
    ],
)
def test_what_was_meant_is_told(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("masked", [torch.finfo(torch.float32).min, -1e4, -1e9])
def test_an_additive_mask_is_no_mask(masked):
    with pytest.raises(ValueError, match=r"got an additive mask, .* from_dense\(mask == 0\)"):
        from_dense(torch.tensor([[0, masked], [0, 0]]))
    assert from_dense(torch.tensor([[0.5, -2.0], [0, 0]])).num_edges() == 2  # signed weights


class Alike:
    """Callable, comparable, and so not hashable."""

    def __eq__(self, other):
        return isinstance(other, Alike)

    def __call__(self, q_idx, kv_idx):
        return q_idx >= kv_idx


def test_any_callable_is_a_predicate_and_any_nodelist_a_list():
    assert from_function(Alike()).num_edges(3, 3) == 6
    assert from_networkx(networkx.path_graph(3), nodelist=iter([2, 1, 0])).graph.num_edges() == 4


def test_the_graph_of_a_tensor_is_remembered_until_it_changes():
    edge_index = torch.tensor([[0, 1], [1, 2]])
    graph = from_edge_index(edge_index, 3)
    assert from_edge_index(edge_index, 3) is graph
    assert from_edge_index(edge_index, 4) != graph
    edge_index[0, 0] = 2
    assert from_edge_index(edge_index, 4).edge_index().tolist() == [[2, 1], [1, 2]]
    assert from_edge_index(torch.tensor([[2, 1], [1, 2]]), 4) == from_edge_index(edge_index, 4)
    edge_index.numpy()[1, 1] = 3  # which the tensor does not count as a change
    assert from_edge_index(edge_index, 4).edge_index().tolist() == [[2, 1], [1, 3]]
    with pytest.raises(TypeError, match="num_targets"):
        from_edge_index(edge_index, size=(4, 4.0))
    with torch.inference_mode():
        made = torch.tensor([[0, 1], [1, 2]])
        assert from_edge_index(made) == from_edge_index([[0, 1], [1, 2]])


def test_a_change_that_any_polynomial_misses_is_seen():
    edge_index = torch.full((2, 16), 5)
    graph = from_edge_index(edge_index, 20)
    edge_index.view(-1)[:16] += torch.tensor([1, -1, -1, 1, -1, 1, 1, -1, -1, 1, 1, -1, 1, -1, -1, 1])
    assert from_edge_index(edge_index, 20) != graph


def test_a_copy_of_an_edge_list_keeps_the_given_order():
    graph = from_edge_index(torch.tensor([[2, 0, 2], [1, 1, 1]]), 3)
    for other in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
        assert other == graph
        assert torch.equal(other.position, graph.position)
        assert torch.equal(other.order, graph.order)


def test_graphs_are_equal_where_their_edges_are():
    chance = torch.Generator().manual_seed(0)
    edges = torch.randint(1 << 20, (2, 5000), generator=chance)
    graph = EdgeList(edges, 1 << 20)
    assert graph == EdgeList(edges[:, torch.randperm(5000, generator=chance)], 1 << 20)
    assert graph != EdgeList(edges, 1 << 21)
    texts = set()
    for column in range(200):
        other = edges.clone()
        other[column % 2, column] ^= 1
        texts.add(EdgeList(other, 1 << 20)._key)
    assert len(texts | {graph._key}) == 201
