"""What needs more memory, or looks at more pairs, than there is: an error with a number, before it begins."""

from attngraph import (
    Axial,
    Causal,
    Chunks,
    Documents,
    EdgeList,
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
    ~Random(3), Causal() - Random(3), Random(3) @ Random(3), Window(1, 0) @ Window(1, 0), Own(), Own() & Window(3, 0),
    from_function(lambda q, k: q > k), PerHead([Causal(), Random(3)]), Random(3).T, Causal().rows(10**5, 2 * 10**5),
    Causal().with_global_nodes(10), (Causal() | Random(2)) ^ Strided(7), Own() | Causal(),
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
    "cost": lambda g, n: analysis.cost(g, n, 64, g.heads or 1),
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
