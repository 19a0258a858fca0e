"""The same graph, said more simply: rewrites that keep every edge; and the split into boxes and listed edges.

A rule is one `case`: a kind of expression, and what it is equal to. Nothing here depends on a size.
"""

from __future__ import annotations

from functools import reduce
from operator import and_, or_

from attngraph.graph.algebra import (
    Complement,
    Difference,
    Intersection,
    QuerySlice,
    Sized,
    SymmetricDifference,
    Transpose,
    Union,
    WithGlobalNodes,
)
from attngraph.graph.base import Graph
from attngraph.graph.compose import Beside, Disjoint
from attngraph.graph.patterns import Causal, Chunks, Empty, Full, Global, Identity, Prefix, Random, Strided, Window

EMPTY, FULL = Empty(), Full()


def _rewritten(graph: Graph) -> Graph | None:
    """A simpler form of one graph, or None."""
    match graph:
        case Complement(Complement(a)):  # ~~a -> a
            return a
        case Complement(Full()):  # ~Full() -> Empty()
            return EMPTY
        case Complement(Empty()):  # ~Empty() -> Full()
            return FULL
        case Complement(Union(graphs)):  # ~(a | b) -> ~a & ~b
            return reduce(and_, [~part for part in graphs])
        case Complement(Intersection(graphs)):  # ~(a & b) -> ~a | ~b
            return reduce(or_, [~part for part in graphs])
        case Transpose(Transpose(a)):  # a.T.T -> a
            return a
        case Transpose(Full() | Empty() | Identity() | Global() | Strided() | Chunks() as a):  # a.T -> a, if symmetric
            return a
        case Transpose(Window(left, right, dilation)):  # Window(l, r).T -> Window(r, l)
            return Window(right, left, dilation)
        case Transpose(Causal(offset)):  # Causal(o).T -> ~Causal(-1 - o)
            return ~Causal(-1 - offset)
        case Transpose(Complement(a)):  # (~a).T -> ~(a.T)
            return ~a.T
        case Transpose((Union() | Intersection() | Difference() | SymmetricDifference()) as a):
            return a._map(Transpose)  # (a op b).T -> a.T op b.T
        case Window(0, 0):  # Window(0, 0) -> Identity()
            return Identity()
        case Prefix(0) | Global(()) | Random(0):  # -> Empty()
            return EMPTY
        case Strided(1):  # Strided(1) -> Full()
            return FULL
        case Chunks(1):  # Chunks(1) -> Identity()
            return Identity()
        case Difference((a, b)) if a == b:  # a - a -> Empty()
            return EMPTY
        case Difference((a, Empty())):  # a - Empty() -> a
            return a
        case Difference((Empty(), _) | (_, Full())):  # Empty() - b, a - Full() -> Empty()
            return EMPTY
        case Difference((Full(), b)):  # Full() - b -> ~b
            return ~b
        case Difference((a, Complement(b))):  # a - ~b -> a & b
            return a & b
        case SymmetricDifference((a, b)) if a == b:  # a ^ a -> Empty()
            return EMPTY
        case SymmetricDifference((Empty(), a) | (a, Empty())):  # a ^ Empty() -> a
            return a
        case SymmetricDifference((Full(), a) | (a, Full())):  # a ^ Full() -> ~a
            return ~a
        case QuerySlice((Full() | Empty() | Prefix()) as a):  # a.rows(i, j) -> a, if all queries are alike
            return a
        case QuerySlice(QuerySlice(a, start, _), more, stop):  # a.rows(i, j).rows(k, l) -> a.rows(i + k, i + l)
            return QuerySlice(a, start + more, start + stop)
        case QuerySlice(Causal(offset), start, _):  # Causal(o).rows(i, j) -> Causal(o + i)
            return Causal(offset + start)
        case WithGlobalNodes(a, 0) | WithGlobalNodes(Full() as a):  # no global nodes, or all pairs as it is -> a
            return a
        case Sized(Sized(a)):  # a.sized(…).sized(n, m) -> a.sized(n, m)
            return a.sized(*graph.size)
        case Disjoint((a,)):  # Disjoint([a]) -> a
            return a
    return None


def _rewritten_union(a: Graph, b: Graph) -> Graph | None:
    """A simpler form of ``a | b``, or None; it is asked in either order."""
    if a == b:  # a | a -> a
        return a
    match a, b:
        case _, Empty():  # a | Empty() -> a
            return a
        case Full(), _:  # Full() | b -> Full()
            return FULL
        case Complement(inner), _ if inner == b:  # ~b | b -> Full()
            return FULL
        case Causal(one), Causal(other):  # Causal(i) | Causal(j) -> Causal(max(i, j))
            return Causal(max(one, other))
        case Prefix(one), Prefix(other):  # Prefix(i) | Prefix(j) -> Prefix(max(i, j))
            return Prefix(max(one, other))
        case Window(l, r, 1), Window(k, s, 1) if k <= l and s <= r:  # of two windows, the one that holds the other
            return a
        case Intersection(graphs), _ if b in graphs:  # (b & c) | b -> b
            return b
    return None


