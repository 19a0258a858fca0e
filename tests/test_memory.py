"""What needs more memory, or looks at more pairs, than there is: an error with a number, before it begins."""

import time
import warnings
from types import SimpleNamespace

import pytest
import torch

from attngraph import (
    Axial,
    Causal,
    ChunkEnds,
    Chunks,
    Documents,
    EdgeList,
    Expander,
    Full,
    Global,
    Graph,
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
    to_block_mask,
    to_networkx,
    to_scipy_sparse_matrix,
)

LIMIT = 1 << 29  # bytes that the machine is said to have
SECONDS = 20  # in which an answer or an error is there, on a slow machine


class Own(Graph):
    """A definition alone."""

    def contains(self, q_idx, kv_idx):
        return (q_idx + kv_idx) % 3 == 0


LARGE = 10**9
ANY_SIZE = [
    Full(), Identity(), Causal(), Window(3, 3), Window(10**6, 0, 3), Prefix(9), Global([0, 7]), Strided(3),
    Strided(10**8), Chunks(64), Chunks(3, 1), Random(8), Random(10**9), Causal() & Chunks(64), Causal() & Random(8),
    ChunkEnds(64, 2), ChunkEnds(3, 1), ChunkEnds(10**9, 10**8, 5), Causal() & (Chunks(64) | ChunkEnds(64, 2)),
    Expander(8), ~Random(3), Causal() - Random(3), Random(3) @ Random(3), Window(1, 0) @ Window(1, 0), Own(),
    Own() & Window(3, 0), from_function(lambda q, k: q > k), PerHead([Causal(), Random(3)]), Random(3).T,
    Causal().rows(10**5, 2 * 10**5), Causal().with_global_nodes(10), (Causal() | Random(2)) ^ Strided(7),
    Own() | Causal(),
]  # fmt: skip
OF_THEIR_SIZE = [
    Documents([10**5]), Documents([10**9]), Causal() & Documents([10**5, 3]), Neighborhood((1000, 1000), 9),
    Neighborhood((10**5, 10**5), 200), Axial((3000, 3000)), ShiftedWindows((4096, 4096), 64, 3),
    Tree(range(-1, 49_999)), Tree([-1] * 10**5), EdgeList([[0], [1]], 10**9), ~EdgeList([[0], [1]], 10**9),
    Causal() & Neighborhood((10**5, 10**5), 3),
]  # fmt: skip
QUESTIONS = {
    "mask": lambda g, n: g.mask(n, n),
    "num_edges": lambda g, n: g.num_edges(n, n),
    "edge_index": lambda g, n: g.edge_index(n, n),
    "in_degrees": lambda g, n: g.in_degrees(n, n),
    "out_degrees": lambda g, n: g.out_degrees(n, n),
    "spans": lambda g, n: g.spans(0, 5, n, n),
    "is_causal": lambda g, n: analysis.is_causal(g, n),
    "leaks": lambda g, n: analysis.leaks([g], n),
    "last_reader": lambda g, n: analysis.last_reader(g, n, n),
    "reach": lambda g, n: analysis.reach([g], n),
    "receptive_field": lambda g, n: analysis.receptive_field([g, g], 5, n),
    "cost": lambda g, n: analysis.cost(g, n, dim=64, heads=g.heads or 1),
    "plan": lambda g, n: plan(g, n, n, heads=g.heads or 1),
    "to_block_mask": lambda g, n: to_block_mask(g, n, n),
    "to_networkx": lambda g, n: to_networkx(g, n, n),
    "to_scipy_sparse_matrix": lambda g, n: to_scipy_sparse_matrix(g, n, n),
}


def cases():
    for graph in ANY_SIZE:
        rows = graph.size[0]
        yield from ((graph, n) for n in ((rows,) if rows else (10**5, 10**6, LARGE)))
    yield from ((graph, graph.size[0]) for graph in OF_THEIR_SIZE)


SMALL_SHARE = ["num_edges", "mask", "in_degrees"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SMALL_SHARE else pytest.mark.nightly) for name in QUESTIONS],
)
def test_a_question_is_answered_or_refused_with_a_number(name, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=LIMIT))
    monkeypatch.setattr("attngraph.graph.listing.LONG_SECONDS", 2)
    sizes = {10**5} if name in SMALL_SHARE else {10**5, 10**6, LARGE}
    for graph, n in cases():
        if graph.size[0] is None and n not in sizes:
            continue
        began = time.process_time()
        refusal = None
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # that all pairs are looked at, and for how long
            try:
                QUESTIONS[name](graph, n)
            except (MemoryError, ValueError, UserWarning) as error:
                refusal = str(error)
        assert refusal is None or any(letter.isdigit() for letter in refusal), (graph, n, refusal)
        assert time.process_time() - began < SECONDS, (graph, n)


def test_what_has_a_formula_is_counted():
    assert (Chunks(64) & Causal()).num_edges(3_000_000, 3_000_000) == 3_000_000 * 65 // 2
    assert Tree(range(-1, 49_999)).num_edges() == 50_000 * 50_001 // 2
    assert Neighborhood((10**5, 10**5), 0).num_edges() == 10**10
    assert (~Random(3)).num_edges(10**5, 10**5) == 10**10 - 3 * 10**5


def test_large_masks_are_made_some_rows_at_a_time():
    n = 5_000
    assert torch.equal(Causal().mask(n, n), torch.ones(n, n, dtype=torch.bool).tril())
    both = PerHead([Causal(), Window(1, 0)]).mask(n, n)
    assert torch.equal(both[1], Window(1, 0).mask(n, n))


def test_a_chain_of_a_tree_is_planned_as_causal_is():
    tree, n = Tree(range(-1, 2_999)), 3_000
    assert torch.equal(tree.mask(), Causal().mask(n, n))
    q, k, v = torch.randn(3, 1, 1, n, 4)
    torch.testing.assert_close(attend(q, k, v, tree), attend(q, k, v, Causal()))


def test_a_long_look_is_announced(monkeypatch):
    monkeypatch.setattr("attngraph.graph.listing.LONG_SECONDS", 0)
    with pytest.warns(UserWarning, match=r"25,000,000 pairs of Own\(\) are looked at one by one"):
        Own().num_edges(5_000, 5_000)
