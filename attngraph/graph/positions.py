"""Where the queries of a graph stand among its keys: what distances between a query and a key are counted from."""

from __future__ import annotations

from collections.abc import Collection

from attngraph.graph.algebra import QuerySlice, Transpose, TwoHops
from attngraph.graph.base import Graph
from attngraph.graph.compose import Beside, Disjoint
from attngraph.graph.patterns import Causal


def query_offset(graph: Graph, n: int, m: int) -> int | None:
    """The number of the key at which query 0 stands; None where the graph does not tell, as i and j count alike.

    `a.rows(start, stop)` stands at start; the queries of `Beside(a, b)` are the nodes of b; graphs side by side each
    begin at their own first key. Raises ValueError where parts of a graph stand at different places.

    >>> from attngraph import Causal
    >>> query_offset(Causal().rows(5, 6), 1, 10)
    5
    """
    return _query_offset(graph, n, m, {})


def distance_offset(graph: Graph, n: int, m: int) -> int:
    """The same for a bias that goes by distances, which has to know.

    Raises ValueError for `Causal(offset)` of other numbers of queries and keys: its queries may be the last ones, or
    look ahead.
    """
    offset = query_offset(graph, n, m)
    if offset is None and n != m and (ahead := _shifted_causal(graph)) is not None:
        raise ValueError(
            f"a bias of distances must know where the {n} queries stand among {m} keys, which {ahead} does not tell: "
            f"Causal().rows({ahead.offset}, {ahead.offset + n}) does, or .rows(start, stop) of any graph"
        )
    return offset or 0


def _query_offset(graph: Graph, n: int, m: int, known: dict[tuple[Graph, int, int], int | None]) -> int | None:
    """The same; each part of an expression is asked once for each size."""
    if (graph, n, m) not in known:
        known[graph, n, m] = _told(graph, n, m, known)
    return known[graph, n, m]


def _told(graph: Graph, n: int, m: int, known: dict[tuple[Graph, int, int], int | None]) -> int | None:
    match graph:
        case QuerySlice(inner, start):
            return start + (_query_offset(inner, graph.stop, m, known) or 0)
        case Transpose(inner):
            offset = _query_offset(inner, m, n, known)
            return None if offset is None else -offset
        case TwoHops(a, b) if graph.middle is not None:
            return _sum(_query_offset(a, n, graph.middle, known), _query_offset(b, graph.middle, m, known))
        case Beside(memory, b):
            keys = memory.size[1] or 0
            return keys + (_query_offset(b, n, m - keys, known) or 0)
        case Disjoint():
            placed = list(graph._placed_in(n, m))
            offsets = [_query_offset(part, *size, known) for part, _, _, size in placed]
            begins = {column - row + (own or 0) for (_, row, column, _), own in zip(placed, offsets, strict=True)}
            return None if begins == {0} and set(offsets) == {None} else _agreed(graph, begins)
    return _agreed(graph, {_query_offset(part, n, m, known) for part in graph._children})


def _shifted_causal(graph: Graph) -> Causal | None:
    """A Causal(offset) in the graph, which is not 0."""
    seen, parts = {graph}, [graph]
    for part in parts:
        if isinstance(part, Causal) and part.offset:
            return part
        parts += dict.fromkeys(child for child in part._children if child not in seen)
        seen.update(part._children)
    return None


def _sum(*offsets: int | None) -> int | None:
    """The sum of what is told; None where nothing is."""
    return None if set(offsets) == {None} else sum(offset or 0 for offset in offsets)


def _agreed(graph: Graph, offsets: Collection[int | None]) -> int | None:
    """What those parts that tell it agree on."""
    told = sorted({offset for offset in offsets if offset is not None})
    if len(told) > 1:
        raise ValueError(
            f"the queries of {graph} stand at different places among the keys, {', '.join(map(str, told))}: distances "
            f"have no meaning there; attend to each part by itself, or give an EdgeBias"
        )
    return told[0] if told else None
