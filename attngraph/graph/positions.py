"""Where the queries of a graph stand among its keys: what distances between a query and a key are counted from.

A graph has `_places` since it was made: the keys at which query 0 stands, as its parts tell it. There are none where i
and j count alike; several, where the parts contradict each other; and None among them is `Causal(offset)`, of which
queries may look ahead, or stand at `offset`. `a.rows(start, stop)` stands at start; the queries of `Beside(a, b)` are
the nodes of b; graphs side by side each begin at their own first key.
"""

from __future__ import annotations

from attngraph.graph.base import Graph


def query_offset(graph: Graph) -> int | None:
    """The number of the key at which query 0 stands; None where the graph does not tell.

    Raises ValueError where parts of a graph stand at different places.

    >>> from attngraph import Causal
    >>> query_offset(Causal().rows(5, 6))
    5
    """
    told = sorted(place for place in graph._places if place is not None)
    if len(told) > 1:
        raise ValueError(
            f"the queries of {graph} stand at different places among the keys, {', '.join(map(str, told))}: distances "
            f"have no meaning there; attend to each part by itself, or give an EdgeBias"
        )
    return told[0] if told else None


def distance_offset(graph: Graph, n: int, m: int) -> int:
    """The same for a bias that goes by distances, which has to know; 0 where i and j count alike.

    Raises ValueError too for `Causal(offset)` of other numbers of queries and keys.
    """
    offset = query_offset(graph)
    if None in graph._places and offset is None and n != m:
        raise ValueError(
            f"a bias of distances must know where the {n} queries stand among {m} keys, which Causal(offset) does not "
            f"tell, in {graph}: Causal().rows(start, start + {n}) does, or .rows(start, stop) of any graph"
        )
    return offset or 0
