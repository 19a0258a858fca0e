"""Graphs of networkx in and out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph, at_size
from attngraph.graph.boxes import require_memory
from attngraph.graph.edge_list import EdgeList, of_sorted

if TYPE_CHECKING:
    import networkx

BYTES_PER_OBJECT = 500  # what networkx takes for each node and each edge, about


class NamedGraph(NamedTuple):
    """A graph whose nodes have names, and its edges numbers, as `from_networkx` gives it."""

    graph: EdgeList
    nodes: list[Any]
    """The name of each node."""
    values: Tensor | None
    """A number for each edge, (E,), in the order of ``graph.edge_index()``; None where no weight was asked for."""


@checked
def from_networkx(G: networkx.Graph, nodelist: Iterable[Any] | None = None, weight: str | None = None) -> NamedGraph:
    """A graph from networkx: u → v means that v hears u; an undirected edge is heard in both directions.

    Nodes that are exactly the numbers 0 … N-1 keep their number. Otherwise node i is `nodelist[i]`, or without a
    nodelist the i-th node of `G`. (PyG always numbers by insertion, which scrambles positions silently.)

    With `weight`, the name of an attribute of the edges, their numbers come too, as ``EdgeBias.of(graph, values)``
    takes them. Parallel edges of a multigraph are one edge, with the sum of their weights, as in networkx's matrices.

    >>> import networkx
    >>> graph, nodes, values = from_networkx(networkx.DiGraph([("c", "a", {"weight": 2.0})]), weight="weight")
    >>> graph, nodes, values
    (EdgeList([[0], [1]], size=(2, 2)), ['c', 'a'], tensor([2.]))
    >>> from_networkx(networkx.DiGraph([(2, 0), (0, 1)])).graph
    EdgeList([[2, 0], [0, 1]], size=(3, 3))

    Raises ValueError for a nodelist that does not name each node once, and for an edge without the weight.
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
            nodelist = list(range(len(nodelist)))
    number = {node: index for index, node in enumerate(nodelist)}
    if len(number) != len(nodelist) or set(number) != set(G):
        wrong = sorted(map(str, set(number) ^ set(G)))[:5] or ["a node is named twice"]
        raise ValueError(f"nodelist must name each node of the graph once (differing: {', '.join(wrong)})")
    edges = [(number[u], number[v], _weight(u, v, found, weight)) for u, v, found in G.edges(data=True)]
    if not G.is_directed():
        edges += [(v, u, value) for u, v, value in edges if u != v]
    pairs = torch.tensor([(u, v) for u, v, _ in edges], dtype=torch.int64).reshape(-1, 2).T
    graph = EdgeList(pairs, len(number))
    values = None
    if weight is not None:
        each = torch.tensor([value for *_, value in edges], dtype=torch.get_default_dtype())
        values = each.new_zeros(len(graph.code)).index_add(0, graph.position, each)
    return NamedGraph(of_sorted(graph.code, (len(number), len(number))), nodelist, values)


def _weight(u: Any, v: Any, attributes: dict[str, Any], weight: str | None) -> float:
    """The weight of an edge; 1 where none is asked for."""
    found = 1.0 if weight is None else attributes.get(weight)
    if found is None:
        raise ValueError(
            f"weight must be an attribute of every edge (got {weight!r}, which ({u!r}, {v!r}) lacks): "
            f"networkx.set_edge_attributes(G, 1.0, {weight!r}) gives one to all"
        )
    if not isinstance(found, Real):
        raise TypeError(f"weight must be an attribute that is a number (got {shown(found)} of ({u!r}, {v!r}))")
    return float(found)


@checked
def to_networkx(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    nodes: Iterable[Any] | None = None,
    values: Tensor | None = None,
    weight: str = "weight",
) -> networkx.DiGraph:
    """The edges as a networkx DiGraph on the numbers 0 … max(n, m)-1: u → v where v hears u.

    Args:
        nodes: their names, in place of the numbers.
        values: a number for each edge, (E,), in the order of ``graph.edge_index(n, m)``, such as the attention weights
            of one head.
        weight: the attribute that holds it.

    >>> graph = to_networkx(EdgeList([[0], [1]], 2), nodes=["c", "a"], values=torch.tensor([2.0]))
    >>> list(graph.edges(data=True))
    [('c', 'a', {'weight': 2.0})]
    """
    import networkx

    result = networkx.DiGraph()
    bound, n, m = at_size(graph, n, m)
    require_memory(max(n, m) * BYTES_PER_OBJECT, f"for the {max(n, m):,} nodes of {graph} as objects of Python")
    names = range(max(n, m)) if nodes is None else list(nodes)
    if not all(isinstance(node, Hashable) for node in names):
        raise TypeError("nodes must be names, which are hashable")
    if len(names) != max(n, m) or len(set(names)) != len(names):
        raise ValueError(f"nodes must name each of {max(n, m)} nodes once (got {len(names)} names)")
    edge_index = bound.edge_index(n, m)
    edges = edge_index.shape[1]
    require_memory(edges * BYTES_PER_OBJECT, f"for the {edges:,} edges of {graph} as objects of Python")
    result.add_nodes_from(names)
    pairs = [(names[u], names[v]) for u, v in edge_index.T.tolist()]
    if values is None:
        result.add_edges_from(pairs)
        return result
    if values.shape != (edges,):
        raise ValueError(f"values must have shape ({edges},), one for each edge (got {tuple(values.shape)})")
    result.add_weighted_edges_from(((*pair, value) for pair, value in zip(pairs, values.tolist(), strict=True)), weight)
    return result
