"""The layers that a question is about: one graph, or one for each layer of a stack, and how many nodes they have."""

from __future__ import annotations

from collections.abc import Sequence

from attngraph.arguments import shown
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.dynamic import not_known
from attngraph.graph.listing import of_any_head

FAR = 1 << 20  # the number of nodes at which a graph that fits any size is looked at


def layers_of(graphs: Graph | Sequence[Graph]) -> Sequence[Graph]:
    """The graphs of a stack, of which one graph is the smallest; TypeError if they are none."""
    layers = [graphs] if isinstance(graphs, Graph) else list(graphs)
    for graph in layers:
        if not isinstance(graph, Graph):
            raise TypeError(f"graphs must be a graph, or one for each layer (got {shown(graph)} in the list)")
    return layers


def stack(graphs: Graph | Sequence[Graph], n: int | None) -> tuple[Sequence[Graph], int]:
    """The graphs of a stack, and how many nodes it has: those asked for, or what a layer knows."""
    layers = layers_of(graphs)
    known = [graph.size[0] for graph in layers if graph.size[0] is not None]
    n = next(iter(known), None) if n is None else n
    if n is None:
        raise ValueError("give the number of nodes, n: no layer knows its own")
    require_ints(0, n=n)
    return layers, n


def size_of(graph: Graph, n: int | None) -> tuple[int, int]:
    """How many queries and keys a graph is looked at with: FAR where nobody says so."""
    n = graph.size[0] if n is None else n
    if n is None:
        if graph._breakpoints(FAR, FAR) is None:
            raise ValueError(f"give the number of nodes, n: {graph} can only be looked at edge by edge")
        n = FAR
    return n, n if graph.size[1] is None else graph.size[1]


def require_known(graph: Graph) -> None:
    """Raise where queries and keys choose the edges."""
    if graph._unresolved:
        raise not_known(graph)


def heard_by_any_head(graph: Graph, n: int) -> Graph:
    """A graph of n nodes that is bound to its size; where heads have each their own, the union of them."""
    require_known(graph)
    bound = at_size(graph, n, n)[0]
    return of_any_head(bound, n, n) if bound.heads else bound
