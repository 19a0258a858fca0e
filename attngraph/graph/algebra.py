"""The algebra of graphs: what the operators on `Graph` build. Each class is one operation on sets of edges.

It defines no connectivity of its own; that is in `attngraph.patterns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import and_, or_, xor
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from attngraph.graph.base import (
    Edges,
    Graph,
    common_size,
    count_edges,
    list_edges,
    merge_edges,
    require_ints,
    sort_edges,
)
from attngraph.graph.boxes import FULL, PARTIAL, Boxes, classify, patterns_side_by_side
from attngraph.graph.counting import Breakpoints

PATHS_AT_ONCE = 1 << 22  # paths of two hops that are looked at in one step

# ------------------------------------------------------------------------------------------------ pair by pair


class _Pointwise(Graph):
    """A combination of graphs of one size by an operator on booleans."""

    graphs: Sequence[Graph]

    symbol: ClassVar[str]
    operator: ClassVar[Callable[[Any, Any], Any]]
    combine: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def _check(self):
        normal_graphs(self, "graphs")
        common_size(f"graphs combined with {self.symbol}", *(graph.size for graph in self.graphs))

    def _own_size(self):
        return common_size("graphs", *(graph.size for graph in self.graphs))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return reduce(type(self).operator, (graph.contains(q_idx, kv_idx) for graph in self.graphs))

    def _breakpoints(self, n, m):
        return Breakpoints.union(graph._breakpoints(n, m) for graph in self.graphs)

    def _write(self, inner):
        return f" {self.symbol} ".join(_operand(graph, inner, self) for graph in self.graphs)

    def _classify_boxes(self, boxes):
        return reduce(type(self).combine, (graph._classify_boxes(boxes) for graph in self.graphs))

    def _box_pattern(self, boxes):
        return [number for graph in self.graphs for number in _patterns_where_partial(graph, boxes)]

    def _edges_of_rows(self, start, stop, n, m):
        sliced = type(self)(tuple(QuerySlice(graph, start, stop) for graph in self.graphs))
        return list_edges(sliced, stop - start, m)

    def _lists_rows(self, n, m):
        return all(graph._lists_rows(n, m) for graph in self.graphs)

    def _of(self, source: Graph, n: int, m: int) -> Edges:
        """Those edges of a larger graph that are in this one."""
        query, key = list_edges(source, n, m)
        kept = self.contains(query, key)
        return query[kept], key[kept]


class Union(_Pointwise):
    """``a | b``: the edges of either."""

    symbol, _precedence, operator, combine = "|", 0, staticmethod(or_), staticmethod(torch.maximum)

    def _found_by_listing(self):
        return all(graph._found_by_listing() for graph in self.graphs)

    def _edges(self, n, m):
        return merge_edges([list_edges(graph, n, m) for graph in self.graphs], m)

    def _count(self, n, m):
        first, rest = self.graphs[0], reduce(or_, self.graphs[1:])
        return count_edges(first, n, m) + count_edges(rest, n, m) - count_edges(first & rest, n, m)


class SymmetricDifference(_Pointwise):
    """``a ^ b``: the edges of one of the two."""

    symbol, _precedence, operator = "^", 1, staticmethod(xor)
    combine = staticmethod(lambda a, b: torch.where((a == PARTIAL) | (b == PARTIAL), PARTIAL, (a - b).abs()))

    def _found_by_listing(self):
        return all(graph._found_by_listing() for graph in self.graphs)

    def _edges(self, n, m):
        return self._of(Union(self.graphs), n, m)

    def _count(self, n, m):
        a, b = self.graphs
        return count_edges(a, n, m) + count_edges(b, n, m) - 2 * count_edges(a & b, n, m)


class Intersection(_Pointwise):
    """``a & b``: the edges of both."""

    symbol, _precedence, operator, combine = "&", 2, staticmethod(and_), staticmethod(torch.minimum)

    def _found_by_listing(self):
        return any(graph._found_by_listing() for graph in self.graphs)

    def _edges(self, n, m):
        listed = [graph for graph in self.graphs if graph._found_by_listing()] or self.graphs
        return self._of(min(listed, key=lambda graph: count_edges(graph, n, m)) if len(listed) > 1 else listed[0], n, m)

    def _count(self, n, m):
        for part in self.graphs:
            if isinstance(part, Complement):  # a & ~b is a - b, which never lists ~b
                others = reduce(and_, (other for other in self.graphs if other is not part))
                return count_edges(others - part.graph, n, m)
        return super()._count(n, m)


class Difference(_Pointwise):
    """``a - b``: the edges of a that b lacks."""

    symbol, _precedence, operator = "-", 3, staticmethod(lambda a, b: a & ~b)
    combine = staticmethod(lambda a, b: torch.minimum(a, FULL - b))

    def _found_by_listing(self):
        return self.graphs[0]._found_by_listing()

    def _edges(self, n, m):
        return self._of(self.graphs[0], n, m)

    def _count(self, n, m):
        a, b = self.graphs
        return count_edges(a, n, m) - count_edges(a & b, n, m)


class Complement(Graph):
    """``~a``: the pairs that are no edges."""

    graph: Graph
    _precedence = 5

    def _own_size(self):
        return self.graph.size

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~self.graph.contains(q_idx, kv_idx)

    def _classify_boxes(self, boxes):
        return FULL - self.graph._classify_boxes(boxes)

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes)

    def _breakpoints(self, n, m):
        return self.graph._breakpoints(n, m)

    def _count(self, n, m):
        return n * m - count_edges(self.graph, n, m)

    def _write(self, inner):
        return "~" + (inner(self.graph) if isinstance(self.graph, Complement) else _operand(self.graph, inner, self))


# -------------------------------------------------------------------------------------- moving nodes and edges


class Transpose(Graph):
    """``a.T``: every edge reversed."""

    graph: Graph

    def _own_size(self):
        n, m = self.graph.size
        return m, n

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.graph.contains(kv_idx, q_idx)

    def _classify_boxes(self, boxes):
        return self.graph._classify_boxes(boxes.transposed)

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes.transposed)

    def _found_by_listing(self):
        return self.graph._found_by_listing()

    def _breakpoints(self, n, m):
        inner = self.graph._breakpoints(m, n)
        return inner and inner.transposed()

    def _edges(self, n, m):
        query, key = list_edges(self.graph, m, n)
        return sort_edges(key, query, m)

    def _count(self, n, m):
        return count_edges(self.graph, m, n)

    def _bind(self, n, m):
        return Transpose(self.graph._bind(m, n))

    def _write(self, inner):
        return _operand(self.graph, inner) + ".T"


class QuerySlice(Graph):
    """``a.rows(start, stop)``: the queries start … stop-1, renumbered from 0."""

    graph: Graph
    start: int
    stop: int

    def _check(self):
        require_ints(0, start=self.start, stop=self.stop)
        most = self.graph.size[0]
        if self.start > self.stop or (most is not None and self.stop > most):
            limit = "" if most is None else f" <= {most}, the graph's number of queries"
            raise ValueError(f"rows must satisfy start <= stop{limit} (got start={self.start}, stop={self.stop})")

    def _own_size(self):
        return (self.stop - self.start, self.graph.size[1])

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.graph.contains(q_idx + self.start, kv_idx)

    def _classify_boxes(self, boxes):
        return self.graph._classify_boxes(boxes.shifted(rows=self.start))

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes.shifted(rows=self.start))

    def _found_by_listing(self):
        return self.graph._found_by_listing()

    def _breakpoints(self, n, m):
        inner = self.graph._breakpoints(self._all, m)
        return inner and inner.shifted(rows=-self.start)

    def _edges(self, n, m):
        return self.graph._edges_of_rows(self.start, self.stop, self._all, m)

    def _bind(self, n, m):
        return replace(self, graph=self.graph._bind(self._all, m))

    @property
    def _all(self) -> int:
        """How many queries the whole graph has, as far as it is needed."""
        return self.stop if self.graph.size[0] is None else self.graph.size[0]

    def _write(self, inner):
        return f"{_operand(self.graph, inner)}.rows({self.start}, {self.stop})"


class Sized(Graph):
    """``a.sized(num_queries, num_keys)``: a graph that fits any size, at this one."""

    graph: Graph
    num_queries: int | None
    num_keys: int | None

    def _check(self):
        given = {"num_queries": self.num_queries, "num_keys": self.num_keys}
        require_ints(0, **{name: count for name, count in given.items() if count is not None})
        common_size(f"{self.graph} and its new size", self.graph.size, (self.num_queries, self.num_keys))

    def _own_size(self):
        return common_size("graph", self.graph.size, (self.num_queries, self.num_keys))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.graph._bind(*self.size).contains(q_idx, kv_idx)

    def _classify_boxes(self, boxes):
        return self.graph._classify_boxes(boxes)

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes)

    def _found_by_listing(self):
        return self.graph._found_by_listing()

    def _bind(self, n, m):
        return replace(self, graph=self.graph._bind(*common_size("graph", self.size, (n, m))))

    def _breakpoints(self, n, m):
        return self.graph._breakpoints(n, m)

    def _edges(self, n, m):
        return list_edges(self.graph, n, m)

    def _count(self, n, m):
        return count_edges(self.graph, n, m)

    def _write(self, inner):
        return f"{_operand(self.graph, inner)}.sized({self.num_queries}, {self.num_keys})"


class WithGlobalNodes(Graph):
    """``a.with_global_nodes(k)``: k more nodes, in front, that hear all and are heard by all."""

    graph: Graph
    num_global: int

    def _check(self):
        require_ints(0, num_global=self.num_global)

    def _own_size(self):
        n, m = self.graph.size
        return _plus(n, self.num_global), _plus(m, self.num_global)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        k = self.num_global
        inner = self.graph.contains((q_idx - k).clamp(min=0), (kv_idx - k).clamp(min=0))
        return (q_idx < k) | (kv_idx < k) | inner

    def _classify_boxes(self, boxes):
        k, inner = self.num_global, self._in_inner(boxes)
        found = classify(inner, (boxes.bottom <= k) | (boxes.right <= k))
        found[inner] = self.graph._classify_boxes(boxes.chosen(inner).shifted(-k, -k))
        return found

    def _box_pattern(self, boxes):
        k = self.num_global
        return patterns_side_by_side([(self.graph, k, k, self._in_inner(boxes))], boxes)

    def _in_inner(self, boxes: Boxes) -> Tensor:
        return (boxes.top >= self.num_global) & (boxes.left >= self.num_global)

    def _breakpoints(self, n, m):
        k = self.num_global
        inner = self.graph._breakpoints(*self._inner(n, m))
        return inner and Breakpoints.union([inner.shifted(k, k), Breakpoints(frozenset({k}), frozenset({k}))])

    def _edges(self, n, m):
        k = self.num_global
        query, key = list_edges(self.graph, *self._inner(n, m))
        of_global_queries = all_pairs(min(k, n), m)
        of_global_keys = all_pairs(n, min(k, m))
        return merge_edges([of_global_queries, of_global_keys, (query + k, key + k)], m)

    def _count(self, n, m):
        inner_n, inner_m = self._inner(n, m)
        return n * m - inner_n * inner_m + count_edges(self.graph, inner_n, inner_m)

    def _bind(self, n, m):
        for name, count in (("queries", n), ("keys", m)):
            if count is not None and count < self.num_global:
                raise ValueError(f"with_global_nodes({self.num_global}) needs at least that many {name} (got {count})")
        inner = (None if count is None else max(count - self.num_global, 0) for count in (n, m))
        return replace(self, graph=self.graph._bind(*inner))

    def _inner(self, n: int, m: int) -> tuple[int, int]:
        """The size of the graph without its global nodes."""
        return max(n - self.num_global, 0), max(m - self.num_global, 0)

    def _write(self, inner):
        return f"{_operand(self.graph, inner)}.with_global_nodes({self.num_global})"


class TwoHops(Graph):
    """``a @ b``: query i hears key j if i hears, in a, some node that hears j in b."""

    a: Graph
    b: Graph
    _precedence = 4

    def _check(self):
        common_size(
            "the two hops of a @ b: the keys of a and the queries of b", (None, self.a.size[1]), (None, self.b.size[0])
        )

    def _own_size(self):
        return (self.a.size[0], self.b.size[1])

    @property
    def middle(self) -> int | None:
        """How many nodes lie between the two hops, if known."""
        return self.b.size[0] if self.a.size[1] is None else self.a.size[1]

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.middle is None:
            raise ValueError(
                f"two hops need the number of nodes between them, which {self} does not tell: give one of the "
                f"graphs its size, graph.sized(num_queries, num_keys)"
            )
        middle = torch.arange(self.middle, device=q_idx.device)
        (queries, at_query), (keys, at_key) = (torch.unique(side, return_inverse=True) for side in (q_idx, kv_idx))
        first = self.a.contains(queries[:, None], middle[None]).float()
        second = self.b.contains(middle[:, None], keys[None]).float()
        return (first @ second > 0)[..., at_query, at_key]

    def _found_by_listing(self):
        return True

    def _edges(self, n, m):
        between = cast(int, self.middle)
        query, end = list_edges(self.a, n, between)
        start, key = list_edges(self.b, between, m)
        degree = torch.bincount(start, minlength=between)
        first, fan = (degree.cumsum(0) - degree)[end], degree[end]  # the edges of b that go on from each edge of a
        found = (query[:0], key[:0])
        for some in torch.arange(len(fan)).split(_together(fan)):
            here = fan[some]
            step = torch.arange(int(here.sum())) - (here.cumsum(0) - here - first[some]).repeat_interleave(here)
            found = merge_edges([found, (query[some].repeat_interleave(here), key[step])], m)
        return found

    def _bind(self, n, m):
        middle = self.middle if self.middle is not None else n if n == m else None
        return TwoHops(self.a.sized(n, middle)._bind(n, middle), self.b.sized(middle, m)._bind(middle, m))

    def _write(self, inner):
        return f"{_operand(self.a, inner, self)} @ {_operand(self.b, inner, self)}"


# --------------------------------------------------------------------------------------------------- the parts


def _plus(count: int | None, more: int) -> int | None:
    return None if count is None else count + more


def all_pairs(n: int, m: int) -> Edges:
    """The edges of n queries that hear m keys each."""
    return torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)


def normal_graphs(graph: Graph, name: str) -> tuple[Graph, ...]:
    """A field that holds several graphs, as a tuple; anything else is an error."""
    given = getattr(graph, name)
    graphs = tuple(given) if isinstance(given, Iterable) and not isinstance(given, Graph) else ()
    if not graphs or not all(isinstance(part, Graph) for part in graphs):
        raise TypeError(f"{type(graph).__name__} takes a list of at least one graph (got {given!r})")
    object.__setattr__(graph, name, graphs)
    return graphs


def _operand(graph: Graph, inner, operator: Graph | None = None) -> str:
    """A part as text, in brackets where the operator around it binds as strongly or more."""
    own, around = graph._precedence, 5 if operator is None else operator._precedence
    return inner(graph) if own > around else f"({inner(graph)})"


def _together(count: Tensor) -> list[int]:
    """Lengths that cut a list of counts into stretches of about PATHS_AT_ONCE in sum."""
    return torch.unique_consecutive(count.cumsum(0) // PATHS_AT_ONCE, return_counts=True)[1].tolist()


def _patterns_where_partial(graph: Graph, boxes: Boxes) -> list[Tensor]:
    """The class of each box, and the graph's pattern where the class does not tell all."""
    kind = graph._classify_boxes(boxes)
    return [kind.long(), *(torch.where(kind == PARTIAL, number, 0) for number in graph._box_pattern(boxes))]


def chain(kind: type[_Pointwise], a: Graph, b: Graph) -> Graph:
    """An associative operation on many graphs, as one node."""
    return kind(tuple(part for graph in (a, b) for part in (graph.graphs if type(graph) is kind else (graph,))))
