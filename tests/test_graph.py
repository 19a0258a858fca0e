"""Laws of graphs: what holds for each of GRAPHS, for the algebra, and for bad input."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from graphs import GRAPHS, Case

from attngraph import (
    Axial,
    Beside,
    Causal,
    ChunkEnds,
    Chunks,
    Disjoint,
    Documents,
    EdgeList,
    Empty,
    Expander,
    Full,
    Global,
    Graph,
    Identity,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    Strided,
    Tree,
    Window,
    above,
    from_dense,
    from_function,
    parse,
)
from attngraph.graph.base import at_size
from attngraph.graph.predicate import Predicate

every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")


def union_of_heads(mask):
    return mask.any(0) if mask.ndim == 3 else mask


@every
def test_mask_is_the_oracle(case: Case):
    assert torch.equal(case.graph.mask(case.n, case.m), case.mask)


@every
def test_edge_index_lists_the_mask_by_query_then_key(case):
    query, key = union_of_heads(case.mask).nonzero().unbind(1)
    assert torch.equal(case.graph.edge_index(case.n, case.m), torch.stack([key, query]))


@every
def test_num_edges_and_degrees_count_the_mask(case):
    assert case.graph.num_edges(case.n, case.m) == case.mask.sum()
    assert torch.equal(case.graph.in_degrees(case.n, case.m), case.mask.sum(-1))
    assert torch.equal(case.graph.out_degrees(case.n, case.m), case.mask.sum(-2))


@every
def test_each_head_is_a_graph(case):
    n, m = case.n, case.m
    which = case.graph.edge_heads(n, m)
    masks = case.mask if case.graph.heads else case.mask[None]
    assert len(which) == (case.graph.heads or 1) == len(masks)
    for h, mask in enumerate(masks):
        head = case.graph.of_head(h)
        assert torch.equal(head.mask(n, m), mask)
        assert torch.equal(case.graph.edge_index(n, m)[:, which[h]], head.edge_index(n, m))
    if case.graph.heads:
        assert case.graph.num_edges(n, m) == sum(case.graph.of_head(h).num_edges(n, m) for h in range(len(masks)))
        with pytest.raises(ValueError, match="index must be that of a head"):
            case.graph.of_head(case.graph.heads)


@every
def test_the_slow_path_agrees(case):
    """Scanning `contains`, as for a graph that knows nothing but its definition."""
    bound, n, m = at_size(case.graph, case.n, case.m)
    if not case.graph.heads:
        assert torch.equal(torch.stack(Graph._edges(bound, n, m)), torch.stack(bound._edges(n, m)))
        assert bound._count(n, m) == case.mask.sum()


@every
def test_repr_round_trips(case):
    if any(isinstance(part, Predicate) for part in (case.graph, *case.graph._children)):
        pytest.skip("a function has no text")
    again = parse(repr(case.graph))
    assert again == case.graph
    assert hash(again) == hash(case.graph)
    assert torch.equal(again.mask(case.n, case.m), case.mask)


@every
def test_graphs_are_values(case):
    if not isinstance(case.graph, Predicate):
        assert pickle.loads(pickle.dumps(case.graph)) == case.graph
    assert copy.deepcopy(case.graph) == case.graph
    assert case.graph != Causal(12345)
    with pytest.raises((AttributeError, TypeError)):
        case.graph.offset = 3


@every
def test_transpose_reverses_and_complement_is_an_involution(case):
    assert torch.equal(case.graph.T.mask(case.m, case.n), case.mask.mT)
    assert torch.equal(case.graph.T.edge_index(case.m, case.n), case.graph.T.T.T.edge_index(case.m, case.n))
    assert torch.equal((~case.graph).mask(case.n, case.m), ~case.mask)
    assert torch.equal((~~case.graph).mask(case.n, case.m), case.mask)


@every
def test_rows_of_rows(case):
    start, stop = case.n // 3, case.n - case.n // 4
    graph = case.graph if case.graph.size[0] is not None else case.graph.sized(case.n, case.m)
    assert torch.equal(graph.rows(start, stop).mask(stop - start, case.m), case.mask[..., start:stop, :])
    assert torch.equal(graph.rows(start, stop).edge_index(None, case.m), graph.rows(start, stop).edge_index(m=case.m))


@pytest.mark.share(3)
@every
@pytest.mark.parametrize("other", [Causal(), Random(2, 5), Window(1, 2), Identity()], ids=repr)
def test_operators_are_those_of_sets(case, other):
    a, b = case.mask, other.mask(case.n, case.m)
    for graph, mask in (
        (case.graph | other, a | b),
        (case.graph & other, a & b),
        (case.graph - other, a & ~b),
        (other - case.graph, b & ~a),
        (case.graph ^ other, a ^ b),
    ):
        assert torch.equal(graph.mask(case.n, case.m), mask)
        assert graph.num_edges(case.n, case.m) == mask.sum()
        assert torch.equal(graph.in_degrees(case.n, case.m), mask.sum(-1))


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        ("Causal()", 10**9 * (10**9 + 1) // 2),
        ("Causal() & Window(1000, 0)", 1001 * 10**9 - 1000 * 1001 // 2),
        ("Full() - Identity()", 10**18 - 10**9),
        ("~Causal()", 10**9 * (10**9 - 1) // 2),
        ("Causal() & Strided(4)", sum((10**9 + r) // 4 * ((10**9 + r) // 4 + 1) // 2 for r in range(4))),
        pytest.param("Chunks(1000)", 10**12, marks=pytest.mark.slow),
        ("ChunkEnds(1000, 3, 1)", 3 * 10**15),
        ("Random(16)", 16 * 10**9),
        ("(Causal() & (Window(2, 0) | Prefix(1))).T", 10**9 * 4 - 3 - 3),
        ("Window(3, 3, 1000)", 7 * 10**9 - 2 * 1000 * 6),
        ("Causal().with_global_nodes(1)", (10**9 - 1) * 10**9 // 2 + 2 * 10**9 - 1),
    ],
)
def test_a_billion_nodes_are_counted_at_once(expression, count):
    assert parse(expression).num_edges(10**9, 10**9) == count


def test_counting_passes_two_to_the_63():
    assert Full().num_edges(2**32, 2**33) == 2**65
    assert Causal().num_edges(2**33, 2**33) == 2**32 * (2**33 + 1)


def test_long_strides_are_counted():
    assert Strided(2**26).num_edges(10**6, 10**6) == 10**6
    assert Strided(2**26).edge_index(3, 3).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_many_documents_are_counted_by_their_lines():
    lengths = [3, 1, 4] * 400
    graph = Causal() & Documents(lengths)
    assert graph.num_edges() == 400 * (6 + 1 + 10)
    assert graph.in_degrees()[:8].tolist() == [1, 2, 3, 1, 1, 2, 3, 4]


def test_random_has_its_degree_and_is_the_same_everywhere():
    graph = Random(5, seed=3)
    assert graph.in_degrees(100, 64).eq(5).all()
    assert Random(5, seed=3) == graph
    assert not torch.equal(Random(5, seed=4).mask(9, 64), graph.mask(9, 64))
    degrees = Random(8).out_degrees(20_000, 100).float()
    assert degrees.mean() == 1600
    assert degrees.std() < 120  # of a binomial: 38; of stretches of 12 or 13 keys, a little more


def test_edge_list_keeps_the_given_order():
    given = torch.tensor([[2, 0, 2, 1], [1, 1, 1, 0]])
    graph = EdgeList(given, 3)
    assert torch.equal(graph.edge_index()[:, graph.position], given)
    assert torch.equal(given[:, graph.order], graph.edge_index())
    assert graph.num_edges() == 3


def test_edge_lists_are_equal_as_sets():
    assert EdgeList([[0, 1], [1, 0]], 2) == EdgeList([[1, 0], [0, 1]], 2)
    assert EdgeList([[0], [1]], 2) != EdgeList([[0], [1]], 3)
    assert len({EdgeList([[0, 1], [1, 0]], 2), EdgeList([[1, 0], [0, 1]], 2)}) == 1


def test_long_edge_lists_have_a_short_text_and_a_whole_repr():
    graph = EdgeList(torch.randint(0, 100, (2, 500), generator=torch.Generator().manual_seed(0)), 100)
    assert len(str(graph)) < 100 < len(repr(graph))
    assert parse(repr(graph)) == graph
    assert str(graph & Causal()).endswith("& Causal()")


class Late(Graph):
    """A definition that looks at the query alone."""

    def contains(self, q_idx, kv_idx):
        return q_idx > 2


class Numbers(Graph):
    """A definition that returns no bool."""

    def contains(self, q_idx, kv_idx):
        return (q_idx >= kv_idx).float()


def test_a_definition_may_broadcast():
    """Found: the edges of a graph that looks at one side alone were miscounted."""
    mask = torch.tensor([False, False, False, True, True])[:, None].expand(5, 4)
    for graph, expected in ((Late(), mask), (Late() & Causal(), mask & Causal().mask(5, 4)), (~Late(), ~mask)):
        assert torch.equal(graph.mask(5, 4), expected)
        assert graph.num_edges(5, 4) == expected.sum()


def test_graphs_without_nodes_can_be_parts():
    for nothing in (Tree([]), Documents([]), EdgeList([[], []], 0)):
        assert nothing.with_global_nodes(2).mask().all()
        assert torch.equal(Disjoint([nothing, Causal()]).mask(3, 3), Causal().mask(3, 3))
        assert Beside(nothing, Causal()).mask(0, 3).shape == (0, 3)


class Undefined(Graph):
    """A graph whose author forgot what it is."""


BAD = [
    (lambda: Window(-1, 0), ValueError, "left must be 0 or more"),
    (lambda: Window(1.5, 0), TypeError, "left must be an int"),
    (lambda: Window(1, 0, 0), ValueError, "dilation must be 1 or more"),
    (lambda: Causal(True), TypeError, "offset must be an int"),
    (lambda: Prefix(-2), ValueError, "length must be 0 or more"),
    (lambda: Strided(0), ValueError, "stride must be 1 or more"),
    (lambda: Chunks(0), ValueError, "chunk must be 1 or more"),
    (lambda: ChunkEnds(0, 0), ValueError, "chunk must be 1 or more"),
    (lambda: ChunkEnds(3, -1), ValueError, "length must be 0 or more"),
    (lambda: ChunkEnds(3, 4), ValueError, "length must be at most chunk (got 4 and 3)"),
    (lambda: Documents([3, -1]), ValueError, "lengths must be 0 or more"),
    (lambda: Documents([3, 4]).mask(8, 8), ValueError, "same number of query nodes (got 7 and 8)"),
    (lambda: Documents(3), TypeError, "lengths must be a list of ints"),
    (lambda: Tree([1, 0]), ValueError, "ends in a cycle"),
    (lambda: Tree([-1, 5]), ValueError, "parents must be node numbers below 2"),
    (lambda: Tree([-2]), ValueError, "parents must be -1 or more"),
    (lambda: Global([-1]), ValueError, "nodes must be 0 or more"),
    (lambda: Neighborhood((4, 4), (1, 2, 3)), ValueError, "one for each axis"),
    (lambda: Neighborhood((4, 0), 1), ValueError, "shape must be 1 or more"),
    (lambda: Axial(()), ValueError, "at least one axis"),
    (lambda: Random(-1), ValueError, "degree must be 0 or more"),
    (lambda: Random(2).contains(torch.tensor(0), torch.tensor(0)), ValueError, "needs its number of keys"),
    (lambda: Expander(3), ValueError, "degree must be even, two for each cycle (got 3)"),
    (lambda: Expander(-2), ValueError, "degree must be 0 or more"),
    (lambda: Expander(2, 0.5), TypeError, "seed must be an int"),
    (lambda: Expander(2, num_nodes=4).mask(5), ValueError, "same number of query nodes (got 4 and 5)"),
    (lambda: Expander(2).contains(torch.tensor(0), torch.tensor(0)), ValueError, "needs its number of nodes"),
    (lambda: EdgeList([[0, 5], [0, 1]], 3), ValueError, "key nodes from 0 to 2"),
    (lambda: EdgeList([[0], [-1]], 3), ValueError, "query nodes from 0 to 2"),
    (lambda: EdgeList([[0], [1]], 1 << 32), ValueError, "below 2**63"),
    (lambda: EdgeList([[0.0], [1.0]], 3), TypeError, "must hold integers"),
    (lambda: EdgeList([[0, 1, 2]], 3), ValueError, "shape (2, E)"),
    (lambda: EdgeList(torch.zeros(3, 4, dtype=torch.int64), 3), ValueError, "shape (2, E)"),
    (lambda: EdgeList(torch.zeros(2, 2, dtype=torch.bool), 3), TypeError, "must hold integers"),
    (lambda: Documents([3]) & Documents([4]), ValueError, "same number of query nodes (got 3 and 4)"),
    (lambda: EdgeList([[0], [0]], (3, 4)) | Causal().sized(3, 5), ValueError, "same number of key nodes (got 4 and 5)"),
    (lambda: EdgeList([[0], [0]], (3, 4)) @ Documents([3]), ValueError, "the keys of a and the queries of b"),
    (lambda: bool(Causal()), TypeError, "no truth value"),
    (lambda: Causal() and Full(), TypeError, "combine graphs with & | ~"),
    (lambda: Causal() & torch.ones(3, 3, dtype=torch.bool), TypeError, "unsupported operand"),
    (lambda: Causal().mask(), ValueError, "give the missing number"),
    (lambda: Causal().mask(-1, 3), ValueError, "n must be a number of nodes, an int from 0"),
    (lambda: Causal().mask(2.0, 3), TypeError, "n must be an int"),
    (lambda: Causal().rows(3, 2), ValueError, "start <= stop"),
    (lambda: Documents([3]).rows(0, 4), ValueError, "3, the graph's number of queries"),
    (lambda: Causal().with_global_nodes(4).mask(2, 2), ValueError, "needs at least that many queries"),
    (lambda: Disjoint([Causal(), Causal()]), ValueError, "must know where each graph begins"),
    (lambda: Disjoint([]), TypeError, "list of at least one graph"),
    (lambda: Disjoint(Causal()), TypeError, "list of at least one graph"),
    (lambda: Beside(Causal(), Causal()), ValueError, "where the keys of b begin"),
    (lambda: above(Causal(), Causal()), ValueError, "where the queries of b begin"),
    (lambda: above(Full().sized(2, 3), Full().sized(2, 4)), ValueError, "graphs of above"),
    (lambda: PerHead([PerHead([Full()])]), ValueError, "without heads of its own"),
    (lambda: PerHead([Full()] * 2) & PerHead([Full()] * 3), ValueError, "different numbers of heads"),
    (lambda: (Causal() @ Causal()).mask(2, 3), ValueError, "number of nodes between them"),
    (lambda: from_function(3), TypeError, "function must be a function"),
    (lambda: from_function(lambda q, k: q - k).mask(2, 2), TypeError, "must return a bool tensor"),
    (lambda: Numbers().mask(2, 2), TypeError, "must return a bool tensor (got torch.float32)"),
    (lambda: from_dense(torch.tensor([[0.0, -torch.inf]])), ValueError, "for a bias, mask > -inf"),
    (lambda: Undefined().mask(2, 2), TypeError, "must define contains"),
    (lambda: Empty().sized(3).sized(4), ValueError, "same number of query nodes (got 3 and 4)"),
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_told(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert message in str(error.value)


def test_importing_is_cheap():
    """A fraction of importing torch; networkx, torch_geometric, matplotlib, scipy, numba wait until they are used."""
    code = (
        "import sys, time; start = time.perf_counter(); import torch; middle = time.perf_counter(); "
        "before = set(sys.modules); import attngraph; end = time.perf_counter(); "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print((end - middle) / (middle - start), *sorted(new & "
        "{'torch_geometric', 'networkx', 'matplotlib', 'scipy', 'safetensors', 'numba'}))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    shares = [run.stdout.split() for run in runs]
    assert min(float(share) for share, *heavy in shares) < 0.25
    assert [heavy for share, *heavy in shares] == [[], [], []]


def test_n_alone_means_as_many_keys():
    graph = Causal() & Window(3, 0)
    assert torch.equal(graph.mask(7), graph.mask(7, 7))
    assert graph.num_edges(7) == graph.num_edges(7, 7)
    known = graph.sized(num_keys=9)
    assert known.mask(7).shape == (7, 9)  # a size of its own is not asked for
    assert EdgeList([[0], [1]], size=(2, 5)).mask().shape == (2, 5)


@pytest.mark.parametrize("case", ["sorted", "shuffled", "twice", "beyond int32", "empty", "one"])
def test_a_list_of_edges_is_a_sorted_set_that_knows_the_given_order(case):
    n = 1 << 20 if case == "beyond int32" else 50
    given = torch.randint(n, (2, {"empty": 0, "one": 1}.get(case, 300)))
    code = (given[1] * n + given[0]).unique() if case in ("sorted", "shuffled") else given[1] * n + given[0]
    code = code[torch.randperm(len(code))] if case == "shuffled" else code
    graph = EdgeList(torch.stack([code % n, code // n]), n)
    edges, position = torch.unique(code, return_inverse=True)
    assert torch.equal(graph.code, edges)
    assert torch.equal(graph.position, position)
    assert torch.equal(code[graph.order], edges)
    assert graph.order.tolist() == [code.tolist().index(edge) for edge in edges.tolist()]  # of equal ones the first


def test_that_edges_are_sorted_is_checked():
    sorted_edges = EdgeList(torch.randint(9, (2, 30)), 9).edge_index()
    assert EdgeList(sorted_edges, 9, is_sorted=True) == EdgeList(sorted_edges, 9)
    for wrong in (sorted_edges.flip(1), sorted_edges[:, [0, 0, 1]]):
        with pytest.raises(ValueError, match="is_sorted=True says"):
            EdgeList(wrong, 9, is_sorted=True)
