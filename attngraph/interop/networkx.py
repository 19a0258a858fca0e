"""Graphs of networkx in and out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from attngraph.arguments import checked
from attngraph.graph.base import Graph, at_size
from attngraph.graph.boxes import require_memory
from attngraph.graph.edge_list import EdgeList

if TYPE_CHECKING:
    import networkx

BYTES_PER_OBJECT = 500  # what networkx takes for each node and each edge, about


@checked
def from_networkx(G: networkx.Graph, nodelist: Iterable[Any] | None = None) -> EdgeList:
    """A graph from networkx: u → v means that v hears u; an undirected edge is heard in both directions.

    Nodes that are exactly the numbers 0 … N-1 keep their number. Otherwise node i is `nodelist[i]`, or without a
    nodelist the i-th node of `G`. (PyG always numbers by insertion, which scrambles positions silently.)

    >>> import networkx
    >>> from_networkx(networkx.DiGraph([(2, 0), (0, 1)]))
    EdgeList([[2, 0], [0, 1]], size=(3, 3))

    Raises ValueError for a nodelist that does not name each node once.
    """
    if not (hasattr(G, "edges") and hasattr(G, "is_directed")):
        raise TypeError(
            f"from_networkx takes a graph of networkx (got a {type(G).__name__}); a list of edges becomes one by "
            f"networkx.DiGraph(edges), or is taken by from_edge_index"
        )
    if nodelist is not None:
        nodelist = list(nodelist)
        if not all(isinstance(node, Hashable) for node in nodelist):
            raise TypeError(f"nodelist must name nodes, which are hashable (got {nodelist!r})")
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


@checked
def to_networkx(graph: Graph, n: int | None = None, m: int | None = None) -> networkx.DiGraph:
    """The edges as a networkx DiGraph on the numbers 0 … max(n, m)-1: u → v where v hears u."""
    import networkx

    result = networkx.DiGraph()
    bound, n, m = at_size(graph, n, m)
    require_memory(max(n, m) * BYTES_PER_OBJECT, f"for the {max(n, m):,} nodes of {graph} as objects of Python")
    edge_index = bound.edge_index(n, m)
    edges = edge_index.shape[1]
    require_memory(edges * BYTES_PER_OBJECT, f"for the {edges:,} edges of {graph} as objects of Python")
    result.add_nodes_from(range(max(n, m)))
    result.add_edges_from(edge_index.T.tolist())
    return result
