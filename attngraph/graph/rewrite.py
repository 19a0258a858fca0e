"""The same graph, said more simply: rewrites that keep every edge, and the split into what is banded and what is not.

A rule is one line: a kind of expression, and what it is equal to, or None where the rule does not apply. Nothing here
depends on a size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_

from attngraph.graph.algebra import (
    Complement,
    Difference,
    Intersection,
    Rows,
    Sized,
    SymmetricDifference,
    Transpose,
    Union,
    WithGlobalNodes,
)
from attngraph.graph.base import Graph
from attngraph.graph.compose import Beside, Disjoint
from attngraph.graph.patterns import Causal, Chunks, Empty, Full, Global, Identity, Prefix, Random, Strided, Window

NOTHING, ALL = Empty(), Full()

# Of one graph.
RULES: list[tuple[type[Graph], Callable[[Graph], Graph | None]]] = [
    (Complement, lambda g: g.graph.graph if type(g.graph) is Complement else None),
    (Complement, lambda g: NOTHING if g.graph == ALL else None),
    (Complement, lambda g: ALL if g.graph == NOTHING else None),
    (Complement, lambda g: reduce(Graph.__and__, map(Complement, g.graph.graphs)) if type(g.graph) is Union else None),
    (Complement, lambda g: reduce(or_, map(Complement, g.graph.graphs)) if type(g.graph) is Intersection else None),
    (Transpose, lambda g: g.graph.graph if type(g.graph) is Transpose else None),
    (Transpose, lambda g: g.graph if g.graph in (ALL, NOTHING, Identity()) else None),
    (Transpose, lambda g: g.graph if type(g.graph) in (Global, Strided, Chunks) else None),
    (Transpose, lambda g: Window(g.graph.right, g.graph.left, g.graph.dilation) if type(g.graph) is Window else None),
    (Transpose, lambda g: ~Causal(-1 - g.graph.offset) if type(g.graph) is Causal else None),
    (Transpose, lambda g: ~g.graph.graph.T if type(g.graph) is Complement else None),
    (Transpose, lambda g: type(g.graph)(tuple(map(Transpose, g.graph.graphs))) if type(g.graph) in POINTWISE else None),
    (Window, lambda g: Identity() if (g.left, g.right) == (0, 0) else None),
    (Prefix, lambda g: NOTHING if g.length == 0 else None),
    (Global, lambda g: NOTHING if not g.nodes else None),
    (Random, lambda g: NOTHING if g.degree == 0 else None),
    (Strided, lambda g: ALL if g.stride == 1 else None),
    (Chunks, lambda g: Identity() if g.chunk == 1 else None),
    (Difference, lambda g: NOTHING if g.graphs[0] == g.graphs[1] else None),
    (Difference, lambda g: g.graphs[0] if g.graphs[1] == NOTHING else None),
    (Difference, lambda g: NOTHING if g.graphs[0] == NOTHING or g.graphs[1] == ALL else None),
    (Difference, lambda g: ~g.graphs[1] if g.graphs[0] == ALL else None),
    (Difference, lambda g: g.graphs[0] & g.graphs[1].graph if type(g.graphs[1]) is Complement else None),
    (SymmetricDifference, lambda g: NOTHING if g.graphs[0] == g.graphs[1] else None),
    (SymmetricDifference, lambda g: _other(g.graphs, NOTHING)),
    (SymmetricDifference, lambda g: ~other if (other := _other(g.graphs, ALL)) is not None else None),
    (Rows, lambda g: g.graph if g.graph in (ALL, NOTHING) else None),
    (Rows, lambda g: Rows(g.graph.graph, g.graph.start + g.start, g.graph.start + g.stop)
        if type(g.graph) is Rows else None),
    (Rows, lambda g: Causal(g.graph.offset + g.start) if type(g.graph) is Causal else None),
    (Rows, lambda g: g.graph if type(g.graph) is Prefix else None),
    (WithGlobalNodes, lambda g: g.graph if g.num_global == 0 else None),
    (WithGlobalNodes, lambda g: ALL if g.graph == ALL else None),
    (Sized, lambda g: g.graph.graph.sized(*g.size) if type(g.graph) is Sized else None),
    (Disjoint, lambda g: g.graphs[0] if len(g.graphs) == 1 else None),
]  # fmt: skip

# Of two operands of | or of &, in either order.
PAIRS: list[tuple[type[Graph], Callable[[Graph, Graph], Graph | None]]] = [
    (Union, lambda a, b: a if a == b or b == NOTHING else None),
    (Union, lambda a, b: ALL if a == ALL or (type(a) is Complement and a.graph == b) else None),
    (Union, lambda a, b: Causal(max(a.offset, b.offset)) if type(a) is type(b) is Causal else None),
    (Union, lambda a, b: Prefix(max(a.length, b.length)) if type(a) is type(b) is Prefix else None),
    (Union, lambda a, b: a if _is_window(a) and _is_window(b) and _inside(b, a) else None),
    (Union, lambda a, b: b if type(a) is Intersection and b in a.graphs else None),
    (Intersection, lambda a, b: a if a == b or b == ALL else None),
    (Intersection, lambda a, b: NOTHING if a == NOTHING else None),
    (Intersection, lambda a, b: a - b.graph if type(b) is Complement and type(a) is not Complement else None),
    (Intersection, lambda a, b: Causal(min(a.offset, b.offset)) if type(a) is type(b) is Causal else None),
    (Intersection, lambda a, b: Prefix(min(a.length, b.length)) if type(a) is type(b) is Prefix else None),
    (Intersection, lambda a, b: Window(min(a.left, b.left), min(a.right, b.right))
        if _is_window(a) and _is_window(b) else None),
    (Intersection, lambda a, b: Window(b.left, min(b.right, a.offset))
        if type(a) is Causal and a.offset >= 0 and _is_window(b) else None),
    (Intersection, lambda a, b: b if type(a) is Union and b in a.graphs else None),
]  # fmt: skip

POINTWISE = (Union, Intersection, Difference, SymmetricDifference)


def _is_window(graph: Graph) -> bool:
    return type(graph) is Window and graph.dilation == 1


def _inside(a: Window, b: Window) -> bool:
    return a.left <= b.left and a.right <= b.right


def _other(pair: tuple[Graph, ...], one: Graph) -> Graph | None:
    """Of two graphs, the one beside this one."""
    return pair[1] if pair[0] == one else pair[0] if pair[1] == one else None


def simplify(graph: Graph) -> Graph:
    """The same edges at every size that the graph fits, in a shorter expression; it has the size of the graph.

    >>> from attngraph import parse
    >>> simplify(parse("~~(Causal() & Window(8, 8)) | Empty()"))
    Window(8, 0)
    """
    found = graph.map(simplify)
    for kind, rule in RULES:
        if type(found) is kind and not found.heads and (better := rule(found)) is not None:
            return simplify(_as_large(better, graph))
    if type(found) in (Union, Intersection):
        for one, a in enumerate(found.graphs):
            for other, b in enumerate(found.graphs):
                if one == other or a.heads or b.heads:
                    continue
                rules = (rule for kind, rule in PAIRS if kind is type(found))
                better = next((new for rule in rules if (new := rule(_plain(a), _plain(b))) is not None), None)
                if better is not None:
                    rest = [graph for place, graph in enumerate(found.graphs) if place not in (one, other)]
                    return simplify(_as_large(reduce(found.operator, [better, *rest]), graph))
    return _as_large(found, graph)


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
    return tuple(simplify(part) for part in _split(graph))


def _split(graph: Graph) -> tuple[Graph, Graph]:
    if graph.scattered:
        return NOTHING, graph
    parts = {child: _split(child) for child in graph.children}
    if isinstance(graph, Union | Transpose | Rows | Sized | Disjoint | Beside):
        return tuple(graph.map(lambda child, which=which: _as_large(parts[child][which], child)) for which in (0, 1))
    if isinstance(graph, WithGlobalNodes):
        banded, scattered = parts[graph.graph]
        apart = Disjoint([NOTHING.sized(graph.num_global, graph.num_global), scattered])
        return _as_large(banded, graph.graph).with_global_nodes(graph.num_global), apart
    if isinstance(graph, Intersection):
        listed = [scattered for _, scattered in parts.values() if scattered != NOTHING]
        banded = reduce(Graph.__and__, (banded for banded, _ in parts.values()))
        return banded, (reduce(or_, listed) & graph if listed else NOTHING)
    if isinstance(graph, Difference):
        banded, scattered = parts[graph.graphs[0]]
        return banded - graph.graphs[1], scattered - graph.graphs[1]
    if isinstance(graph, SymmetricDifference):
        a, b = graph.graphs
        return _split((a - b) | (b - a))
    return graph, NOTHING