def _rewritten_intersection(a: Graph, b: Graph) -> Graph | None:
    """A simpler form of ``a & b``, or None; it is asked in either order."""
    if a == b:  # a & a -> a
        return a
    match a, b:
        case _, Full():  # a & Full() -> a
            return a
        case Empty(), _:  # Empty() & b -> Empty()
            return EMPTY
        case _, Complement(inner) if not isinstance(a, Complement):  # a & ~b -> a - b
            return a - inner
        case Causal(one), Causal(other):  # Causal(i) & Causal(j) -> Causal(min(i, j))
            return Causal(min(one, other))
        case Prefix(one), Prefix(other):  # Prefix(i) & Prefix(j) -> Prefix(min(i, j))
            return Prefix(min(one, other))
        case Window(l, r, 1), Window(k, s, 1):  # Window(l, r) & Window(k, s) -> Window(min(l, k), min(r, s))
            return Window(min(l, k), min(r, s))
        case Causal(offset), Window(l, r, 1) if offset >= 0:  # Causal(o) & Window(l, r) -> Window(l, min(r, o))
            return Window(l, min(r, offset))
        case Union(graphs), _ if b in graphs:  # (b | c) & b -> b
            return b
    return None


def simplify(graph: Graph) -> Graph:
    """The same edges at every size that the graph fits, in a shorter expression; it has the size of the graph.

    >>> from attngraph import parse
    >>> simplify(parse("~~(Causal() & Window(8, 8)) | Empty()"))
    Window(8, 0)
    """
    found = graph._map(simplify)
    if not found.heads and _is_built_in(found):
        better = _rewritten(found)
        if better is not None:
            return simplify(_as_large(better, graph))
    if isinstance(found, Union | Intersection):
        better = _with_a_pair_rewritten(found)
        if better is not None:
            return simplify(_as_large(better, graph))
    return _as_large(found, graph)


def _with_a_pair_rewritten(graph: Union | Intersection) -> Graph | None:
    """A union or intersection in which one pair of operands was put together, or None."""
    rule = _rewritten_union if isinstance(graph, Union) else _rewritten_intersection
    for one, a in enumerate(graph.graphs):
        for other, b in enumerate(graph.graphs):
            if one == other or a.heads or b.heads or not (_is_built_in(a) and _is_built_in(b)):
                continue
            better = rule(_plain(a), _plain(b))
            if better is not None:
                rest = [part for place, part in enumerate(graph.graphs) if place not in (one, other)]
                return reduce(graph.operator, [better, *rest])
    return None


def _is_built_in(graph: Graph) -> bool:
    """Whether a graph and its parts are what their classes say here: a class derived from one of ours may differ."""
    return all(type(part).__module__.startswith("attngraph.graph.") for part in (graph, *graph._children))


def _plain(graph: Graph) -> Graph:
    """Without the size that is said of it: operands have the size of the whole, which is told again."""
    return graph.graph if type(graph) is Sized else graph


def _as_large(simpler: Graph, graph: Graph) -> Graph:
    """The simpler graph, told the size that its longer form knew."""
    return simpler if simpler.size == graph.size else simpler.sized(*graph.size)


def split(graph: Graph) -> tuple[Graph, Graph]:
    """Two graphs whose union this is: one to be found box by box, and one whose edges are best listed.

    >>> from attngraph import parse
    >>> split(parse("Causal() & (Window(8, 0) | Random(2))"))
    (Window(8, 0), Random(2) & Causal())
    """
    banded, listed = _split(graph)
    return simplify(banded), simplify(listed)


def _split(graph: Graph) -> tuple[Graph, Graph]:
    if graph._found_by_listing():
        return EMPTY, graph
    parts = {child: _split(child) for child in graph._children}
    if isinstance(graph, Union | Transpose | QuerySlice | Sized | Disjoint | Beside):
        banded = graph._map(lambda child: _as_large(parts[child][0], child))
        return banded, graph._map(lambda child: _as_large(parts[child][1], child))
    if isinstance(graph, WithGlobalNodes):
        banded, scattered = parts[graph.graph]
        apart = Disjoint([EMPTY.sized(graph.num_global, graph.num_global), scattered])
        return _as_large(banded, graph.graph).with_global_nodes(graph.num_global), apart
    if isinstance(graph, Intersection):
        listed = [scattered for _, scattered in parts.values() if scattered != EMPTY]
        banded = reduce(and_, (banded for banded, _ in parts.values()))
        return banded, (reduce(or_, listed) & graph if listed else EMPTY)
    if isinstance(graph, Difference):
        banded, scattered = parts[graph.graphs[0]]
        return banded - graph.graphs[1], scattered - graph.graphs[1]
    if isinstance(graph, SymmetricDifference):
        a, b = graph.graphs
        return _split((a - b) | (b - a))
    return graph, EMPTY
