"""Graphs of networkx in and out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.bias import EdgeBias
from attngraph.graph.base import Graph, at_size
from attngraph.graph.boxes import require_memory
from attngraph.graph.edge_list import EdgeList, of_sorted
from attngraph.interop.weights import averaged, of_edges

if TYPE_CHECKING:
    import networkx

BYTES_PER_OBJECT = 500  # what networkx takes for each node and each edge, about


class NamedGraph(NamedTuple):
    """A graph whose nodes have names, and its edges numbers, as `from_networkx` gives it."""

    graph: EdgeList
    nodes: list[Any]
    """The name of each node; of two sides, the names of the queries, and then those of the keys."""
    values: Tensor | None
    """The attribute of each edge, (E,), or attributes, (E, F), in the order of ``graph.edge_index()``; None where none
    is asked for."""

    @property
    def queries(self) -> list[Any]:
        """The name of each query."""
        return self.nodes[: self.graph.size[0]]

    @property
    def keys(self) -> list[Any]:
        """The name of each key: the same, unless there are two sides."""
        return self.nodes[len(self.nodes) - cast(int, self.graph.size[1]) :]

    @property
    def bias(self) -> EdgeBias | None:
        """One attribute of the edges, added to their scores: ``attend(q, k, v, made.graph, bias=made.bias)``."""
        if self.values is not None and self.values.ndim > 1:
            raise ValueError(
                f"a bias is one number for each edge (got {self.values.shape[1]} attributes): edge_attr with one name"
            )
        return None if self.values is None else EdgeBias.of(self.graph, self.values)


@checked
def from_networkx(
    G: networkx.Graph,
    nodelist: Iterable[Any] | None = None,
    edge_attr: str | Sequence[str] | None = None,
    *,
    top: Iterable[Any] | None = None,
    bottom: Iterable[Any] | None = None,
    bipartite: bool = False,
) -> NamedGraph:
    """A graph from networkx: u → v means that v hears u; an undirected edge is heard in both directions.

    Nodes that are exactly the numbers 0 … N-1 keep their number. Otherwise node i is `nodelist[i]`, or without a
    nodelist the i-th node of `G`. (PyG always numbers by insertion, which scrambles positions silently.)

    Parallel edges of a multigraph are one edge, with the sum of their attributes, as in networkx's matrices.

    Args:
        edge_attr: the name of an attribute of the edges, a number, which comes as `values` (E,), and as `bias`; or
            several names, whose numbers come as `values` (E, F), features of the edges.
        top, bottom: the nodes of the two sides of a bipartite graph: the top ones are queries, and hear the bottom
            ones, which are keys, so that the mask is ``networkx.bipartite.biadjacency_matrix(G, top, bottom)``. Of a
            directed graph all edges lead from bottom to top. Those that are not named are the other side.
        bipartite: whether the nodes tell their side, as in networkx: their attribute `bipartite` is 0 for top nodes.

    >>> import networkx
    >>> graph, nodes, values = from_networkx(networkx.DiGraph([("c", "a", {"weight": 2.0})]), edge_attr="weight")
    >>> graph, nodes, values
    (EdgeList([[0], [1]], size=(2, 2)), ['c', 'a'], tensor([2.]))
    >>> from_networkx(networkx.DiGraph([(2, 0), (0, 1)])).graph
    EdgeList([[2, 0], [0, 1]], size=(3, 3))
    >>> made = from_networkx(networkx.Graph([("Ann", "book"), ("Bob", "book")]), top=["Ann", "Bob"])
    >>> made.graph, made.queries, made.keys
    (EdgeList([[0, 0], [0, 1]], size=(2, 1)), ['Ann', 'Bob'], ['book'])

    Raises ValueError for lists that do not name each node once, for an edge without the attribute, and for one within a
    side.
    """
    if not (hasattr(G, "edges") and hasattr(G, "is_directed")):
        raise TypeError(
            f"from_networkx takes a graph of networkx (got a {type(G).__name__}); a list of edges becomes one by "
            f"networkx.DiGraph(edges), or is taken by from_edge_index"
        )
    if top is None and bottom is None and not bipartite:
        sides = [_nodes_in_order(G) if nodelist is None else _hashable("nodelist", nodelist)] * 2
        _require_each_once(G, sides[0], "nodelist")
    elif nodelist is not None:
        raise ValueError("nodelist must be None where top, bottom or bipartite tell the nodes of two sides")
    else:
        sides = _sides(G, top, bottom, bipartite)
        _require_each_once(G, sides[0] + sides[1], "top and bottom")
    query, key = ({node: index for index, node in enumerate(side)} for side in sides)
    names = [edge_attr] if isinstance(edge_attr, str) else list(edge_attr or ())
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"edge_attr must be a name, or a list of names (got {names!r})")
    pairs, numbers = [], []
    for u, v, attributes in G.edges(data=True):
        found = [_number(u, v, attributes, name) for name in names]
        ways = [(u, v)] if G.is_directed() or u == v else [(u, v), (v, u)]
        fitting = [(key[source], query[target]) for source, target in ways if source in key and target in query]
        if not fitting:
            raise ValueError(
                f"top and bottom must be the two sides of all edges, from bottom to top where they are directed (got "
                f"{u!r} → {v!r}); G.reverse() turns the edges around"
            )
        pairs += fitting
        numbers += [found] * len(fitting)
    graph = EdgeList(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T, (len(query), len(key)))
    values = None
    if edge_attr is not None:
        each = torch.tensor(numbers, dtype=torch.get_default_dtype()).reshape(len(numbers), len(names))
        values = each.new_zeros(len(graph.code), len(names)).index_add_(0, graph.position, each)
        values = values.squeeze(1) if isinstance(edge_attr, str) else values
    nodes = sides[0] if sides[0] is sides[1] else sides[0] + sides[1]
    return NamedGraph(of_sorted(graph.code, (len(query), len(key))), nodes, values)


def _nodes_in_order(G: networkx.Graph) -> list[Any]:
    """By their number, where they are the numbers 0 … N-1; else in the order of the graph."""
    numbers = list(range(len(G)))
    return numbers if set(G) == set(numbers) else list(G)


def _hashable(name: str, given: Iterable[Any]) -> list[Any]:
    """A list of names of nodes."""
    nodes = list(given)
    if not all(isinstance(node, Hashable) for node in nodes):
        raise TypeError(f"{name} must name nodes, which are hashable (got {nodes!r})")
    return nodes


def _sides(
    G: networkx.Graph, top: Iterable[Any] | None, bottom: Iterable[Any] | None, bipartite: bool
) -> list[list[Any]]:
    """The nodes that are queries, and those that are keys."""
    if bipartite:
        if not (top is None and bottom is None):
            raise ValueError("bipartite must be False where top or bottom name the nodes")
        for node, side in G.nodes(data="bipartite"):
            if side not in (0, 1):
                raise ValueError(f"bipartite must be an attribute of every node, 0 or 1 (got {side!r} of {node!r})")
        return [[node for node, side in G.nodes(data="bipartite") if side == of] for of in (0, 1)]
    sides = [None if side is None else _hashable(name, side) for name, side in (("top", top), ("bottom", bottom))]
    named = {node for side in sides for node in side or ()}
    return [[node for node in G if node not in named] if side is None else side for side in sides]


def _require_each_once(G: networkx.Graph, nodes: Sequence[Any], name: str) -> None:
    """Raise unless these are the nodes of the graph."""
    named = set(nodes)
    if len(named) != len(nodes) or named != set(G):
        wrong = sorted(map(str, named ^ set(G)))[:5] or ["a node is named twice"]
        raise ValueError(f"{name} must name each node of the graph once (differing: {', '.join(wrong)})")


def _number(u: Any, v: Any, attributes: dict[str, Any], edge_attr: str) -> float:
    """An attribute of an edge."""
    if (found := attributes.get(edge_attr)) is None:
        raise ValueError(
            f"edge_attr must be an attribute of every edge (got {edge_attr!r}, which ({u!r}, {v!r}) lacks): "
            f"for *_, data in G.edges(data=True): data.setdefault({edge_attr!r}, 0.0)"
        )
    if not isinstance(found, Real):
        raise TypeError(f"edge_attr must be an attribute that is a number (got {shown(found)} of ({u!r}, {v!r}))")
    return float(found)


@checked
def to_networkx(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    nodes: Iterable[Any] | None = None,
    weights: Tensor | None = None,
    edge_attr: str = "weight",
    reduce: Literal["mean"] | None = "mean",
) -> networkx.DiGraph:
    """The edges as a networkx DiGraph on the numbers 0 … max(n, m)-1: u → v where v hears u.

    Args:
        nodes: their names, in place of the numbers; or n + m names, of the queries and then of the keys, for a
            bipartite graph, whose nodes have networkx's attribute `bipartite`: 0 for queries, 1 for keys.
        weights: numbers of the edges, (E,), (H, E) or (B, H, E), in the order of ``graph.edge_index(n, m)``, such as
            those of ``attend(…, return_weights=True)``.
        edge_attr: the attribute that holds them.
        reduce: "mean" gives each edge one number, the mean of all heads and entries of the batch; None all of them, a
            list of H numbers, or B lists of H.

    >>> graph = to_networkx(EdgeList([[0], [1]], 2), nodes=["c", "a"], weights=torch.tensor([[2.0], [4.0]]))
    >>> list(graph.edges(data=True))
    [('c', 'a', {'weight': 3.0})]
    """
    import networkx

    result = networkx.DiGraph()
    bound, n, m = at_size(graph, n, m)
    require_memory(max(n, m) * BYTES_PER_OBJECT, f"for the {max(n, m):,} nodes of {graph} as objects of Python")
    names = range(max(n, m)) if nodes is None else _hashable("nodes", nodes)
    two_sides = len(names) == n + m != max(n, m)
    if len(names) not in (max(n, m), n + m) or len(set(names)) != len(names):
        raise ValueError(
            f"nodes must name each of {max(n, m)} nodes once, or {n} queries and {m} keys (got {len(names)} names)"
        )
    edge_index = bound.edge_index(n, m)
    edges = edge_index.shape[1]
    require_memory(edges * BYTES_PER_OBJECT, f"for the {edges:,} edges of {graph} as objects of Python")
    keys = names[n:] if two_sides else names
    if two_sides:
        result.add_nodes_from(names[:n], bipartite=0)
        result.add_nodes_from(keys, bipartite=1)
    result.add_nodes_from(names)
    pairs = [(keys[u], names[v]) for u, v in edge_index.T.tolist()]
    if weights is None:
        result.add_edges_from(pairs)
        return result
    each = (averaged(weights, edges) if reduce else of_edges(weights, edges).movedim(-1, 0)).tolist()
    result.add_weighted_edges_from(((*pair, value) for pair, value in zip(pairs, each, strict=True)), edge_attr)
    return result
