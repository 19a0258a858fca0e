"""The same graph, said more simply: rewrites that keep every edge.

A rule is one `case`: a kind of expression, and what it is equal to. Nothing here depends on a size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import and_, or_

from attngraph.graph.algebra import (
    Complement,
    Difference,
    Empty,
    Full,
    Intersection,
    QuerySlice,
    Sized,
    SymmetricDifference,
    Transpose,
    Union,
    WithGlobalNodes,
)
from attngraph.graph.base import Graph
from attngraph.graph.compose import Disjoint
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.expander import Expander
from attngraph.graph.patterns import Causal, ChunkEnds, Chunks, Global, Identity, Prefix, Random, Strided, Window

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
        case Transpose(Full() | Empty() | Identity() | Global() | Strided() | Chunks() | Expander() as a):
            return a  # a.T -> a, if symmetric
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
        case Prefix(0) | Global(()) | ChunkEnds(_, 0) | Random(0) | Expander(0):  # -> Empty()
            return EMPTY
        case Strided(1):  # Strided(1) -> Full()
            return FULL
        case ChunkEnds(chunk, length) if chunk == length:  # ChunkEnds(c, c) -> Full()
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
        case QuerySlice((Full() | Empty() | Prefix() | ChunkEnds()) as a):
            return a  # a.rows(i, j) -> a, if all queries are alike
        case QuerySlice(QuerySlice(a, start, _), more, stop):  # a.rows(i, j).rows(k, l) -> a.rows(i + k, i + l)
            return QuerySlice(a, start + more, start + stop)
        case QuerySlice(Causal(offset), start, _):  # Causal(o).rows(i, j) -> Causal(o + i)
            return Causal(offset + start)
        case QuerySlice(Sized(Causal(offset), _, m), start, stop):  # the same of Causal(o).sized(n, m)
            return Causal(offset + start).sized(stop - start, m)
        case QuerySlice(Sized(Full(), _, m), start, stop):
            return FULL.sized(stop - start, m)
        case Transpose(QuerySlice(Transpose(Sized(Causal(offset), n, _)), first, stop)):  # its keys i … j-1
            return Causal(offset - first).sized(n, stop - first)
        case Transpose(QuerySlice(Transpose(Sized(Full(), n, _)), first, stop)):
            return FULL.sized(n, stop - first)
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
    return graph if isinstance(graph, EdgeList) else _simplified(graph, {})  # whose hash is a look at all its edges


def _simplified(graph: Graph, known: dict[Graph, Graph]) -> Graph:
    """The same, with what was found out about its parts."""
    if graph not in known:
        found = graph._map(_simplified, known)
        better = None
        if not found.heads and _is_built_in(found):
            better = _rewritten(found)
        if better is None and isinstance(found, Union | Intersection):
            better = _with_pairs_rewritten(found)
        simpler = _as_large(found if better is None else _simplified(_as_large(better, graph), known), graph)
        known[graph] = known[simpler] = simpler
    return known[graph]


def _with_pairs_rewritten(graph: Union | Intersection) -> Graph | None:
    """A union or intersection in which pairs of operands were put together, or None."""
    rule = _rewritten_union if isinstance(graph, Union) else _rewritten_intersection
    kept: list[Graph] = []
    waiting = list(graph.graphs[::-1])
    while waiting:
        part = waiting.pop()
        for place, other in enumerate(kept):
            better = _put_together(rule, other, part)
            if better is not None:
                del kept[place]
                waiting.append(better)
                break
        else:
            kept.append(part)
    return None if len(kept) == len(graph.graphs) else reduce(graph.operator, kept)


def _put_together(rule: Callable[[Graph, Graph], Graph | None], a: Graph, b: Graph) -> Graph | None:
    """What a rule makes of two operands, in either order."""
    if a.heads or b.heads or not (_is_built_in(a) and _is_built_in(b)):
        return None
    a, b = _plain(a), _plain(b)
    found = rule(a, b)
    return rule(b, a) if found is None else found


def _is_built_in(graph: Graph) -> bool:
    """Whether a graph and its parts are what their classes say here: a class derived from one of ours may differ."""
    return all(type(part).__module__.startswith("attngraph.graph.") for part in (graph, *graph._children))


def _plain(graph: Graph) -> Graph:
    """Without the size that is said of it: operands have the size of the whole, which is told again."""
    return graph.graph if type(graph) is Sized else graph


def _as_large(simpler: Graph, graph: Graph) -> Graph:
    """The simpler graph, told the size that its longer form knew."""
    return simpler if simpler.size == graph.size else simpler.sized(*graph.size)
