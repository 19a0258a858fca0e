"""Graphs of other libraries in and out: PyG, networkx, SciPy, dense masks, FlexAttention predicates.

Everything is a conversion; nothing here keeps a reference to the other library's object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attngraph import cache
from attngraph.graph.base import Graph, at_size
from attngraph.graph.compose import PerHead
from attngraph.graph.edge_list import EdgeList, fingerprint, integer_tensor
from attngraph.graph.predicate import Predicate

if TYPE_CHECKING:
    import networkx
    import scipy.sparse


def from_edge_index(edge_index: Tensor, size: int | tuple[int, int] | None = None) -> EdgeList:
    """A graph from PyG's `edge_index` (2, E): row 0 the source = key, row 1 the target = query.

    Without a size, there are as many nodes as the largest number says, queries and keys alike (PyG's own rule, which
    loses isolated nodes at the end: give the size where there may be some).

    The graph of a tensor that lives is remembered until its numbers change: a training loop sorts its edges once. On a
    GPU, where looking at the numbers would stop the program, they change as torch counts it: not through `.data`.

    >>> from_edge_index(torch.tensor([[0, 1], [1, 2]]), size=3)
    EdgeList([[0, 1], [1, 2]], size=(3, 3))
    """
    given = integer_tensor(edge_index)
    counted = isinstance(edge_index, Tensor) and edge_index.is_cuda and not edge_index.is_inference()
    numbers = (*given.shape, edge_index.data_ptr(), edge_index._version) if counted else fingerprint(given)
    asked = repr(size), numbers
    known = cache.EDGE_INDEX.get(edge_index) if isinstance(edge_index, Tensor) else None
    if known is not None and known[0] == asked:
        return known[1]
    if size is None:
        size = int(given.max()) + 1 if given.numel() else 0
    graph = EdgeList(given, size)
    if isinstance(edge_index, Tensor):
        cache.EDGE_INDEX[edge_index] = asked, graph
    return graph


def from_networkx(G: networkx.Graph, nodelist: Sequence[Any] | None = None) -> EdgeList:
    """A graph from networkx: u → v means that v hears u; an undirected edge is heard in both directions.

    Nodes that are exactly the numbers 0 … N-1 keep their number. Otherwise node i is `nodelist[i]`, or without a
    nodelist the i-th node of `G`. (PyG always numbers by insertion, which scrambles positions silently.)

    >>> import networkx
    >>> from_networkx(networkx.DiGraph([(2, 0), (0, 1)]))
    EdgeList([[2, 0], [0, 1]], size=(3, 3))
    """
    if nodelist is None:
        nodelist = list(G)
        if set(nodelist) == set(range(len(nodelist))):
            nodelist = range(len(nodelist))
    number = {node: index for index, node in enumerate(nodelist)}
    if len(number) != len(nodelist) or set(number) != set(G):
        wrong = sorted(map(str, set(number) ^ set(G)))[:5] or ["a node is named twice"]
        raise ValueError(f"nodelist must name each node of the graph once (differing: {', '.join(wrong)})")
    pairs = [(number[u], number[v]) for u, v in G.edges()]
    if not G.is_directed():
        pairs += [(v, u) for u, v in pairs if u != v]
    return EdgeList(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T, len(number))


def from_scipy_sparse_matrix(matrix: scipy.sparse.spmatrix) -> EdgeList:
    """A graph from a SciPy sparse matrix A of sources and targets: A[k, q] is an edge k → q.

    This is networkx's and PyG's reading. For a mask, with queries as rows, pass its transpose. Stored zeros are edges.
    """
    found = matrix.tocoo()
    edge_index = torch.stack([torch.as_tensor(side.astype("int64")) for side in (found.row, found.col)])
    return EdgeList(edge_index, (found.shape[1], found.shape[0]))


def from_dense(mask: Tensor) -> Graph:
    """A graph from a mask (N, M) or (H, N, M) in which True, or any number but 0, is an edge; rows are queries.

    >>> from_dense(torch.tensor([[True, False], [True, True]]))
    EdgeList([[0, 0, 1], [0, 1, 1]], size=(2, 2))
    """
    mask = torch.as_tensor(mask)
    if mask.ndim == 3:
        return PerHead([from_dense(head) for head in mask])
    if mask.ndim != 2:
        raise ValueError(f"from_dense takes a mask (N, M), or (H, N, M) for heads (got shape {tuple(mask.shape)})")
    if mask.is_floating_point() and not mask.isfinite().all():
        raise ValueError("from_dense takes a mask, True for an edge (got infinities or NaN): for a bias, mask > -inf")
    return EdgeList(mask.nonzero().flip(1).T, tuple(mask.shape))


def from_function(function: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int] | None = None) -> Graph:
    """A graph from a predicate of (q_idx, kv_idx), as FlexAttention's `mask_mod` without batch and head.

    A predicate can only be asked pair by pair: prefer the closed forms and their algebra, which can be reasoned about.

    >>> from_function(lambda q_idx, kv_idx: q_idx >= kv_idx).num_edges(4, 4)
    10
    """
    graph = Predicate(function)
    return graph if size is None else graph.sized(*size)


def to_networkx(graph: Graph, n: int | None = None, m: int | None = None) -> networkx.DiGraph:
    """The edges as a networkx DiGraph on the numbers 0 … max(n, m)-1: u → v where v hears u."""
    import networkx

    found = networkx.DiGraph()
    bound, n, m = at_size(graph, n, m)
    found.add_nodes_from(range(max(n, m)))
    found.add_edges_from(bound.edge_index(n, m).T.tolist())
    return found


def to_scipy_sparse_matrix(graph: Graph, n: int | None = None, m: int | None = None) -> scipy.sparse.coo_matrix:
    """The edges as a SciPy matrix with A[k, q] = 1 for each edge k → q: the inverse of `from_scipy_sparse_matrix`."""
    from scipy.sparse import coo_matrix

    bound, n, m = at_size(graph, n, m)
    key, query = bound.edge_index(n, m).numpy()
    return coo_matrix(([1] * len(key), (key, query)), shape=(m, n))
